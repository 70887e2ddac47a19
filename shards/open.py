"""Open packed splits: pick the store that the manifest names."""

from __future__ import annotations

from pathlib import Path

from shards.errors import NotFoundError, UserError
from shards.manifest import MANIFEST_NAME, REQUIRED_SPLITS, SPLITS, Manifest
from shards.remote.sets import resolve_dataset
from shards.stores.base import Store


def open_store(directory: Path | str, memory: int | None = None) -> Store:
    """Open one packed split (a directory with a manifest). Raises `UserError` if it is not whole.

    memory: most bytes of images to hold in memory (compressed stores hold what they have decompressed); None for no
    bound.
    """
    directory = resolve_dataset(directory)
    return open_files(directory, Manifest.read(directory), memory)


def open_files(directory: Path, manifest: Manifest, memory: int | None = None) -> Store:
    """Open the files of a split whose manifest is known, and perhaps not written yet; see `open_store`."""
    if manifest.store == "zarr":
        from shards.stores.zarr import ZarrStore

        return ZarrStore(directory, manifest, memory)
    if manifest.store == "records":
        from shards.stores.records import RecordStore

        return RecordStore(directory, manifest)
    from shards.stores.tar import TarStore

    return TarStore(directory, manifest, memory)


def open_dataset_or_split(directory: Path | str, split: str) -> Store:
    """Open a directory (or address) that is a split itself, or the named split of a packed set."""
    directory = resolve_dataset(directory)
    return open_store(directory) if (directory / MANIFEST_NAME).is_file() else open_split(directory, split)


def open_split(directory: Path | str, split: str, memory: int | None = None) -> Store:
    """Open the `train`, `test` or `val` split of a packed set (the directory or address that holds them).

    A set at an address such as s3://bucket/name is fetched into the local cache first. Otherwise as `open_store`.
    """
    directory = resolve_dataset(directory)
    if (directory / MANIFEST_NAME).is_file():
        raise UserError(
            found=f"{directory}, which is a single split",
            expected=f"the packed set: the directory that holds {' and '.join(REQUIRED_SPLITS)}",
            hint=f"name {directory.absolute().parent}",
        )
    if directory.is_dir() and not (directory / split).is_dir():
        if any((directory / other).is_dir() for other in SPLITS):
            raise NotFoundError(
                found=f"{directory} without its {split} split",
                expected=f"a packed set: a directory that holds {' and '.join(REQUIRED_SPLITS)}",
                hint="pack the set again: python -m pipeline.shard SOURCE --out DIR",
            )
        Manifest.read(directory)  # says what is there instead
    return open_store(directory / split, memory)
