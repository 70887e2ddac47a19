"""How a part is cut into blocks and shards, and what writes them in each kind of store."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from shards.manifest import RawFile, Shard, StoreKind


class EncodedImage(NamedTuple):
    """An image file as it is: its bytes, and the extension (without a dot) that tells its format."""

    content: bytes
    extension: str


class Block(NamedTuple):
    """Samples in a row. first: position of the first one in the part.

    images: uint8 [n, H, W, C], or a list of n `EncodedImage`. labels, rows: int64 [n].
    """

    first: int
    images: NDArray[np.uint8] | list[EncodedImage]
    labels: NDArray[np.int64]
    rows: NDArray[np.int64]


@dataclass(frozen=True)
class Layout:
    """samples: N of the part. block_size, shard_size: samples of a block and of a shard, a whole number of blocks."""

    samples: int
    image_shape: tuple[int | None, int | None, int]
    block_size: int
    shard_size: int

    @property
    def shards(self) -> int:
        return -(-self.samples // self.shard_size)

    def samples_of(self, shard: int) -> range:
        """Positions of a shard's samples."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.samples))


class PartWriter(Protocol):
    """Writes the files of one part into a directory that exists; every byte follows from the samples alone.

    Shards may be written in any order and by different processes, each with a writer of its own.
    """

    def start(self) -> tuple[RawFile, ...]:
        """Write what is there once, before any shard; returns the files."""
        ...

    def write_shard(self, number: int, blocks: Iterable[Block]) -> tuple[Shard, tuple[RawFile, ...]]:
        """Write shard `number` from its blocks in order; returns it and the files that go with it.

        If `blocks` raises, so does this, and what it has begun to write is of no use.
        """
        ...


def make_writer(store: StoreKind, directory: Path, layout: Layout, compression: str = "zstd") -> PartWriter:
    """The writer of a kind of store. compression: `zstd` or `none`; for zarr only."""
    if store == "zarr":
        from shards.stores.zarr_arrays import ZarrWriter

        return ZarrWriter(directory, layout, compression)
    if store == "records":
        from shards.stores.records import RecordWriter

        return RecordWriter(directory, layout)
    from shards.stores.tar import TarWriter

    return TarWriter(directory, layout)
