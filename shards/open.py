"""The one interface to images at rest, and how to open them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from shards.errors import UserError
from shards.manifest import ALL_PARTS, MANIFEST_NAME, PARTS, Manifest
from shards.remote.sets import resolve_dataset

Images: TypeAlias = NDArray[np.uint8] | list[NDArray[np.uint8]]


class Located(NamedTuple):
    """Images in memory. table: uint8 [M, H * W * C], not to be written to; its rows may overlap. rows: int64 [n], the
    row of the table that is each image."""

    table: NDArray[np.uint8]
    rows: NDArray[np.int64]


class Store(Protocol):
    """Samples 0 .. N-1 of one part, in packed order (a seeded permutation of the raw rows)."""

    manifest: Manifest
    labels: NDArray[np.int64]
    """[N], class of each sample, 0 .. len(manifest.classes) - 1."""
    rows: NDArray[np.int64]
    """[N], row of each sample in the raw source."""

    def __len__(self) -> int: ...

    def read(self, samples: NDArray[np.int64]) -> Images:
        """The images of samples (int64 [n], positions 0 .. N-1 in any order, repeats allowed).

        uint8 [n, H, W, C], or, where manifest.encoded, a list of n image files, each uint8 [bytes].
        Raises IndexError for a position outside the store.
        """
        ...


class ImageStore(Store, Protocol):
    """A store of images of one size."""

    def locate(self, samples: NDArray[np.int64]) -> Located | None:
        """Where the images of samples (as in `read`) lie in memory; None if they may have to make room for others.

        Raises IndexError for a position outside the store.
        """
        ...

    def gather(self, samples: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
        """Copy images into the caller's buffer.

        samples: as in `read`. out: uint8 [n, H, W, C], C-contiguous.
        Raises IndexError for a position outside the store; `out` is then unspecified.
        """
        ...


class EncodedStore(Store, Protocol):
    """A store of picture files."""

    def place(self, sample: int) -> str:
        """Where the picture of a sample lies, for messages: its file, and its name in there."""
        ...


def open_store(directory: Path | str, memory: int | None = None) -> Store:
    """Open one packed part (a directory with a manifest). Raises `UserError` if it is not whole.

    memory: most bytes of images to hold in memory (compressed stores hold what they have decompressed); None for no
    bound.
    """
    directory = resolve_dataset(directory)
    return open_files(directory, Manifest.read(directory), memory)


def open_files(directory: Path, manifest: Manifest, memory: int | None = None) -> Store:
    """Open the files of a part whose manifest is known, and perhaps not written yet; see `open_store`."""
    if manifest.store == "zarr":
        from shards.stores.zarr import ZarrStore

        return ZarrStore(directory, manifest, memory)
    if manifest.store == "records":
        from shards.stores.records import RecordStore

        return RecordStore(directory, manifest)
    from shards.stores.tar import TarStore

    return TarStore(directory, manifest, memory)


def open_either(directory: Path | str, part: str) -> Store:
    """Open a directory (or address) that is a part itself, or the named part of a packed set."""
    directory = resolve_dataset(directory)
    return open_store(directory) if (directory / MANIFEST_NAME).is_file() else open_part(directory, part)


def open_part(directory: Path | str, part: str, memory: int | None = None) -> Store:
    """Open the `train`, `test` or `val` part of a packed set (the directory or address that holds them).

    A set at an address such as s3://bucket/name is fetched into the local cache first. Otherwise as `open_store`.
    """
    directory = resolve_dataset(directory)
    if (directory / MANIFEST_NAME).is_file():
        raise UserError(
            found=f"{directory}, which is a single part",
            expected=f"the packed set: the directory that holds {' and '.join(PARTS)}",
            hint=f"name {directory.absolute().parent}",
        )
    if directory.is_dir() and not (directory / part).is_dir():
        if any((directory / other).is_dir() for other in ALL_PARTS):
            raise UserError(
                found=f"{directory} without its {part} part",
                expected=f"a packed set: a directory that holds {' and '.join(PARTS)}",
                hint="pack the set again: python -m pipeline.shard SOURCE --out DIR",
            )
        Manifest.read(directory)  # says what is there instead
    return open_store(directory / part, memory)
