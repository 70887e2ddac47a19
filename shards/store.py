"""The one interface to images at rest, and how to open them."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from shards.errors import UserError
from shards.manifest import MANIFEST_NAME, PARTS, Manifest


class Store(Protocol):
    """Samples 0 .. N-1 of one part, in packed order (a seeded permutation of the raw rows)."""

    manifest: Manifest
    labels: NDArray[np.int64]
    """[N], class of each sample, 0 .. len(manifest.classes) - 1."""
    rows: NDArray[np.int64]
    """[N], row of each sample in the raw source."""

    def __len__(self) -> int: ...

    def gather(self, samples: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
        """Copy images into the caller's buffer.

        samples: int64 [n], positions 0 .. N-1 in any order, repeats allowed.
        out: uint8 [n, H, W, C], C-contiguous.
        Raises IndexError for a position outside the store; `out` is then unspecified.
        """
        ...


def open_store(directory: Path | str) -> Store:
    """Open one packed part (a directory with a manifest). Raises `UserError` if it is not whole."""
    from shards.tar import TarStore

    directory = Path(directory)
    return TarStore(directory, Manifest.read(directory))


def open_either(directory: Path, part: str) -> Store:
    """Open a directory that is a part itself, or the named part of a packed set."""
    return open_store(directory) if (directory / MANIFEST_NAME).is_file() else open_part(directory, part)


def open_part(directory: Path | str, part: str) -> Store:
    """Open the `train` or `test` part of a packed set (the directory that holds both)."""
    directory = Path(directory)
    if (directory / MANIFEST_NAME).is_file():
        raise UserError(
            found=f"{directory}, which is a single part",
            expected=f"the packed set: the directory that holds {' and '.join(PARTS)}",
            hint=f"name {directory.absolute().parent}",
        )
    if directory.is_dir() and not (directory / part).is_dir():
        if any((directory / other).is_dir() for other in PARTS):
            raise UserError(
                found=f"{directory} without its {part} part",
                expected=f"a packed set: a directory that holds {' and '.join(PARTS)}",
                hint="pack the set again: python -m pipeline.shard SOURCE --out DIR",
            )
        Manifest.read(directory)  # says what is there instead
    return open_store(directory / part)
