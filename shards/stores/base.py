"""Interfaces of stores and writers, and the types that they exchange."""

from __future__ import annotations

import mmap
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, SupportsIndex, TypeAlias, TypeGuard

import numpy as np
from numpy.typing import NDArray

from shards.manifest import Manifest, RawFile, Shard
from shards.stores.split_files import SplitFiles

INDEX_VERSION = "v1.2"  # first word of the index that DALI's `wds2idx` writes
Images: TypeAlias = NDArray[np.uint8] | list[NDArray[np.uint8]]
Buffer: TypeAlias = bytes | bytearray | memoryview | mmap.mmap | NDArray[np.uint8]


def block_key(number: int) -> str:
    """Return the name of a block record: its number in the split with eight digits."""
    return f"{number:08d}"


def shard_name(number: int) -> str:
    """Return the file name of a tar shard."""
    return f"shard-{number:05d}.tar"


def check_positions(samples: NDArray[np.int64], count: int) -> None:
    """Raise IndexError unless all positions (int64 [n]) are in 0 .. count - 1."""
    if len(samples) and (samples.min() < 0 or samples.max() >= count):
        raise IndexError(f"samples {samples.min()} .. {samples.max()} outside 0 .. {count - 1}")


def read_at(file: BinaryIO, offset: int, size: int) -> bytes:
    """Read up to `size` bytes at a byte offset."""
    file.seek(offset)
    return file.read(size)


class ImageTable(NamedTuple):
    """Images in memory.

    Attributes:
        table: uint8 [M, H * W * C], read-only. Its rows may overlap.
        rows: int64 [n], the table row of each image.
    """

    table: NDArray[np.uint8]
    rows: NDArray[np.int64]


class ShardUse(NamedTuple):
    """The steps of an epoch in which a rank reads a shard.

    Attributes:
        shard: The number of the shard.
        first: The first step that reads it.
        last: The last step that reads it.
    """

    shard: int
    first: int
    last: int


class Store(ABC):
    """Samples 0 .. N-1 of one split in packed order (a seeded permutation of the source rows)."""

    manifest: Manifest
    labels: NDArray[np.integer]
    """[N], class of each sample, 0 .. len(manifest.classes) - 1. Any integer type, possibly memory-mapped."""
    rows: NDArray[np.integer]
    """[N], index of each sample in the raw source. Any integer type, possibly memory-mapped."""

    files: SplitFiles | None = None
    """The files of the split; None for a store without files of its own."""
    reopen: Callable[[], Store] | None = None
    """Opens the store again, for unpickling in another process. None: the attributes are pickled."""

    def __len__(self) -> int:
        return self.manifest.samples

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """Pickle how the store is opened, and not its maps, locks and open files."""
        return super().__reduce_ex__(protocol) if self.reopen is None else (self.reopen, ())

    @property
    def shard_bounds(self) -> NDArray[np.int64]:
        """The number of samples before each shard, and of all of them, int64 [shards + 1]."""
        return np.cumsum([0, *(shard.samples for shard in self.manifest.shards)])

    @property
    def cache_bytes(self) -> int | None:
        """Bytes of shards that the cache holds for this process; None if it holds all."""
        on_demand = self.files.on_demand if self.files is not None else None
        return None if on_demand is None else on_demand.share

    def prefetch(
        self, plan: Callable[[NDArray[np.int64]], Iterable[ShardUse]]
    ) -> AbstractContextManager[Callable[[int], None]]:
        """Fetch shards ahead of need until the end of the block, if they are fetched on demand.

        Args:
            plan: Returns the shards that an epoch reads, by their first step, from `shard_bounds`.

        Returns:
            A context manager. It yields a function that is called with the number of each step before its samples are
            read, and allows shards that are not read any more to be evicted.
        """
        files, shards = self.files, self.manifest.shards
        if files is None or files.on_demand is None:
            return nullcontext(lambda step: None)
        uses = plan(self.shard_bounds)
        return files.on_demand.prefetch((files.path(shards[use.shard].name), use.first, use.last) for use in uses)

    @abstractmethod
    def read(self, samples: NDArray[np.int64]) -> Images:
        """Return the images of samples.

        Args:
            samples: int64 [n], positions 0 .. N-1 in any order, repeats allowed.

        Returns:
            uint8 [n, H, W, C], or, if `manifest.encoded`, a list of n image files, each uint8 [bytes].

        Raises:
            IndexError: If a position is outside the store.
            CorruptError: If a block that is read for the first time, or its labels or rows, differs from its checksum.
        """


class ImageStore(Store):
    """A store of images of one size."""

    def read(self, samples: NDArray[np.int64]) -> NDArray[np.uint8]:
        images = np.empty((len(samples), *self.manifest.pixel_shape), np.uint8)
        self.gather(samples, images)
        return images

    @abstractmethod
    def locate(self, samples: NDArray[np.int64]) -> ImageTable | None:
        """Return the images of samples without copying; None if the store may evict them. Otherwise as `read`."""

    @abstractmethod
    def gather(self, samples: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
        """Copy images into a buffer.

        Args:
            samples: As in `read`.
            out: uint8 [n, H, W, C], C-contiguous.

        Raises:
            IndexError: If a position is outside the store. The content of `out` is undefined then.
        """


def is_image_store(store: Store) -> TypeGuard[ImageStore]:
    """Whether a store has images of one size, and so the methods of `ImageStore`."""
    return not store.manifest.encoded


class EncodedImage(NamedTuple):
    """An image file: its bytes, and the extension of its format, without a dot."""

    content: bytes
    extension: str


class WrittenShard(NamedTuple):
    """A shard that was written.

    Attributes:
        shard: Its entry in the manifest.
        files: The entries of the files that accompany it.
        blocks: Its blocks, `shards.stores.sample_arrays.BLOCK_DTYPE` [blocks].
        pixel_sums: Sums of its pixels and of their squares, int64 [2, C]; None for image files.
    """

    shard: Shard
    files: tuple[RawFile, ...]
    blocks: NDArray[np.void]
    pixel_sums: NDArray[np.int64] | None


class Block(NamedTuple):
    """Consecutive samples.

    Attributes:
        first: Position of the first sample in the split.
        images: uint8 [n, H, W, C], or a list of n `EncodedImage`.
        labels: int64 [n].
        rows: int64 [n], index in the raw source.
    """

    first: int
    images: NDArray[np.uint8] | list[EncodedImage]
    labels: NDArray[np.int64]
    rows: NDArray[np.int64]


@dataclass(frozen=True)
class Layout:
    """Division of a split into shards and blocks.

    Attributes:
        samples: Number of samples of the split.
        image_shape: As in the manifest.
        block_size: Samples of a block.
        shard_size: Samples of a shard, a multiple of `block_size`.
    """

    samples: int
    image_shape: tuple[int | None, int | None, int]
    block_size: int
    shard_size: int

    @classmethod
    def of(cls, manifest: Manifest) -> Layout:
        """Return the layout of a packed split of images of one size."""
        # The only shard of a split may end inside its last block.
        blocks = -(-manifest.shards[0].samples // manifest.block_size)
        return cls(manifest.samples, manifest.image_shape, manifest.block_size, blocks * manifest.block_size)

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.samples // self.shard_size)

    def samples_of(self, shard: int) -> range:
        """Return the positions of a shard's samples."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.samples))


class SplitWriter(ABC):
    """Writes the files of one split into an existing directory. The bytes depend on the samples only.

    Shards may be written in any order and by several processes, each with its own writer.

    Args:
        directory: The directory of the split.
        layout: Its layout.
    """

    def __init__(self, directory: Path, layout: Layout) -> None:
        self.directory = directory
        self.layout = layout

    def start(self) -> tuple[RawFile, ...]:
        """Write the files that do not belong to a shard; returns them. Called before the first shard."""
        return ()

    @abstractmethod
    def write_shard(self, number: int, blocks: Iterable[Block]) -> WrittenShard:
        """Write a shard from its blocks, in order. If `blocks` raises, the shard is incomplete."""
