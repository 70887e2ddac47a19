"""Tar shards of block records: the writer, and a reader that maps them into memory."""

from __future__ import annotations

import ctypes
import hashlib
import io
import mmap
import os
import tarfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from shards.atomic import write_file
from shards.errors import UserError, damaged
from shards.manifest import Manifest, RawFile, Shard
from shards.stores.base import INDEX_VERSION, Block, Layout, Located, block_key, shard_name
from shards.stores.block_cache import BlockCache

COMPONENTS = ("images.npy", "labels.npy", "rows.npy")
_TAR_BLOCK = 512
_END_OF_ARCHIVE = bytes(2 * _TAR_BLOCK)


def npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """The header that NumPy writes before an array's bytes (.npy version 1.0, padded to 64 bytes)."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": dtype, "fortran_order": False, "shape": shape})
    return header.getvalue()


def _member(name: str, header: bytes, array: NDArray) -> tuple[list[bytes | memoryview], int]:
    """The pieces of a tar member that holds an array as .npy, and their length in bytes."""
    info = tarfile.TarInfo(name)
    info.size = len(header) + array.nbytes
    info.mode = 0o444
    padding = bytes(-info.size % _TAR_BLOCK)
    pieces = [info.tobuf(tarfile.USTAR_FORMAT), header, memoryview(array).cast("B"), padding]
    return pieces, _TAR_BLOCK + info.size + len(padding)


class ShardWriter:
    """Writes one tar shard and, beside it, the index that DALI's `wds2idx` would write.

    `with ShardWriter(directory, number) as writer: writer.add(...)`, then `writer.entry` and `writer.index` are what
    the manifest tells of the two files.
    """

    entry: Shard
    index: RawFile

    def __init__(self, directory: Path, number: int) -> None:
        self._path = directory / shard_name(number)
        self._sha256 = hashlib.sha256()
        self._offset = 0
        self._samples = 0
        self._crcs: list[int] = []
        self._index: list[str] = []

    def __enter__(self) -> ShardWriter:
        self._file = open(self._path, "wb")
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._file.close()

    def add(self, number: int, images: NDArray[np.uint8], labels: NDArray[np.int64], rows: NDArray[np.int64]) -> None:
        """Append block `number`: images uint8 [n, H, W, C], labels and source rows int64 [n]."""
        crc = 0
        line = []
        arrays = (images, labels.astype("<i8", copy=False), rows.astype("<i8", copy=False))
        for component, array in zip(COMPONENTS, arrays, strict=True):
            array = np.ascontiguousarray(array)
            header = npy_header(array.dtype.str, array.shape)
            name = f"{block_key(number)}.{component}"
            pieces, length = _member(name, header, array)
            line.append(f"{component} {self._offset + _TAR_BLOCK} {len(header) + array.nbytes} {name}")
            for piece in pieces:
                crc = zlib.crc32(piece, crc)
                self._write(piece)
            self._offset += length
        self._crcs.append(crc)
        self._index.append(" ".join(line))
        self._samples += len(labels)

    def _write(self, piece: bytes | memoryview) -> None:
        self._sha256.update(piece)
        self._file.write(piece)

    def _finish(self) -> None:
        self._write(_END_OF_ARCHIVE)
        self._file.flush()
        os.fsync(self._file.fileno())
        lines = "\n".join([f"{INDEX_VERSION} {len(self._index)}", *self._index, ""]).encode()
        index = self._path.with_suffix(".idx")
        write_file(index, lines)
        self.index = RawFile(name=index.name, bytes=len(lines), sha256=hashlib.sha256(lines).hexdigest())
        self.entry = Shard(
            name=self._path.name,
            samples=self._samples,
            bytes=self._offset + len(_END_OF_ARCHIVE),
            sha256=self._sha256.hexdigest(),
            blocks_crc32=tuple(self._crcs),
        )


class TarWriter:
    """The `shards.stores.base.SplitWriter` of block records."""

    def __init__(self, directory: Path, layout: Layout) -> None:
        self._directory = directory
        self._layout = layout

    def start(self) -> tuple[RawFile, ...]:
        return ()

    def write_shard(self, number: int, blocks: Iterable[Block]) -> tuple[Shard, tuple[RawFile, ...]]:
        with ShardWriter(self._directory, number) as writer:
            for block in blocks:
                writer.add(block.first // self._layout.block_size, block.images, block.labels, block.rows)
        return writer.entry, (writer.index,)


@dataclass(frozen=True)
class Component:
    """Where a component of a block lies in its shard: byte offset and size of the .npy file."""

    offset: int
    size: int


def read_index(path: Path) -> list[dict[str, Component]]:
    """Read a `.idx` file: for each block, its components by name. Raises `UserError` if it is damaged."""
    try:
        first, *lines = path.read_text().splitlines()
        version, count = first.split()
        if version != INDEX_VERSION or int(count) != len(lines):
            raise ValueError(f"first line {first!r} above {len(lines)} blocks")
        blocks = []
        for line in lines:
            words = line.split()
            blocks.append(
                {words[i]: Component(offset=int(words[i + 1]), size=int(words[i + 2])) for i in range(0, len(words), 4)}
            )
        return blocks
    except (OSError, ValueError, IndexError) as error:
        raise UserError(
            found=f"index {path} missing or damaged: {error}",
            expected=f"the {INDEX_VERSION} index of {path.with_suffix('.tar').name}",
            hint=f"make it anew: wds2idx {path.with_suffix('.tar')} {path}",
        ) from None


class TarStore:
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
            for block in self._blocks(directory, shard, data):
                start = self._add_block(number, block, data, shard, start)
        if mapped:
            self._maps = opened
            self._table, starts = _images_at_every_byte(self._maps, manifest.image_bytes)
            self._row_of_block = starts[self._shard_of_block] + np.asarray(self._first_image)

    def _blocks(self, directory: Path, shard: Shard, data: NDArray[np.uint8] | _Bytes) -> list[dict[str, Component]]:
        index = (directory / shard.name).with_suffix(".idx")
        blocks = read_index(index)
        fits = all(
            set(COMPONENTS) <= set(block)
            and all(0 <= part.offset <= part.offset + part.size <= len(data) for part in block.values())
            for block in blocks
        )
        if len(blocks) != len(shard.blocks_crc32) or not fits:
            raise damaged(index, f"an index that does not fit {shard.name}")
        return blocks

    def _add_block(
        self, number: int, block: dict[str, Component], data: NDArray[np.uint8] | _Bytes, shard: Shard, start: int
    ) -> int:
        """Check a block's three headers, take in its labels and rows, and return the next sample's number."""
        count = min(self.manifest.block_size, self.manifest.samples - start)
        shapes = ((count, *self.manifest.image_shape), (count,), (count,))
        payloads = []
        for component, dtype, shape in zip(COMPONENTS, ("|u1", "<i8", "<i8"), shapes, strict=True):
            header = npy_header(dtype, shape)
            place = block[component]
            payload = place.offset + len(header)
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            if data[place.offset : payload].tobytes() != header or place.size != len(header) + size:
                key = block_key(len(self._first_image))
                raise damaged(
                    f"{self._paths[number]}: block {key}", f"{component} is not the array that the manifest tells of"
                )
            payloads.append((payload, size))
        (images, _), (labels, size), (rows, _) = payloads
        stop = start + count
        self.labels[start:stop] = data[labels : labels + size].view("<i8")
        self.rows[start:stop] = data[rows : rows + size].view("<i8")
        taken = self.labels[start:stop]
        if taken.min() < 0 or taken.max() >= len(self.manifest.classes):
            key = block_key(len(self._first_image))
            raise damaged(
                f"{self._paths[number]}: block {key}", f"a label outside 0 .. {len(self.manifest.classes) - 1}"
            )
        self._shard_of_block.append(number)
        self._first_image.append(images)
        return stop

    def __len__(self) -> int:
        return self.manifest.samples

    def read(self, samples: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Images uint8 [n, H, W, C]; see `Store.read`."""
        images = np.empty((len(samples), *self.manifest.image_shape), np.uint8)
        self.gather(samples, images)
        return images

    def gather(self, samples: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
        """Copy images into the caller's buffer; see `ImageStore.gather`."""
        if self._cache is not None:
            self._cache.gather(samples, out)
            return
        assert out.flags.c_contiguous and out.shape == (len(samples), *self.manifest.image_shape)
        out.reshape(len(samples), self.manifest.image_bytes)[...] = self._table[self._rows_of_table(samples)]

    def locate(self, samples: NDArray[np.int64]) -> Located | None:
        """Images in the maps; see `ImageStore.locate`."""
        return None if self._cache is not None else Located(self._table, self._rows_of_table(samples))

    def _rows_of_table(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        if len(samples) and (samples.min() < 0 or samples.max() >= len(self)):
            raise IndexError(f"samples {samples.min()} .. {samples.max()} outside 0 .. {len(self) - 1}")
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
