"""Tar shards of block records: the writer, and a memory-mapped reader."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shards.errors import CorruptError, corrupt_shard, quote
from shards.manifest import BLOCKS, VERSION, Manifest
from shards.stores.base import INDEX_VERSION, Block, ImageStore, ImageTable, block_key, check_positions
from shards.stores.block_cache import DEFAULT_BYTES, BlockCache
from shards.stores.record_index import check_within, index_name, read_index
from shards.stores.sample_arrays import BLOCK_DTYPE, BlockChecks, SampleArrays, blocks_of_shards, npy_header
from shards.stores.split_files import OpenFile, SplitFiles, read_ahead
from shards.stores.tar_writer import TarRecord, TarShardWriter

COMPONENTS = ("images.npy", "labels.npy", "rows.npy")
MAX_MAPPED_FILES = 1 << 14  # of a split; Linux allows 65,530 maps per process (vm.max_map_count)


class TarWriter(TarShardWriter):
    """Writes block records."""

    def records(self, block: Block) -> Iterator[TarRecord]:
        images, labels, rows = map(np.asarray, (block.images, block.labels, block.rows))
        arrays = (images, labels.astype("<i8", copy=False), rows.astype("<i8", copy=False))
        components: list[tuple[str, list[bytes | memoryview]]] = [
            (component, [npy_header(array.dtype.str, array.shape), np.ascontiguousarray(array).data.cast("B")])
            for component, array in zip(COMPONENTS, arrays, strict=True)
        ]
        yield TarRecord(block_key(block.first // self.layout.block_size), components, labels, rows)


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
        verify: Whether images are compared with their checksums when they are first read.

    Raises:
        CorruptError: If a file is missing or does not fit the manifest.
    """

    files: SplitFiles

    def __init__(self, directory: Path, manifest: Manifest, memory: int | None = None, verify: bool = True) -> None:
        self.manifest = manifest
        self.files = files = SplitFiles(directory, manifest)
        mapped = memory is None or manifest.samples * manifest.image_bytes <= memory
        mapped &= len(manifest.shards) <= MAX_MAPPED_FILES and files.on_demand is None
        arrays = SampleArrays.open(files, manifest) if manifest.version == VERSION else self._read_version_2()
        self.arrays, self.labels, self.rows = arrays, arrays.labels, arrays.rows
        self._checks = BlockChecks(files, manifest, arrays, verify)
        counts = blocks_of_shards(manifest)
        self._shard_of_block = np.repeat(np.arange(len(counts)), counts)
        self._first_image = arrays.blocks["offset"].astype(np.int64)
        self._check_ranges(arrays.blocks["bytes"])
        self._cache = None
        names = [shard.name for shard in manifest.shards]
        if mapped:
            self._map, starts = files.map(names)
            self._bytes = np.frombuffer(self._map, np.uint8)
            # The image that would begin at each byte, [bytes, image_bytes]: one indexing call reads from all shards.
            self._table = np.lib.stride_tricks.sliding_window_view(self._bytes, manifest.image_bytes)
            self._row_of_block = starts[self._shard_of_block] + self._first_image
        else:
            files.check_present(names)
            self._cache = BlockCache(manifest, self._read_blocks, DEFAULT_BYTES if memory is None else memory)

    def _check_ranges(self, sizes: NDArray[np.uint32]) -> None:
        """Raise CorruptError unless each block has the pixels of its samples, within its shard."""
        manifest = self.manifest
        # All blocks of a shard but the last are full, and only the last shard of a split ends inside a block.
        expected = np.full(len(sizes), manifest.block_size * manifest.image_bytes)
        expected[-1] -= -manifest.samples % manifest.block_size * manifest.image_bytes
        ends = np.array([shard.bytes for shard in manifest.shards])[self._shard_of_block] - expected
        invalid = (sizes != expected) | (self._first_image < 0) | (self._first_image > ends)
        if invalid.any():
            block = int(np.argmax(invalid))
            raise corrupt_shard(self._checks.describe(block), f"{BLOCKS} places it outside the shard")

    def _read_version_2(self) -> SampleArrays:
        """Read offsets, labels and rows from the shards and their indices."""
        labels, rows = [], []
        blocks: list[tuple[int, int, int, int]] = []
        remaining = self.manifest.samples
        for number, shard in enumerate(self.manifest.shards):
            with self.files.open(shard.name) as file:
                for components in self._read_index(number):
                    count = min(self.manifest.block_size, remaining)
                    remaining -= count
                    location = f"{self.files.directory / shard.name}: block {block_key(len(blocks))}"
                    first_image, *numbers = self._read_block_arrays(file, location, components, count)
                    blocks.append((first_image, count * self.manifest.image_bytes, 0, 0))
                    labels.append(numbers[0])
                    rows.append(numbers[1])
        return SampleArrays(np.concatenate(labels), np.concatenate(rows), np.array(blocks, BLOCK_DTYPE))

    def _read_index(self, number: int) -> list[list[tuple[int, int]]]:
        """Return offset and size of the three components of each block of a shard."""
        shard = self.manifest.shards[number]
        path = self.files.directory / index_name(shard)
        try:
            index = read_block_index(self.files.read_all(index_name(shard)))
            check_within(index, shard.bytes)
            if len(index) != len(shard.blocks_crc32):
                raise ValueError(f"{len(index):,} blocks where the manifest says {len(shard.blocks_crc32):,}")
        except (CorruptError, ValueError) as error:
            reason = error.found if isinstance(error, CorruptError) else f"{path}: {error}"
            raise CorruptError(
                found=f"index missing or damaged: {reason}",
                expected=f"the {INDEX_VERSION} index of {shard.name}",
                hint=f"create it again: wds2idx {quote(path.with_suffix('.tar'))} {quote(path)}",
            ) from None
        return index.tolist()

    def _read_block_arrays(
        self, file: OpenFile, location: str, components: list[tuple[int, int]], count: int
    ) -> tuple[int, NDArray[np.int64], NDArray[np.int64]]:
        """Check the three headers of a block. Returns the byte offset of its first image, its labels and its rows."""
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
            self.files.check_mapped()
            self._cache.gather(samples, out)
            return
        assert out.flags.c_contiguous and out.shape == (len(samples), *self.manifest.image_shape)
        out.reshape(len(samples), self.manifest.image_bytes)[...] = self._table[self._rows_of_table(samples)]

    def locate(self, samples: NDArray[np.int64]) -> ImageTable | None:
        """Return images in the maps; see `ImageStore.locate`."""
        return None if self._cache is not None else ImageTable(self._table, self._rows_of_table(samples))

    def _rows_of_table(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        check_positions(samples, len(self))
        self.files.check_mapped()
        blocks, offsets = np.divmod(samples, self.manifest.block_size)
        if unchecked := self._checks.unchecked(blocks):
            starts, sizes = self._row_of_block[unchecked].tolist(), self.arrays.blocks["bytes"][unchecked].tolist()
            if self._checks.compares_images:
                for start, size in zip(starts, sizes, strict=True):
                    read_ahead(self._map, start, size)
            for block, start, size in zip(unchecked, starts, sizes, strict=True):
                self._checks.check_first(block, self._bytes[start : start + size])
        return self._row_of_block[blocks] + offsets * self.manifest.image_bytes

    def _read_blocks(self, blocks: NDArray[np.int64], buffers: list[NDArray[np.uint8]]) -> None:
        """Read the images of blocks from disk; see `shards.stores.block_cache.LoadBlocks`."""
        for block, buffer in zip(blocks.tolist(), buffers, strict=True):
            with self.files.open(self.manifest.shards[self._shard_of_block[block]].name) as file:
                if file.read_into(self._first_image[block], buffer) != buffer.nbytes:
                    raise corrupt_shard(self._checks.describe(block), "the shard ends inside it")
            self._checks.check_first(block, buffer)
