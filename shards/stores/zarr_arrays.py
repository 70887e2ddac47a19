"""Zarr v3 arrays in shards of blocks, by zarr-python: how a split is cut into them, their writer, their metadata."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import zarr
from isal import isal_zlib  # CRC-32 more than ten times as fast as zlib's
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, ShardingCodec, ZstdCodec
from zarr.storage import MemoryStore

from shards.atomic import sync_directory
from shards.errors import damaged, first_line
from shards.manifest import MANIFEST_NAME, Manifest, RawFile, Shard
from shards.stores.base import Block, Layout

GROUP = "samples.zarr"
_METADATA = "zarr.json"
_CHECKED = ("shape", "data_type", "chunk_grid", "chunk_key_encoding", "fill_value", "codecs", "storage_transformers")
_MOST_METADATA = 1 << 20  # bytes; ours have about a thousand
# EMNIST takes 0.325 of its raw pixels at level 3, and 0.310 at level 9, which is three times as slow to write.
_ZSTD_LEVEL = 3


class ArrayCut(NamedTuple):
    """One array of a split, and how it is cut.

    samples: N; sample: shape of one sample; shard: samples of a shard, a whole number of blocks; block: of a block.
    """

    name: str
    dtype: str
    samples: int
    sample: tuple[int, ...]
    shard: int
    block: int

    @property
    def metadata_name(self) -> str:
        return f"{GROUP}/{self.name}/{_METADATA}"

    def shard_name(self, number: int) -> str:
        """Where in the split a shard lies, by the chunk key encoding that zarr v3 calls `default`."""
        return f"{GROUP}/{self.name}/c/{number}" + "/0" * len(self.sample)

    @property
    def shards(self) -> int:
        return -(-self.samples // self.shard)

    @property
    def blocks(self) -> int:
        return -(-self.samples // self.block)

    @property
    def blocks_in_shard(self) -> int:
        return self.shard // self.block

    @property
    def block_bytes(self) -> int:
        """Bytes of a whole block, as it is stored (the last one too) before compression."""
        return self.block * math.prod(self.sample) * np.dtype(self.dtype).itemsize

    def samples_of_block(self, number: int) -> range:
        return range(number * self.block, min((number + 1) * self.block, self.samples))


def _cut(
    samples: int, image_shape: tuple[int | None, int | None, int], block_size: int, shard_size: int
) -> tuple[ArrayCut, ArrayCut, ArrayCut]:
    """Images, labels and rows. A split that is smaller than a block or a shard is cut into one no larger than it."""
    height, width, channels = image_shape
    assert height and width, "encoded images have no one size"
    block = min(block_size, samples)
    shard = -(-min(shard_size, samples) // block) * block
    return (
        ArrayCut("images", "|u1", samples, (height, width, channels), shard, block),
        ArrayCut("labels", "<i8", samples, (), shard, block),
        ArrayCut("rows", "<i8", samples, (), shard, block),
    )


def cut_of(manifest: Manifest) -> tuple[ArrayCut, ArrayCut, ArrayCut]:
    """The arrays images, labels and rows of a split, as its manifest has them cut."""
    return _cut(manifest.samples, manifest.image_shape, manifest.block_size, manifest.shards[0].samples)


class ZarrWriter:
    """The `shards.stores.base.SplitWriter` of zarr arrays: shard file i of each array holds the samples of shard i.

    compression: `zstd` or `none`.
    """

    def __init__(self, directory: Path, layout: Layout, compression: str) -> None:
        self._directory = directory
        self._layout = layout
        self._arrays = _cut(layout.samples, layout.image_shape, layout.block_size, layout.shard_size)
        # With checksums, so that whoever reads a block knows whether it was changed.
        self._compressor = ZstdCodec(level=_ZSTD_LEVEL, checksum=True) if compression == "zstd" else Crc32cCodec()

    def start(self) -> tuple[RawFile, ...]:
        """Write the metadata of the group and of its arrays."""
        files: dict = {}
        group = zarr.create_group(MemoryStore(files))
        for array in self._arrays:
            _create_array(group, array, self._compressor)
        written = []
        for key, content in sorted(files.items()):
            path = self._directory / GROUP / key
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.to_bytes())  # several ranks may do so at once, all with the same bytes
            written.append(_sync(self._directory, f"{GROUP}/{key}"))
        _sync_directories(self._directory, [file.name for file in written])
        return tuple(written)

    def write_shard(self, number: int, blocks: Iterable[Block]) -> tuple[Shard, tuple[RawFile, ...]]:
        """See `SplitWriter`. Holds the samples of the shard in memory."""
        samples = self._layout.samples_of(number)
        images, labels, rows = (np.empty((len(samples), *array.sample), array.dtype) for array in self._arrays)
        crcs = []
        end = 0
        for block in blocks:
            start, end = end, end + len(block.labels)
            assert block.first == samples.start + start and isinstance(block.images, np.ndarray)
            images[start:end], labels[start:end], rows[start:end] = block.images, block.labels, block.rows
            crcs.append(isal_zlib.crc32(images[start:end]))
        assert end == len(samples)
        of_images, *others = (
            self._write(array, number, values)
            for array, values in zip(self._arrays, (images, labels, rows), strict=True)
        )
        _sync_directories(self._directory, [file.name for file in (of_images, *others)])
        return Shard(samples=len(samples), blocks_crc32=tuple(crcs), **of_images.model_dump()), tuple(others)

    def _write(self, array: ArrayCut, number: int, values: NDArray) -> RawFile:
        name = array.shard_name(number)
        # Into a last shard that is there from an earlier attempt zarr-python would merge what it is given.
        (self._directory / name).unlink(missing_ok=True)
        opened = zarr.open_array(self._directory / GROUP / array.name, mode="r+", zarr_format=3)
        # A block of zeros, the fill value, is stored like any other, so that a missing one is damage.
        opened = opened.with_config({"write_empty_chunks": True})
        opened[number * array.shard : number * array.shard + len(values)] = values
        return _sync(self._directory, name)


def _create_array(group: zarr.Group, array: ArrayCut, compressor: ZstdCodec | Crc32cCodec) -> zarr.Array:
    return group.create_array(
        array.name,
        shape=(array.samples, *array.sample),
        dtype=array.dtype,
        chunks=(array.block, *array.sample),
        shards=(array.shard, *array.sample),
        compressors=compressor,
        fill_value=0,
        dimension_names=("sample", "y", "x", "channel")[: 1 + len(array.sample)],
    )


def _sync(directory: Path, name: str) -> RawFile:
    """Bring a file safely to the disk; returns what the manifest tells of it."""
    with open(directory / name, "r+b") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return RawFile(name=name, bytes=file.tell(), sha256=digest)


def _sync_directories(directory: Path, names: list[str]) -> None:
    """Make new files in new directories survive a power cut; names: their paths in the split."""
    for parent in {parent for name in names for parent in PurePosixPath(name).parents}:
        sync_directory(directory / parent)


class OpenedArrays(NamedTuple):
    """The arrays by name, as zarr-python opens them. compressed: whether their blocks are."""

    arrays: dict[str, zarr.Array]
    compressed: bool

    def read(self, name: str, samples: range) -> NDArray:
        """Samples of an array as zarr-python reads them; raises whatever that raises."""
        return np.asarray(self.arrays[name][samples.start : samples.stop])


def open_arrays(directory: Path, manifest: Manifest) -> OpenedArrays:
    """Open the arrays of a split with zarr-python; `UserError` unless all three are just what the manifest tells of.

    Nothing is allocated by what the metadata claim, and no other codecs than ours are accepted.
    """
    arrays = {}
    compressed = set()
    for array in cut_of(manifest):
        _check_shards(directory, manifest, array)
        path = directory / array.metadata_name
        try:
            if path.stat().st_size > _MOST_METADATA:
                raise ValueError("too long for metadata")
            found = zarr.open_array(path.parent, mode="r", zarr_format=3)
            compressed.add(_check_metadata(found, array))
        except FileNotFoundError:
            raise damaged(path, "no such file, though the manifest names it") from None
        except Exception as error:  # whatever zarr-python makes of metadata that were made to mislead it
            raise damaged(path, first_line(error)) from None
        arrays[array.name] = found
    if len(compressed) > 1:
        raise damaged(directory / GROUP, "arrays with compression and arrays without")
    return OpenedArrays(arrays, compressed.pop())


def _check_shards(directory: Path, manifest: Manifest, array: ArrayCut) -> None:
    """Raise `UserError` unless the manifest names all shards of an array, and those of the images in order."""
    names = [array.shard_name(number) for number in range(array.shards)]
    if array.name == "images":
        whole = names == [shard.name for shard in manifest.shards] and all(
            shard.samples == array.shard for shard in manifest.shards[:-1]
        )
    else:
        whole = set(names) <= {file.name for file in manifest.files}
    if not whole:
        raise damaged(directory / MANIFEST_NAME, f"its shards are not those of an array of {array.name}")


def _check_metadata(found: zarr.Array, array: ArrayCut) -> bool:
    """Whether the blocks are compressed; ValueError for an array such as `ZarrWriter` does not make."""
    sharding = found.metadata.codecs[0]
    if not isinstance(sharding, ShardingCodec):
        raise ValueError("its blocks are not in shards")
    zstd = [codec for codec in sharding.codecs if isinstance(codec, ZstdCodec)]
    # Of zstd any level will do.
    example = _create_array(zarr.create_group(MemoryStore()), array, zstd[0] if zstd else Crc32cCodec())
    expected = example.metadata.to_dict()
    for field, value in found.metadata.to_dict().items():
        if field in _CHECKED and value != expected[field]:
            raise ValueError(f"{field} {value}, where the manifest asks for {expected[field]}")
    return bool(zstd)
