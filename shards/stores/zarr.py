"""Store of zarr arrays: blocks are decoded in parallel from the shard files and cached in memory.

zarr-python opens and checks the arrays. The blocks are read here, and tests compare them with those of zarr-python.
zarr-python spends 1.5 ms on a block of 512 EMNIST images, of which decompression takes 0.3 ms: with it two cores
decode 0.35 million images/s, with zarrs 0.7. tensorstore is as fast as this module (1.07 against 0.88 million images/s
in one run on two busy cores, random blocks of EMNIST ByMerge, median of 8). It is not used because it aborts every
process that is forked after an array was opened, as the workers of `pipeline.shard` are, and because the wheel takes
66 MB.
"""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numcodecs
import numpy as np
from numpy.typing import NDArray

from shards.errors import corrupt_shard, first_line
from shards.limits import available_cpus
from shards.manifest import BLOCKS, VERSION, Manifest
from shards.stores.base import ImageStore, ImageTable, Layout, block_key
from shards.stores.block_cache import DEFAULT_BYTES, BlockCache
from shards.stores.sample_arrays import BLOCK_DTYPE, BlockChecks, SampleArrays, blocks_of_shards
from shards.stores.split_files import SplitFiles
from shards.stores.zarr_arrays import CHECKSUM, ArrayLayout, array_layouts, open_arrays

_MAX_THREADS = 16


class ShardFile:
    """A shard of one array: blocks, and at its end the index of their byte ranges.

    Args:
        files: The files of the split.
        array: Layout of the array.
        number: Number of the shard.
        compressed: Whether the blocks are compressed.
        ranges: Offset and length of each block, int64 [blocks, 2]; None: those of the index are read and checked.

    Raises:
        CorruptError: If the file has another size or its index is damaged.
    """

    def __init__(
        self,
        files: SplitFiles,
        array: ArrayLayout,
        number: int,
        compressed: bool,
        ranges: NDArray[np.int64] | None = None,
    ) -> None:
        self._files = files
        self._name = array.shard_name(number)
        self._path = files.directory / self._name
        self._array = array
        self._compressed = compressed
        self._first = number * array.blocks_in_shard
        self.ranges = self._read_index() if ranges is None else ranges

    def _read_index(self) -> NDArray[np.int64]:
        """Return offset and length of each block, [blocks, 2]."""
        array = self._array
        length = array.index_bytes
        with self._files.open(self._name) as file:
            size = os.fstat(file.descriptor).st_size
            end = size - length  # of the blocks
            if end < 0:
                reason = f"{size:,} bytes, too few for an index of {array.blocks_in_shard:,} blocks"
                raise corrupt_shard(self._path, reason)
            content = file.read(end, length)
            try:
                index = np.frombuffer(numcodecs.CRC32C().decode(content), "<u8").reshape(-1, 2)
            except RuntimeError:
                raise corrupt_shard(self._path, "the index of its blocks was changed (CRC-32C differs)") from None
        ranges = index[: array.blocks - self._first].astype(np.int64)  # 2^64 - 1 (no block) becomes -1
        invalid = _outside(array, ranges, np.array([end]))
        if invalid.any():
            block = self._first + int(np.argmax(invalid))
            raise corrupt_shard(self.describe(block), "its byte range in the index is absent or outside the shard")
        return ranges

    def describe(self, block: int) -> str:
        """Return the file and the block, for messages."""
        return f"{self._path}: block {block_key(block)}"

    def read(self, block: int) -> NDArray:
        """Decode the samples of a block (its number in the split). Raises `CorruptError`."""
        array = self._array
        shape = (len(array.samples_of_block(block)), *array.sample)
        # Filled with ones: a block with too few bytes then has labels and rows below 0.
        values = np.full(math.prod(shape) * np.dtype(array.dtype).itemsize, 0xFF, np.uint8)
        self.read_into(block, values)
        return values.view(array.dtype).reshape(shape)

    def read_into(self, block: int, out: NDArray[np.uint8]) -> None:
        """Decode the bytes of a block's samples into a buffer, uint8 [bytes]. Raises `CorruptError`.

        If the block holds fewer bytes, the rest of the buffer is unchanged.
        """
        block_bytes = self._array.block_bytes
        offset, length = self.ranges[block - self._first].tolist()
        # The last block of the split is stored with its full length.
        content = out if len(out) == block_bytes else np.full(block_bytes, 0xFF, np.uint8)
        with self._files.open(self._name) as file:
            stored = file.read(offset, length)
            try:
                if len(stored) != length:
                    raise ValueError("the shard ends inside it")
                if self._compressed:
                    # A frame that claims to be longer than the buffer is refused before memory is allocated.
                    numcodecs.zstd.decompress(stored, content)
                elif length == block_bytes + CHECKSUM:
                    content[...] = np.frombuffer(numcodecs.CRC32C().decode(stored), np.uint8)
                else:
                    raise ValueError(f"{length:,} bytes instead of {block_bytes + CHECKSUM:,}")
            except (ValueError, RuntimeError) as error:
                raise corrupt_shard(self.describe(block), first_line(error)) from None
        if content is not out:
            out[...] = content[: len(out)]


def _outside(array: ArrayLayout, ranges: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether the byte ranges of blocks, [blocks, 2], do not end before `ends`, or are longer than a block can be."""
    offsets, lengths = ranges.T
    # A zstd frame is at most 1/256 longer than its content, plus a few bytes.
    max_length = array.block_bytes + (array.block_bytes >> 8) + 512
    return (offsets < 0) | (lengths < 0) | (lengths > max_length) | (offsets > ends - lengths)


class ZarrStore(ImageStore):
    """The `shards.stores.base.ImageStore` of zarr arrays: blocks are decoded on all cores and cached in memory.

    Args:
        directory: The directory of the split.
        manifest: Its manifest.
        memory: Maximum bytes of images to hold; by default no limit, or `DEFAULT_BYTES` if shards are fetched on
            demand.
        verify: Whether images are compared with their checksums when they are first read.

    Raises:
        CorruptError: If a file is missing or does not fit the manifest.
    """

    files: SplitFiles

    def __init__(self, directory: Path, manifest: Manifest, memory: int | None = None, verify: bool = True) -> None:
        self.manifest = manifest
        _, self._compressed = open_arrays(directory, manifest)
        self._images, *_ = array_layouts(Layout.of(manifest))
        self.files = files = SplitFiles(directory, manifest)
        files.check_present(shard.name for shard in manifest.shards)
        arrays = SampleArrays.open(files, manifest) if manifest.version == VERSION else self._read_version_2()
        self.arrays, self.labels, self.rows = arrays, arrays.labels, arrays.rows
        self._checks = BlockChecks(files, manifest, arrays, verify)
        self._ranges = np.stack([arrays.blocks[name].astype(np.int64) for name in ("offset", "bytes")], axis=1)
        ends = np.array([shard.bytes for shard in manifest.shards]) - self._images.index_bytes
        invalid = _outside(self._images, self._ranges, np.repeat(ends, blocks_of_shards(manifest)))
        if invalid.any():
            raise corrupt_shard(self._checks.describe(int(np.argmax(invalid))), f"{BLOCKS} places it outside the shard")
        if files.on_demand and memory is None:
            memory = DEFAULT_BYTES
        self._cache = BlockCache(manifest, self._read_blocks, memory)

    def _read_version_2(self) -> SampleArrays:
        """Read labels and rows, checked by their SHA-256, and the byte ranges of the blocks of images."""
        images, labels, rows = array_layouts(Layout.of(self.manifest))
        highest = len(self.manifest.classes) - 1
        shards = [ShardFile(self.files, images, number, self._compressed) for number in range(images.shards)]
        blocks = np.zeros(images.blocks, BLOCK_DTYPE)
        blocks["offset"], blocks["bytes"] = np.concatenate([shard.ranges for shard in shards]).T
        blocks["crc32"] = [crc for shard in self.manifest.shards for crc in shard.blocks_crc32]
        return SampleArrays(
            _read_all(self.files, labels, self._compressed, highest),
            _read_all(self.files, rows, self._compressed, np.iinfo(np.int64).max),
            blocks,
        )

    def gather(self, samples: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
        """Copy images into a buffer; see `ImageStore.gather`."""
        self.files.check_mapped()
        self._cache.gather(samples, out)

    def locate(self, samples: NDArray[np.int64]) -> ImageTable | None:
        """Return decoded images; see `ImageStore.locate`."""
        self.files.check_mapped()
        return self._cache.locate(samples)

    def _read_blocks(self, blocks: NDArray[np.int64], buffers: list[NDArray[np.uint8]]) -> None:
        """Decode the images of blocks; see `shards.stores.block_cache.LoadBlocks`."""
        # A pool per call: a longer-lived one would not survive a fork.
        with ThreadPoolExecutor(min(available_cpus(), len(blocks), _MAX_THREADS)) as pool:
            list(pool.map(self._read_block, blocks.tolist(), buffers))

    def _read_block(self, block: int, buffer: NDArray[np.uint8]) -> None:
        number, size = block // self._images.blocks_in_shard, self._images.blocks_in_shard
        ranges = self._ranges[number * size : (number + 1) * size]
        ShardFile(self.files, self._images, number, self._compressed, ranges).read_into(block, buffer.reshape(-1))
        self._checks.check_first(block, buffer)


def _read_all(files: SplitFiles, array: ArrayLayout, compressed: bool, highest: int) -> NDArray[np.int64]:
    """Check the SHA-256 of the shards of an array of numbers, and return all values, int64 [N].

    Raises:
        CorruptError: If a shard is damaged, or a value is not in 0 .. highest.
    """
    blocks = []
    for number in range(array.shards):
        files.check_sha256(array.shard_name(number))
        shard = ShardFile(files, array, number, compressed)
        for block in range(number * array.blocks_in_shard, min((number + 1) * array.blocks_in_shard, array.blocks)):
            values = shard.read(block)
            if values.min() < 0 or values.max() > highest:
                raise corrupt_shard(shard.describe(block), f"{array.name} outside 0 .. {highest}")
            blocks.append(values)
    return np.concatenate(blocks)
