"""Tar shards of block records: the writer, and a reader that maps them into memory."""

from __future__ import annotations

import ctypes
import io
import mmap
import os
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from shards.errors import CorruptError, damaged, first_line
from shards.manifest import Manifest, RawFile, Shard
from shards.stores.base import INDEX_VERSION, Block, ImageTable, Layout, block_key, check_positions, shard_name
from shards.stores.block_cache import BlockCache, BlockStore
from shards.stores.record_index import read_index
from shards.stores.tar_writer import TarRecord, write_tar_shard

COMPONENTS = ("images.npy", "labels.npy", "rows.npy")


def npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """The header that NumPy writes before an array's bytes (.npy version 1.0, padded to 64 bytes)."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": dtype, "fortran_order": False, "shape": shape})
    return header.getvalue()


class TarWriter:
    """The `shards.stores.base.SplitWriter` of block records."""

    def __init__(self, directory: Path, layout: Layout) -> None:
        self._directory = directory
        self._layout = layout

    def start(self) -> tuple[RawFile, ...]:
        return ()

    def write_shard(self, number: int, blocks: Iterable[Block]) -> tuple[Shard, tuple[RawFile, ...]]:
        records = (
            TarRecord(block_key(block.first // self._layout.block_size), len(block.labels), _components(block))
            for block in blocks
        )
        shard, index = write_tar_shard(self._directory / shard_name(number), records, with_crc=True)
        return shard, (index,)


def _components(block: Block) -> list[tuple[str, list[bytes | memoryview]]]:
    arrays = (block.images, block.labels.astype("<i8", copy=False), block.rows.astype("<i8", copy=False))
    contents = []
    for array in map(np.ascontiguousarray, arrays):
        contents.append([npy_header(array.dtype.str, array.shape), memoryview(array).cast("B")])
    return list(zip(COMPONENTS, contents, strict=True))


def read_block_index(content: bytes) -> NDArray[np.int64]:
    """Byte offsets and sizes of images, labels and rows of each block, int64 [blocks, 3, 2]; see `read_index`."""
    return read_index(content, lambda found: tuple(map(found.index, COMPONENTS)))


class TarStore(BlockStore):
    """The `Store` over tar shards: each is mapped into memory, so an image is an address, not a read.

    memory: most bytes of images to hold. Where the images are more, blocks are read into a cache of that size instead
    of being mapped, so that the process stays within the bound whatever it touches.
    """

    def __init__(self, directory: Path, manifest: Manifest, memory: int | None = None) -> None:
        self.manifest = manifest
        self._paths = [directory / shard.name for shard in manifest.shards]
        mapped = memory is None or manifest.samples * manifest.image_bytes <= memory
        opened = [
            (_map if mapped else _Bytes)(path, shard) for path, shard in zip(self._paths, manifest.shards, strict=True)
        ]
        # Only now that the files are known to be as large as the manifest says is anything allocated by its numbers.
        self.labels = np.empty(manifest.samples, np.int64)
        self.rows = np.empty(manifest.samples, np.int64)
        # For every block: its shard, and the byte at which its first image begins.
        self._shard_of_block: list[int] = []
        self._first_image: list[int] = []
        self._cache = None if mapped else BlockCache(manifest, self._read_blocks, memory)
        start = 0
        for number, (shard, data) in enumerate(zip(manifest.shards, opened, strict=True)):
            for places in self._read_index(self._paths[number].with_suffix(".idx"), shard):
                start = self._add_block(number, places, data, start)
        if mapped:
            self._maps = opened
            self._table, starts = _images_at_every_byte(self._maps, manifest.image_bytes)
            self._row_of_block = starts[self._shard_of_block] + np.asarray(self._first_image)

    def _read_index(self, path: Path, shard: Shard) -> list[list[tuple[int, int]]]:
        """Offset and size of the three components of each block of a shard."""
        try:
            places = read_block_index(path.read_bytes())
        except (OSError, ValueError) as error:
            raise CorruptError(
                found=f"index {path} missing or damaged: {first_line(error)}",
                expected=f"the {INDEX_VERSION} index of {shard.name}",
                hint=f"make it anew: wds2idx {path.with_suffix('.tar')} {path}",
            ) from None
        offsets, sizes = places[..., 0], places[..., 1]
        inside = offsets.min() >= 0 and sizes.min() >= 0 and (offsets <= shard.bytes - sizes).all()
        if len(places) != len(shard.blocks_crc32) or not inside:
            raise damaged(path, f"an index that does not fit {shard.name}")
        return places.tolist()

    def _add_block(
        self, number: int, places: list[tuple[int, int]], data: NDArray[np.uint8] | _Bytes, start: int
    ) -> int:
        """Check a block's three headers, take in its labels and rows, and return the next sample's number."""
        count = min(self.manifest.block_size, self.manifest.samples - start)
        shapes = ((count, *self.manifest.image_shape), (count,), (count,))
        here = f"{self._paths[number]}: block {block_key(len(self._first_image))}"
        payloads = []
        for component, (offset, length), dtype, shape in zip(
            COMPONENTS, places, ("|u1", "<i8", "<i8"), shapes, strict=True
        ):
            header = npy_header(dtype, shape)
            payload = offset + len(header)
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            if data[offset:payload].tobytes() != header or length != len(header) + size:
                raise damaged(here, f"{component} is not the array that the manifest tells of")
            payloads.append((payload, size))
        (images, _), (labels, size), (rows, _) = payloads
        stop = start + count
        self.labels[start:stop] = data[labels : labels + size].view("<i8")
        self.rows[start:stop] = data[rows : rows + size].view("<i8")
        found = self.labels[start:stop]
        if found.min() < 0 or found.max() >= len(self.manifest.classes):
            raise damaged(here, f"a label outside 0 .. {len(self.manifest.classes) - 1}")
        self._shard_of_block.append(number)
        self._first_image.append(images)
        return stop

    def gather(self, samples: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
        """Copy images into the caller's buffer; see `ImageStore.gather`."""
        if self._cache is not None:
            self._cache.gather(samples, out)
            return
        assert out.flags.c_contiguous and out.shape == (len(samples), *self.manifest.image_shape)
        out.reshape(len(samples), self.manifest.image_bytes)[...] = self._table[self._rows_of_table(samples)]

    def locate(self, samples: NDArray[np.int64]) -> ImageTable | None:
        """Images in the maps; see `ImageStore.locate`."""
        return None if self._cache is not None else ImageTable(self._table, self._rows_of_table(samples))

    def _rows_of_table(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        check_positions(samples, len(self))
        blocks, within = np.divmod(samples, self.manifest.block_size)
        return self._row_of_block[blocks] + within * self.manifest.image_bytes

    def _read_blocks(self, blocks: NDArray[np.int64], buffers: list[NDArray[np.uint8]]) -> None:
        """Read the images of whole blocks from the disk; see `shards.stores.block_cache.LoadBlocks`."""
        for block, buffer in zip(blocks, buffers, strict=True):
            shard = self._shard_of_block[block]
            path = self._paths[shard]
            try:
                with open(path, "rb", buffering=0) as file:
                    file.seek(self._first_image[block])
                    read = file.readinto(memoryview(buffer).cast("B"))
            except OSError as error:
                raise damaged(path, error.strerror or str(error)) from None
            if read != buffer.nbytes:
                raise damaged(f"{path}: block {block_key(block)}", "the shard ends inside it")


def _open(path: Path, shard: Shard) -> BinaryIO:
    """Open a shard. Raises `UserError` if it is missing or has another size."""
    if not path.is_file():
        raise damaged(path, "no such shard, though the manifest names it")
    file = open(path, "rb", buffering=0)
    size = os.fstat(file.fileno()).st_size
    if size != shard.bytes:
        file.close()
        raise damaged(path, f"{size:,} bytes where the manifest says {shard.bytes:,}")
    return file


def _map(path: Path, shard: Shard) -> NDArray[np.uint8]:
    """Map a shard read-only: uint8 [bytes]."""
    with _open(path, shard) as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


class _Bytes:
    """The bytes of a shard like those of `_map`, but read when asked for: pages of a map that were touched count as
    memory of the process."""

    def __init__(self, path: Path, shard: Shard) -> None:
        self._file = _open(path, shard)
        self._size = shard.bytes

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, place: slice) -> NDArray[np.uint8]:
        self._file.seek(place.start)
        return np.frombuffer(self._file.read(place.stop - place.start), np.uint8)


def _images_at_every_byte(
    maps: list[NDArray[np.uint8]], image_bytes: int
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """One view over all maps, so that a single indexing call gathers from all of them.

    Returns uint8 [bytes, image_bytes], the image that would begin at each byte from the lowest mapped address to the
    highest, and int64 [maps], where in it each map begins. What lies between the maps is not ours to read: callers
    index only what lies inside one, and keep the maps.
    """
    addresses = np.array([data.__array_interface__["data"][0] for data in maps])
    start = int(addresses.min())
    end = max(int(address) + len(data) for address, data in zip(addresses, maps, strict=True))
    everything = np.ctypeslib.as_array((ctypes.c_uint8 * (end - start)).from_address(start))
    return np.lib.stride_tricks.sliding_window_view(everything, image_bytes), addresses - start
