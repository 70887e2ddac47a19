"""Open packed splits: select the store that the manifest names."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from shards.atomic import detect_replacement, replaced_error
from shards.errors import CorruptError, NotFoundError, UserError, quote
from shards.manifest import MANIFEST_NAME, REQUIRED_SPLITS, SPLITS, Manifest
from shards.remote.cache import mark_unchecked
from shards.remote.datasets import resolve_dataset
from shards.stores.base import Store

_EXPECTED = f"a packed data set: the directory that holds {' and '.join(REQUIRED_SPLITS)}"


def open_store(directory: Path | str, memory: int | None = None, verify: bool = True) -> Store:
    """Open one packed split.

    Args:
        directory: A directory with a manifest, or an address such as s3://bucket/name/train, which is downloaded.
        memory: Maximum bytes of images to hold in memory (compressed stores hold decompressed blocks); None: no limit.
        verify: Whether images are compared with their checksums when they are first read. Labels and rows always are.

    Raises:
        UserError: If the split is missing, incomplete or damaged, or replaced in the meantime.
    """
    directory = resolve_dataset(directory)
    with detect_replacement(directory / MANIFEST_NAME):
        store = open_files(directory, Manifest.read(directory), memory, verify)
    store.reopen = partial(_open_again, directory.absolute(), memory, verify, store.manifest)
    return store


def _open_again(directory: Path, memory: int | None, verify: bool, manifest: Manifest) -> Store:
    """Open a store that was pickled. Raises MismatchError if its data set has been replaced since."""
    store = open_store(directory, memory, verify)
    if store.manifest.identity() != manifest.identity():
        raise replaced_error(directory)
    return store


def open_files(directory: Path, manifest: Manifest, memory: int | None = None, verify: bool = True) -> Store:
    """Open the files of a split with a manifest that may not be on disk yet; see `open_store`."""
    try:
        return _open_files(directory, manifest, memory, verify)
    except CorruptError:
        for file in manifest.files:  # `SplitFiles` marks a shard
            mark_unchecked(directory / file.name)  # a remote data set is downloaded again
        raise


def _open_files(directory: Path, manifest: Manifest, memory: int | None, verify: bool) -> Store:
    if manifest.store == "zarr":
        from shards.stores.zarr import ZarrStore

        return ZarrStore(directory, manifest, memory, verify)
    if manifest.store == "records":
        from shards.stores.records import RecordStore

        return RecordStore(directory, manifest, verify)
    from shards.stores.tar import TarStore

    return TarStore(directory, manifest, memory, verify)


def open_dataset_or_split(directory: Path | str, split: str) -> Store:
    """Open a directory (or address) that is a split itself, or the named split of a packed data set."""
    directory = resolve_dataset(directory)
    return open_store(directory) if (directory / MANIFEST_NAME).is_file() else open_split(directory, split)


def open_split(directory: Path | str, split: str, memory: int | None = None, verify: bool = True) -> Store:
    """Open the `train`, `test` or `val` split of a packed data set.

    Args:
        directory: The directory that holds the splits, or an address, which is downloaded into the local cache first.
        split: The name of the split.
        memory: As in `open_store`.
        verify: As in `open_store`.

    Raises:
        UserError: If the split is missing, incomplete or damaged.
    """
    directory = resolve_dataset(directory)
    if (directory / MANIFEST_NAME).is_file():
        raise UserError(
            found=f"{directory}, which is a single split",
            expected=_EXPECTED,
            hint=f"name {quote(directory.absolute().parent)}",
        )
    if directory.is_dir() and not (directory / split).is_dir():
        if any((directory / other).is_dir() for other in SPLITS):
            raise NotFoundError(
                found=f"{directory} without its {split} split",
                expected=_EXPECTED,
                hint="pack the data set again: python -m pipeline.shard SOURCE --out DIR",
            )
        Manifest.read(directory)  # its error names what the directory holds
    return open_store(directory / split, memory, verify)
