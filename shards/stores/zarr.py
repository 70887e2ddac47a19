"""Zarr arrays as a store: blocks are decoded in parallel, straight from the shard files, and cached in memory.

zarr-python opens and checks the arrays; the blocks are read here, and tests compare them with what zarr-python reads.
zarr-python spends 1.5 ms on a block of 512 EMNIST images, of which decompression takes 0.3 ms: with it two cores
decode 0.35 million images/s, with zarrs 0.7. tensorstore is as fast as this module (1.07 against 0.88 million images/s
in one run on two busy cores, random blocks of EMNIST ByMerge, median of 8). It is not used because it aborts every
process that is forked after an array was opened, as the workers of `pipeline.shard` are, and because the wheel takes
66 MB.
"""

from __future__ import annotations

import hashlib
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numcodecs
import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray

from shards.cpus import available_cpus
from shards.errors import damaged, first_line
from shards.manifest import Manifest
from shards.stores.base import ImageTable, block_key
from shards.stores.block_cache import BlockCache, BlockStore
from shards.stores.zarr_arrays import ArrayCut, cut_of, open_arrays

_INDEX_ENTRY = 16  # offset and length of a block in its shard, uint64 each
_CHECKSUM = 4  # CRC-32C, of an index and of a block that is not compressed
_MOST_THREADS = 16


class ShardFile:
    """A shard of one array: whole blocks, and at the end the index that tells where each of them lies.

    size: its bytes, as the manifest says. Raises `UserError` if it has another size or its index was changed.
    """

    def __init__(self, directory: Path, array: ArrayCut, number: int, size: int, compressed: bool) -> None:
        self._path = directory / array.shard_name(number)
        self._array = array
        self._compressed = compressed
        self._first = number * array.blocks_in_shard
        self._places = self._read_index(size)

    def _read_index(self, size: int) -> NDArray[np.int64]:
        """[blocks, 2], offset and length of each block."""
        array = self._array
        length = array.blocks_in_shard * _INDEX_ENTRY + _CHECKSUM
        end = size - length  # of the blocks
        if not self._path.is_file():
            raise damaged(self._path, "no such shard, though the manifest names it")
        with open(self._path, "rb", buffering=0) as file:
            if (found := os.fstat(file.fileno()).st_size) != size:
                raise damaged(self._path, f"{found:,} bytes where the manifest says {size:,}")
            if end < 0:
                raise damaged(self._path, f"{size:,} bytes, too few for an index of {array.blocks_in_shard:,} blocks")
            file.seek(end)
            content = file.read(length)
        try:
            index = np.frombuffer(numcodecs.CRC32C().decode(content), "<u8").reshape(-1, 2)
        except RuntimeError:
            raise damaged(self._path, "the index of its blocks was changed (CRC-32C differs)") from None
        places = index[: array.blocks - self._first].astype(np.int64)  # 2^64 - 1, no block, becomes -1
        offsets, lengths = places.T
        # A zstd frame is longer than its content by 1/256 at most, but for a few bytes.
        most = array.block_bytes + (array.block_bytes >> 8) + 512
        wrong = (offsets < 0) | (lengths < 0) | (lengths > most) | (offsets > end - lengths)
        if wrong.any():
            block = self._first + int(np.argmax(wrong))
            raise damaged(self.place(block), "the index places it outside the shard, or nowhere")
        return places

    def place(self, block: int) -> str:
        """File and block, for a message."""
        return f"{self._path}: block {block_key(block)}"

    def read(self, block: int) -> NDArray:
        """Decode the samples of a block (its number in the part). Raises `UserError`."""
        array = self._array
        shape = (len(array.samples_of_block(block)), *array.sample)
        values = np.full(math.prod(shape) * np.dtype(array.dtype).itemsize, 0xFF, np.uint8)  # which are numbers below 0
        self.read_into(block, values)
        return values.view(array.dtype).reshape(shape)

    def read_into(self, block: int, out: NDArray[np.uint8]) -> None:
        """Decode the bytes of a block's samples into a buffer, uint8 [bytes]. Raises `UserError`.

        Of a block that holds fewer bytes than it should, the rest of the buffer stays as it was.
        """
        whole = self._array.block_bytes
        offset, length = self._places[block - self._first]
        stored = np.empty(length, np.uint8)
        try:
            with open(self._path, "rb", buffering=0) as file:
                file.seek(offset)
                if file.readinto(memoryview(stored)) != length:
                    raise ValueError("the shard ends inside it")
            # The last block of the split is stored at its full length.
            content = out if len(out) == whole else np.full(whole, 0xFF, np.uint8)
            if self._compressed:
                # Into a buffer: so a frame that claims to be longer is refused before memory is taken for it.
                numcodecs.zstd.decompress(stored, content)
            elif length == whole + _CHECKSUM:
                content[...] = numcodecs.CRC32C().decode(stored)
            else:
                raise ValueError(f"{length:,} bytes instead of {whole + _CHECKSUM:,}")
        except (OSError, ValueError, RuntimeError) as error:
            raise damaged(self.place(block), first_line(error)) from None
        if content is not out:
            out[...] = content[: len(out)]


def open_shards(directory: Path, manifest: Manifest, array: ArrayCut, compressed: bool) -> list[ShardFile]:
    """The shards of an array, in order; those of labels and rows are checked by their SHA-256. Raises `UserError`."""
    named = {file.name: file for file in manifest.everything}
    shards = []
    for number in range(array.shards):
        expected = named[array.shard_name(number)]
        shards.append(ShardFile(directory, array, number, expected.bytes, compressed))
        if array.name != "images":
            path = directory / expected.name
            with open(path, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != expected.sha256:
                    raise damaged(path, "it was changed (SHA-256 differs)")
    return shards


class ZarrStore(BlockStore):
    """The `shards.stores.base.ImageStore` over zarr arrays: whole blocks are decoded, on all cores, and kept in memory.

    memory: most bytes of images to hold, None for no bound. Labels and rows are read at once. What is read is checked:
    labels and rows by their SHA-256, images by the CRC-32 of each block.
    """

    def __init__(self, directory: Path, manifest: Manifest, memory: int | None = None) -> None:
        self.manifest = manifest
        compressed = open_arrays(directory, manifest).compressed
        images, labels, rows = cut_of(manifest)
        self.labels = _numbers(open_shards(directory, manifest, labels, compressed), labels, len(manifest.classes) - 1)
        self.rows = _numbers(open_shards(directory, manifest, rows, compressed), rows, np.iinfo(np.int64).max)
        self._shards = open_shards(directory, manifest, images, compressed)
        self._blocks_in_shard = images.blocks_in_shard
        self._crcs = [crc for shard in manifest.shards for crc in shard.blocks_crc32]
        self._cache = BlockCache(manifest, self._read_blocks, memory)

    def gather(self, samples: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
        """Copy images into the caller's buffer; see `ImageStore.gather`."""
        self._cache.gather(samples, out)

    def locate(self, samples: NDArray[np.int64]) -> ImageTable | None:
        """Images among those decoded; see `ImageStore.locate`."""
        return self._cache.locate(samples)

    def _read_blocks(self, blocks: NDArray[np.int64], buffers: list[NDArray[np.uint8]]) -> None:
        """Decode the images of whole blocks; see `shards.stores.block_cache.LoadBlocks`."""
        threads = min(available_cpus(), len(blocks), _MOST_THREADS)
        # Threads of this call alone: a pool that outlives it would not survive a fork.
        with ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(self._read_block, blocks.tolist(), buffers):
                pass

    def _read_block(self, block: int, buffer: NDArray[np.uint8]) -> None:
        shard = self._shards[block // self._blocks_in_shard]
        shard.read_into(block, buffer.reshape(-1))
        if isal_zlib.crc32(buffer) != self._crcs[block]:
            raise damaged(shard.place(block), "it was changed (CRC-32 differs)")


def _numbers(shards: list[ShardFile], array: ArrayCut, most: int) -> NDArray[np.int64]:
    """The whole of an array of numbers, int64 [N]. Raises `UserError` unless they are 0 .. most."""
    parts = []
    for block in range(array.blocks):
        shard = shards[block // array.blocks_in_shard]
        numbers = shard.read(block)
        if numbers.min() < 0 or numbers.max() > most:
            raise damaged(shard.place(block), f"{array.name} outside 0 .. {most}")
        parts.append(numbers)
    return np.concatenate(parts)
