"""Zarr v3 arrays in shards of blocks, by zarr-python: layout, writer and metadata."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import zarr
from isal import isal_zlib
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, ShardingCodec, ZstdCodec
from zarr.core.metadata import ArrayV3Metadata
from zarr.storage import MemoryStore

from shards.atomic import sync_directory
from shards.errors import corrupt_shard, first_line
from shards.manifest import MANIFEST_NAME, Manifest, RawFile, Shard
from shards.stores.base import Block, Layout, SplitWriter, WrittenShard
from shards.stores.sample_arrays import BLOCK_DTYPE, PixelSums, numbers_crc32

ZarrArray: TypeAlias = zarr.Array
GROUP = "samples.zarr"
_METADATA = "zarr.json"
_CHECKED = ("shape", "data_type", "chunk_grid", "chunk_key_encoding", "fill_value", "codecs", "storage_transformers")
_MAX_METADATA = 1 << 20  # bytes; ours have about a thousand
_INDEX_ENTRY = 16  # offset and length of a block in its shard, uint64 each
CHECKSUM = 4  # CRC-32C, of an index and of a block that is not compressed
# EMNIST takes 0.325 of its raw pixels at level 3, and 0.310 at level 9, which is three times as slow to write.
_ZSTD_LEVEL = 3


class ArrayLayout(NamedTuple):
    """An array of a split, divided into shards and blocks.

    Attributes:
        name: `images`, `labels` or `rows`.
        dtype: NumPy's name of the type.
        samples: Number of samples N.
        sample: Shape of one sample.
        shard: Samples of a shard, a multiple of `block`.
        block: Samples of a block.
    """

    name: str
    dtype: str
    samples: int
    sample: tuple[int, ...]
    shard: int
    block: int

    def shard_name(self, number: int) -> str:
        """Return the path of a shard in the split, by the `default` chunk key encoding of zarr v3."""
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
    def index_bytes(self) -> int:
        """Bytes of the index at the end of a shard."""
        return self.blocks_in_shard * _INDEX_ENTRY + CHECKSUM

    @property
    def block_bytes(self) -> int:
        """Bytes of a full block before compression. The last block is stored with this length too."""
        return self.block * math.prod(self.sample) * np.dtype(self.dtype).itemsize

    def samples_of_block(self, number: int) -> range:
        return range(number * self.block, min((number + 1) * self.block, self.samples))


def array_layouts(layout: Layout) -> tuple[ArrayLayout, ...]:
    """Return the layouts of images, labels and rows. A split smaller than a block or shard has one of its own size."""
    block = min(layout.block_size, layout.samples)
    shard = -(-min(layout.shard_size, layout.samples) // block) * block
    height, width, channels = layout.image_shape
    assert height and width, "encoded images differ in size"
    arrays: tuple[tuple[str, str, tuple[int, ...]], ...] = (
        ("images", "|u1", (height, width, channels)),
        ("labels", "<i8", ()),
        ("rows", "<i8", ()),
    )
    return tuple(ArrayLayout(name, dtype, layout.samples, sample, shard, block) for name, dtype, sample in arrays)


class ZarrWriter(SplitWriter):
    """Writes zarr arrays: shard file i of each array holds the samples of shard i.

    Args:
        directory: The directory of the split.
        layout: Its layout.
        compression: `zstd` or `none`.
    """

    def __init__(self, directory: Path, layout: Layout, compression: str) -> None:
        super().__init__(directory, layout)
        self._arrays = array_layouts(layout)
        # With checksums, so that readers detect changed blocks.
        compressor = ZstdCodec(level=_ZSTD_LEVEL, checksum=True) if compression == "zstd" else Crc32cCodec()
        self._content: dict = {}
        group = zarr.create_group(MemoryStore(self._content))
        # One encoder for all shards: each leaves reference cycles, which are freed only by a garbage collection.
        # Blocks of zeros, the fill value, are stored too, so that a missing block is an error.
        self._encoders = [
            _create_array(group, array, compressor).with_config({"write_empty_chunks": True}) for array in self._arrays
        ]

    def start(self) -> tuple[RawFile, ...]:
        """Write the metadata of the group and of its arrays; returns the files."""
        content = sorted(self._content.items())
        return tuple(self._write(f"{GROUP}/{key}", value.as_numpy_array().data) for key, value in content)

    def write_shard(self, number: int, blocks: Iterable[Block]) -> WrittenShard:
        """Write a shard, see `SplitWriter`. Holds the samples of the shard in memory."""
        samples = self.layout.samples_of(number)
        images, labels, rows = (np.empty((len(samples), *array.sample), array.dtype) for array in self._arrays)
        checksums = []
        sums = PixelSums()
        end = 0
        for block in blocks:
            start, end = end, end + len(block.labels)
            assert block.first == samples.start + start and isinstance(block.images, np.ndarray)
            images[start:end], labels[start:end], rows[start:end] = block.images, block.labels, block.rows
            sums.add(block.first, images[start:end])
            checksums.append((isal_zlib.crc32(images[start:end]), numbers_crc32(labels[start:end], rows[start:end])))
        assert end == len(samples)
        (image_file, ranges), *others = (
            self._write_array(array, encoder, number, values)
            for array, encoder, values in zip(self._arrays, self._encoders, (images, labels, rows), strict=True)
        )
        entries = [(*place, *crcs) for place, crcs in zip(ranges[: len(checksums)].tolist(), checksums, strict=True)]
        shard = Shard(samples=len(samples), **image_file.model_dump())
        return WrittenShard(shard, tuple(file for file, _ in others), np.array(entries, BLOCK_DTYPE), sums.total)

    def _write_array(
        self, array: ArrayLayout, encoder: ZarrArray, number: int, values: NDArray
    ) -> tuple[RawFile, NDArray[np.uint64]]:
        """Write a shard of one array; returns its entry, and offset and length of each block [blocks, 2]."""
        encoder[number * array.shard : number * array.shard + len(values)] = values
        name = array.shard_name(number)
        content = self._content.pop(name.removeprefix(f"{GROUP}/")).as_numpy_array()
        index = content[-array.index_bytes : -CHECKSUM].tobytes()
        return self._write(name, content.data), np.frombuffer(index, "<u8").reshape(-1, 2)

    def _write(self, name: str, content: memoryview) -> RawFile:
        """Write a file so that it survives a power failure."""
        path = self.directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # a process of a killed call may still write to it
        with open(path, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        for parent in PurePosixPath(name).parents:
            sync_directory(self.directory / parent)
        return RawFile.of_content(name, content)


def _create_array(group: zarr.Group, array: ArrayLayout, compressor: ZstdCodec | Crc32cCodec) -> zarr.Array:
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


@functools.lru_cache(maxsize=64)
def _expected_metadata(array: ArrayLayout, compressor: ZstdCodec | Crc32cCodec) -> dict[str, Any]:
    return _create_array(zarr.create_group(MemoryStore()), array, compressor).metadata.to_dict()


def open_arrays(directory: Path, manifest: Manifest) -> tuple[dict[str, zarr.Array], bool]:
    """Open the arrays of a split with zarr-python.

    No memory is allocated by the numbers in the metadata, and only the codecs of `ZarrWriter` are accepted.

    Returns:
        The arrays by name, and whether their blocks are compressed.

    Raises:
        CorruptError: If an array does not fit the manifest.
    """
    arrays = {}
    compressed = set()
    for layout in array_layouts(Layout.of(manifest)):
        _check_shards(directory, manifest, layout)
        path = directory / GROUP / layout.name / _METADATA
        try:
            if path.stat().st_size > _MAX_METADATA:
                raise ValueError("too long for metadata")
            arrays[layout.name] = zarr.open_array(path.parent, mode="r", zarr_format=3)
            compressed.add(_check_metadata(arrays[layout.name], layout))
        except FileNotFoundError:
            raise corrupt_shard(path, "no such file, though the manifest names it") from None
        except Exception as error:  # zarr-python raises many types for damaged metadata
            raise corrupt_shard(path, first_line(error)) from None
    if len(compressed) > 1:
        raise corrupt_shard(directory / GROUP, "arrays with compression and arrays without")
    return arrays, compressed.pop()


def _check_shards(directory: Path, manifest: Manifest, layout: ArrayLayout) -> None:
    """Raise `CorruptError` unless the manifest names all shards of an array, and those of the images in order."""
    names = [layout.shard_name(number) for number in range(layout.shards)]
    if layout.name == "images":
        complete = names == [shard.name for shard in manifest.shards]
        complete &= all(shard.samples == layout.shard for shard in manifest.shards[:-1])
    else:
        complete = set(names) <= {file.name for file in manifest.files}
    if not complete:
        raise corrupt_shard(directory / MANIFEST_NAME, f"its shards are not those of an array of {layout.name}")


def _check_metadata(array: zarr.Array, layout: ArrayLayout) -> bool:
    """Return whether the blocks are compressed; raise ValueError unless `ZarrWriter` could have made the array."""
    metadata = array.metadata
    assert isinstance(metadata, ArrayV3Metadata)
    sharding = metadata.codecs[0]
    if not isinstance(sharding, ShardingCodec):
        raise ValueError("its blocks are not in shards")
    zstd = [codec for codec in sharding.codecs if isinstance(codec, ZstdCodec)]
    # Any zstd level is accepted.
    expected = _expected_metadata(layout, zstd[0] if zstd else Crc32cCodec())
    for field, value in metadata.to_dict().items():
        if field in _CHECKED and value != expected[field]:
            raise ValueError(f"{field} {value}, where the manifest requires {expected[field]}")
    return bool(zstd)
