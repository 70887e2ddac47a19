"""Tar shards of block records: the writer, and a memory-mapped reader."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shards.errors import CorruptError, corrupt_shard, first_line, quote
from shards.manifest import Manifest
from shards.stores.base import (
    INDEX_VERSION,
    Block,
    ImageStore,
    ImageTable,
    block_key,
    check_positions,
)
from shards.stores.block_cache import BlockCache
from shards.stores.record_index import check_within, index_name, read_index
from shards.stores.split_files import OpenFile, SplitFiles
from shards.stores.tar_writer import TarRecord, TarShardWriter

COMPONENTS = ("images.npy", "labels.npy", "rows.npy")


def npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """Return the header that NumPy writes before an array (.npy version 1.0, padded to 64 bytes)."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": dtype, "fortran_order": False, "shape": shape})
    return header.getvalue()


class TarWriter(TarShardWriter):
    """Writes block records."""

    with_crc = True

    def records(self, block: Block) -> Iterator[TarRecord]:
        images, labels, rows = map(np.asarray, (block.images, block.labels, block.rows))
        arrays = (images, labels.astype("<i8", copy=False), rows.astype("<i8", copy=False))
        components: list[tuple[str, list[bytes | memoryview]]] = [
            (component, [npy_header(array.dtype.str, array.shape), np.ascontiguousarray(array).data.cast("B")])
            for component, array in zip(COMPONENTS, arrays, strict=True)
        ]
        yield TarRecord(block_key(block.first // self.layout.block_size), components)


def read_block_index(content: bytes) -> NDArray[np.int64]:
    """Return byte offsets and sizes of images, labels and rows of each block, int64 [blocks, 3, 2]."""
    return read_index(content, lambda components: tuple(map(components.index, COMPONENTS)))


class TarStore(ImageStore):
    """The `ImageStore` of tar shards. Each shard is memory-mapped, so that reading an image is a memory access.

    Args:
        directory: The directory of the split.
        manifest: Its manifest.
        memory: Maximum bytes of images to hold. If the images are more, blocks are read into a cache of this size
            instead of being mapped, because touched pages of a map count as memory of the process.

    Raises:
        CorruptError: If a file is missing or does not fit the manifest.
    """

    def __init__(self, directory: Path, manifest: Manifest, memory: int | None = None) -> None:
        self.manifest = manifest
        self._files = SplitFiles(directory, manifest)
        mapped = memory is None or manifest.samples * manifest.image_bytes <= memory
        labels, rows = [], []
        # For every block: its shard, and the byte at which its first image begins.
        self._shard_of_block: list[int] = []
        self._first_image: list[int] = []
        remaining = manifest.samples
        for number, shard in enumerate(manifest.shards):
            with self._files.open(shard.name) as file:
                for components in self._read_index(number):
                    count = min(manifest.block_size, remaining)
                    remaining -= count
                    first_image, block_labels, block_rows = self._read_block_arrays(file, number, components, count)
                    self._shard_of_block.append(number)
                    self._first_image.append(first_image)
                    labels.append(block_labels)
                    rows.append(block_rows)
        self.labels = np.concatenate(labels)
        self.rows = np.concatenate(rows)
        self._cache = None if mapped else BlockCache(manifest, self._read_blocks, memory)
        if mapped:
            shards, starts = self._files.map([shard.name for shard in manifest.shards])
            # The image that would begin at each byte, [bytes, image_bytes]: one indexing call reads from all shards.
            self._table = np.lib.stride_tricks.sliding_window_view(
                np.frombuffer(shards, np.uint8), manifest.image_bytes
            )
            self._row_of_block = starts[self._shard_of_block] + np.asarray(self._first_image)

    def _read_index(self, number: int) -> list[list[tuple[int, int]]]:
        """Return offset and size of the three components of each block of a shard."""
        shard = self.manifest.shards[number]
        path = self._files.directory / index_name(shard)
        try:
            index = read_block_index(self._files.read_all(index_name(shard)))
            check_within(index, shard.bytes)
            if len(index) != len(shard.blocks_crc32):
                raise ValueError(f"{len(index):,} blocks where the manifest says {len(shard.blocks_crc32):,}")
        except (CorruptError, ValueError) as error:
            raise CorruptError(
                found=f"index {path} missing or damaged: {first_line(error)}",
                expected=f"the {INDEX_VERSION} index of {shard.name}",
                hint=f"create it again: wds2idx {quote(path.with_suffix('.tar'))} {quote(path)}",
            ) from None
        return index.tolist()

    def _read_block_arrays(
        self, file: OpenFile, number: int, components: list[tuple[int, int]], count: int
    ) -> tuple[int, NDArray[np.int64], NDArray[np.int64]]:
        """Check the three headers of a block. Returns the byte offset of its first image, its labels and its rows."""
        location = self._describe(len(self._first_image), number)
        arrays = (("|u1", (count, *self.manifest.pixel_shape)), ("<i8", (count,)), ("<i8", (count,)))
        payloads = []
        for component, (offset, length), (dtype, shape) in zip(COMPONENTS, components, arrays, strict=True):
            header = npy_header(dtype, shape)
            size = math.prod(shape) * np.dtype(dtype).itemsize
            if file.read(offset, len(header)) != header or length != len(header) + size:
                raise corrupt_shard(location, f"{component} is not the array that the manifest describes")
            payloads.append((offset + len(header), size))
        (first_image, _), *numbers = payloads
        labels, rows = (np.frombuffer(file.read(*payload), "<i8") for payload in numbers)
        if labels.min() < 0 or labels.max() >= len(self.manifest.classes):
            raise corrupt_shard(location, f"a label outside 0 .. {len(self.manifest.classes) - 1}")
        return first_image, labels, rows

    def gather(self, samples: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
        """Copy images into a buffer; see `ImageStore.gather`."""
        if self._cache is not None:
            self._cache.gather(samples, out)
            return
        assert out.flags.c_contiguous and out.shape == (len(samples), *self.manifest.image_shape)
        out.reshape(len(samples), self.manifest.image_bytes)[...] = self._table[self._rows_of_table(samples)]

    def locate(self, samples: NDArray[np.int64]) -> ImageTable | None:
        """Return images in the maps; see `ImageStore.locate`."""
        return None if self._cache is not None else ImageTable(self._table, self._rows_of_table(samples))

    def _rows_of_table(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        check_positions(samples, len(self))
        self._files.check_mapped()
        blocks, offsets = np.divmod(samples, self.manifest.block_size)
        return self._row_of_block[blocks] + offsets * self.manifest.image_bytes

    def _read_blocks(self, blocks: NDArray[np.int64], buffers: list[NDArray[np.uint8]]) -> None:
        """Read the images of blocks from disk; see `shards.stores.block_cache.LoadBlocks`."""
        for block, buffer in zip(blocks.tolist(), buffers, strict=True):
            number = self._shard_of_block[block]
            with self._files.open(self.manifest.shards[number].name) as file:
                if file.read_into(self._first_image[block], buffer) != buffer.nbytes:
                    raise corrupt_shard(self._describe(block, number), "the shard ends inside it")

    def _describe(self, block: int, number: int) -> str:
        return f"{self._files.directory / self.manifest.shards[number].name}: block {block_key(block)}"
