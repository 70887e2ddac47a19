"""Interfaces of stores and writers, and the types that they exchange."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from shards.manifest import Manifest, RawFile, Shard

INDEX_VERSION = "v1.2"  # first word of the index that DALI's `wds2idx` writes
Images: TypeAlias = NDArray[np.uint8] | list[NDArray[np.uint8]]


def block_key(number: int) -> str:
    """Name of a block record: its number in the split, eight digits."""
    return f"{number:08d}"


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.tar"


def check_positions(samples: NDArray[np.int64], count: int) -> None:
    """Raise IndexError unless all positions of samples (int64 [n]) lie in 0 .. count - 1."""
    if len(samples) and (samples.min() < 0 or samples.max() >= count):
        raise IndexError(f"samples {samples.min()} .. {samples.max()} outside 0 .. {count - 1}")


class ImageTable(NamedTuple):
    """Images in memory. table: uint8 [M, H * W * C], not to be written to; its rows may overlap. rows: int64 [n], the
    row of the table that is each image."""

    table: NDArray[np.uint8]
    rows: NDArray[np.int64]


class Store(Protocol):
    """Samples 0 .. N-1 of one split, in packed order (a seeded permutation of the raw rows)."""

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

    def locate(self, samples: NDArray[np.int64]) -> ImageTable | None:
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

    def describe_sample(self, sample: int) -> str:
        """Where the picture of a sample lies, for messages: its file, and its name in there."""
        ...


class EncodedImage(NamedTuple):
    """An image file as it is: its bytes, and the extension (without a dot) that tells its format."""

    content: bytes
    extension: str


class Block(NamedTuple):
    """Samples in a row. first: position of the first one in the split.

    images: uint8 [n, H, W, C], or a list of n `EncodedImage`. labels, rows: int64 [n].
    """

    first: int
    images: NDArray[np.uint8] | list[EncodedImage]
    labels: NDArray[np.int64]
    rows: NDArray[np.int64]


@dataclass(frozen=True)
class Layout:
    """samples: N of the split. block_size, shard_size: samples of a block and of a shard, a whole number of blocks."""

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


class SplitWriter(Protocol):
    """Writes the files of one split into a directory that exists; every byte follows from the samples alone.

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
