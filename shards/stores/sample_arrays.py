"""Arrays of a split: label and row of each sample, byte range and checksums of each block. See docs/format.md."""

from __future__ import annotations

import errno
import functools
import io
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, cast

import numpy as np
from isal import isal_zlib  # CRC-32 more than ten times as fast as zlib's
from numpy.typing import DTypeLike, NDArray

from shards.atomic import replace_file
from shards.errors import corrupt_shard
from shards.manifest import (
    BLOCKS,
    LABELS,
    ROWS,
    STATISTICS_SAMPLES,
    VERSION,
    Manifest,
    PixelStatistics,
    RawFile,
)
from shards.remote.cache import mark_unchecked
from shards.stores.base import Buffer, block_key
from shards.stores.split_files import ForkLock, SplitFiles

BLOCK_DTYPE = np.dtype([("offset", "<i8"), ("bytes", "<u4"), ("crc32", "<u4"), ("numbers_crc32", "<u4")])
"""Of a block: byte range in its shard, CRC-32 of its pixels (a record: of its file), CRC-32 of its labels and rows."""
_ROW_DTYPES = (np.dtype("<u4"), np.dtype("<i8"))
_BUFFER_VALUES = 1 << 20  # pixels that are added up at once
_CHECKED_LABELS = 1 << 22  # labels that are checked on opening, in 10 ms: subsets are drawn from all of them
Numbers: TypeAlias = NDArray[np.integer]


@functools.lru_cache(maxsize=64)
def npy_header(dtype: Hashable, shape: tuple[int, ...]) -> bytes:
    """Return the header that NumPy writes before an array (.npy version 1.0, padded to 64 bytes)."""
    header = io.BytesIO()
    descr = np.lib.format.dtype_to_descr(np.dtype(cast(DTypeLike, dtype)))
    np.lib.format.write_array_header_1_0(header, {"descr": descr, "fortran_order": False, "shape": shape})
    return header.getvalue()


def numbers_crc32(labels: Numbers, rows: Numbers) -> int:
    """Return the CRC-32 of the labels and rows of a block as little-endian int64, whatever types they have."""
    return isal_zlib.crc32(rows.astype("<i8"), isal_zlib.crc32(labels.astype("<i8")))


def records_crc32(labels: NDArray[np.int64], rows: NDArray[np.int64]) -> list[int]:
    """Return `numbers_crc32` of each of n records."""
    pairs = np.stack([labels, rows], axis=1).astype("<i8").tobytes()
    return [isal_zlib.crc32(pairs[start : start + 16]) for start in range(0, len(pairs), 16)]


class PixelSums:
    """Adds up the pixels of the first images of a split and their squares, exactly."""

    def __init__(self) -> None:
        self._sums = np.zeros((2, 0))
        self._buffer = np.empty((0, 0), np.float32)
        self._channels = 1

    def add(self, first: int, images: NDArray[np.uint8]) -> None:
        """Add images uint8 [n, H, W, C] of positions from `first` on, below `STATISTICS_SAMPLES`; all of one size."""
        images = images[: max(0, STATISTICS_SAMPLES - first)]
        if not len(images):
            return
        size = images[0].size
        if not self._sums.size:
            self._channels = images.shape[-1]
            self._sums = np.zeros((2, size))
            # Sums of so many squares of bytes are exact in float32. Allocating memory for each block takes longer.
            self._buffer = np.empty((max(1, min(256, _BUFFER_VALUES // size)), size), np.float32)
        for first in range(0, len(images), len(self._buffer)):
            part = images[first : first + len(self._buffer)].reshape(-1, size)
            values = self._buffer[: len(part)]
            values[...] = part
            self._sums[0] += values.sum(axis=0)
            self._sums[1] += np.einsum("ij,ij->j", values, values)

    @property
    def total(self) -> NDArray[np.int64] | None:
        """Sums of pixels and of squares of each channel, int64 [2, C]; None without images."""
        return self._sums.astype(np.int64).reshape(2, -1, self._channels).sum(axis=1) if self._sums.size else None


def pixel_statistics(samples: int, sums: Sequence[NDArray[np.int64] | None]) -> PixelStatistics | None:
    """Return the statistics of a split of N samples from the sums of its shards; None for image files."""
    totals = np.sum([part for part in sums if part is not None], axis=0).tolist()
    if not totals:
        return None
    return PixelStatistics(samples=min(samples, STATISTICS_SAMPLES), sums=tuple(totals[0]), squares=tuple(totals[1]))


@dataclass(frozen=True)
class SampleArrays:
    """Labels, rows and blocks of a split, possibly memory-mapped.

    Attributes:
        labels: [N], any unsigned type.
        rows: [N], uint32 or int64.
        blocks: `BLOCK_DTYPE` [blocks]; each record of a store `records` is a block.
    """

    labels: Numbers
    rows: Numbers
    blocks: NDArray[np.void]

    @classmethod
    def open(cls, files: SplitFiles, manifest: Manifest) -> SampleArrays:
        """Open the arrays of a split of version 3.

        Labels and rows are mapped, and so is the array of blocks of a store `records`. In other stores that array has a
        few thousandths of the size of the pixels; it is read, and compared with its SHA-256.

        Raises:
            CorruptError: If a file is missing or not the array that the manifest describes.
        """
        samples = manifest.samples
        labels = _map(files, LABELS, (np.min_scalar_type(len(manifest.classes) - 1),), samples)
        if samples <= _CHECKED_LABELS:
            files.check_sha256(LABELS)
            if labels.max() >= len(manifest.classes):
                reason = f"a label outside 0 .. {len(manifest.classes) - 1}"
                raise corrupt_shard(files.directory / LABELS, reason)
        rows = _map(files, ROWS, _ROW_DTYPES, samples)
        if manifest.encoded:
            return cls(labels, rows, _map(files, BLOCKS, (BLOCK_DTYPE,), samples))
        content, count = files.read_all(BLOCKS), int(blocks_of_shards(manifest).sum())
        return cls(labels, rows, _array(files, BLOCKS, content, (BLOCK_DTYPE,), count))


def blocks_of_shards(manifest: Manifest) -> NDArray[np.int64]:
    """Return the number of blocks of each shard."""
    return -(-np.array([shard.samples for shard in manifest.shards]) // manifest.block_size)


def _map(files: SplitFiles, name: str, dtypes: Sequence[np.dtype], length: int) -> NDArray:
    return _array(files, name, files.map([name])[0], dtypes, length)


def _array(files: SplitFiles, name: str, content: Buffer, dtypes: Sequence[np.dtype], length: int) -> NDArray:
    """Return the array [length] in the content of a .npy file. Raises CorruptError unless it is of one of the types."""
    for dtype in dtypes:
        header = npy_header(dtype, (length,))
        fits = files.size(name) == len(header) + length * dtype.itemsize
        if fits and bytes(content[: len(header)]) == header:
            return np.frombuffer(content, dtype, length, len(header))
    raise corrupt_shard(files.directory / name, "not the array that the manifest describes")


def map_array(path: Path) -> NDArray:
    """Map the array of a .npy file. Raises what `numpy.load` raises.

    With `mmap_mode="c"` NumPy makes a private, writable map, which the system refuses if it exceeds memory and swap. A
    read-only map is shared and has no such limit. Some file systems (FUSE with direct_io) do not support shared maps.
    """
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        if error.errno != errno.ENODEV:
            raise
        return np.load(path, mmap_mode="c", allow_pickle=False)


def array_dtypes(classes: int, highest_row: int) -> tuple[np.dtype, np.dtype, np.dtype]:
    """Return the smallest types of labels and rows, and the type of blocks."""
    rows = next(dtype for dtype in _ROW_DTYPES if highest_row <= np.iinfo(dtype).max)
    return np.min_scalar_type(classes - 1), rows, BLOCK_DTYPE


def encode_array(values: NDArray, dtype: DTypeLike) -> bytes:
    """Return the content of a .npy file of values [n] in a type that holds them."""
    return npy_header(np.dtype(dtype), values.shape) + values.astype(dtype, copy=False).tobytes()


@contextmanager
def open_array(path: Path, dtype: DTypeLike, length: int) -> Iterator[Callable[[NDArray], None]]:
    """Write a one-dimensional array piece by piece as a .npy file, which replaces `path` at the end of the context.

    Args:
        path: The file.
        dtype: The type of the values.
        length: Their number.

    Yields:
        A function that appends values [n], which the type holds.
    """
    dtype = np.dtype(dtype)
    header = npy_header(dtype, (length,))
    with replace_file(path) as file:
        file.write(header)

        def append(values: NDArray) -> None:
            file.write(np.ascontiguousarray(values, dtype).view(np.uint8).data)

        yield append
        assert file.tell() == len(header) + length * dtype.itemsize, "the pieces have another length"


def write_array(path: Path, dtype: DTypeLike, length: int, pieces: Iterable[NDArray]) -> RawFile:
    """Write a one-dimensional array piece by piece as a .npy file, which replaces `path`; returns its entry."""
    with open_array(path, dtype, length) as append:
        for piece in pieces:
            append(piece)
    return RawFile.of(path.parent, path.name)


def write_blocks(directory: Path, blocks: Sequence[NDArray[np.void]]) -> RawFile:
    """Write pieces of the blocks of a split, `BLOCK_DTYPE`; returns the entry."""
    return write_array(directory / BLOCKS, BLOCK_DTYPE, sum(map(len, blocks)), blocks)


class BlockChecks:
    """Compares blocks with their checksums when they are first read.

    Attributes:
        compares_images: Whether images are compared; there may be no checksums of them.

    Args:
        files: The files of the split.
        manifest: Its manifest.
        arrays: Its arrays.
        images: Whether images are compared with their checksums. Labels and rows, which take a hundredth of the time,
            are compared in any case if there are checksums of them.
    """

    def __init__(self, files: SplitFiles, manifest: Manifest, arrays: SampleArrays, images: bool) -> None:
        self._files = files
        self._manifest = manifest
        self._arrays = arrays
        # Version 2 has no checksums of labels and rows, and those of images only in a store zarr.
        self._numbers = manifest.version == VERSION
        self.compares_images = images and (self._numbers or manifest.store == "zarr")
        self._ends = np.cumsum(blocks_of_shards(manifest))
        self._remaining = int(self._ends[-1]) if self._numbers or self.compares_images else 0
        # A store of records compares a record whenever it is read.
        self._is_unchecked = np.ones(0 if manifest.encoded else self._remaining, bool)
        self._lock = ForkLock()

    def unchecked(self, blocks: NDArray[np.int64]) -> list[int]:
        """Return which of these blocks (any order, repeats allowed) have not been checked yet."""
        return np.unique(blocks[self._is_unchecked[blocks]]).tolist() if self._remaining else []

    def check_first(self, block: int, images: Buffer) -> None:
        """Check a block unless it was checked before; see `check`."""
        if self._remaining and self._is_unchecked[block]:
            self.check(block, images)
            with self._lock:
                self._remaining -= int(self._is_unchecked[block])
                self._is_unchecked[block] = False

    def check(self, block: int, images: Buffer, describe: Callable[[int], str] | None = None) -> None:
        """Compare a block with its checksums.

        Args:
            block: Its number in the split.
            images: Its pixels, or the image file of a record.
            describe: Returns its location for a message; by default its shard and number.

        Raises:
            CorruptError: If the images, a label or a row differs from the checksum, or a label is none of the data set.
        """
        _, _, images_crc, numbers_crc = self._arrays.blocks[block].item()
        if self.compares_images and isal_zlib.crc32(images) != images_crc:
            self._refuse((describe or self.describe)(block), block, "it was changed (CRC-32 differs)")
        if not self._numbers:
            return
        start = block * self._manifest.block_size
        labels, rows = (
            array[start : start + self._manifest.block_size] for array in (self._arrays.labels, self._arrays.rows)
        )
        if numbers_crc32(labels, rows) != numbers_crc:
            self._refuse(self.describe(block, f"{LABELS} or {ROWS}"), block, "it was changed (CRC-32 differs)")
        if labels.max() >= len(self._manifest.classes):
            self._refuse(self.describe(block, LABELS), block, f"a label outside 0 .. {len(self._manifest.classes) - 1}")

    def shard_name(self, block: int) -> str:
        """Return the name of the shard that holds a block."""
        return self._manifest.shards[int(np.searchsorted(self._ends, block, side="right"))].name

    def describe(self, block: int, name: str | None = None) -> str:
        """Return the file (by default the shard) and the block, for messages."""
        return f"{self._files.directory / (name or self.shard_name(block))}: block {block_key(block)}"

    def _refuse(self, location: str, block: int, reason: str) -> None:
        for file in (self.shard_name(block), LABELS, ROWS, BLOCKS):
            mark_unchecked(self._files.directory / file)  # a remote data set is downloaded again
        raise corrupt_shard(location, reason)
