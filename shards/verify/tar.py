"""The full check of tar shards: `tarfile` and `numpy.load`, record by record."""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from shards.errors import first_line
from shards.manifest import Manifest, Shard
from shards.stores.base import INDEX_VERSION, block_key
from shards.stores.record_index import index_line
from shards.stores.tar import COMPONENTS
from shards.stores.tar_members import Member, iterate_members, round_up
from shards.verify.sample_counts import SampleCounter

_MOST_NPY_HEADER = 16 << 10


def check_store(directory: Path, manifest: Manifest, counter: SampleCounter) -> Iterator[str]:
    """See `shards.verify.check.CheckStore`."""
    first_block = 0
    for shard in manifest.shards:
        path = directory / shard.name
        if path.is_file():
            index_lines: list[str] = []
            with open(path, "rb") as file:
                for place, fault in _check_blocks(file, shard, manifest, first_block, counter, index_lines):
                    yield f"{path}: block {place}{fault}"
            yield from _check_index(path, shard, first_block, index_lines)
        first_block += len(shard.blocks_crc32)


def _check_blocks(
    file: BinaryIO, shard: Shard, manifest: Manifest, first_block: int, counter: SampleCounter, index_lines: list[str]
) -> Iterator[tuple[str, str]]:
    """Decode a shard's blocks; yields key and fault, and adds the index line of each block that could be found."""
    members = iterate_members(file)
    start = 0
    remaining = shard.samples
    for number, crc in enumerate(shard.blocks_crc32, start=first_block):
        size = min(manifest.block_size, remaining)
        remaining -= size
        key = block_key(number)
        shapes = ((size, *manifest.image_shape), (size,), (size,))
        try:
            block = _next_block(members, key, most=max(8, manifest.image_bytes) * size + _MOST_NPY_HEADER)
        except ValueError as error:
            # Without a readable header the places of the blocks behind it are unknown.
            yield key, f" cannot be read: {error}"
            return
        index_lines.append(index_line(dict(zip(COMPONENTS, block, strict=True))))
        end = round_up(block[-1].offset + block[-1].size)
        file.seek(start)
        content = file.read(end - start)
        start, before = end, start
        if zlib.crc32(content) != crc:
            yield key, " was changed (CRC-32 differs)"
            continue
        try:
            _, labels, rows = (
                _load(content[member.offset - before :][: member.size], component, dtype, shape)
                for member, component, dtype, shape in zip(
                    block, COMPONENTS, ("|u1", "<i8", "<i8"), shapes, strict=True
                )
            )
        except Exception as error:  # whatever NumPy makes of a header that was made to mislead it
            yield key, f": {first_line(error)}"
            continue
        for fault in counter.add(labels, rows):
            yield key, f": {fault}"


def _next_block(members: Iterator[Member], key: str, most: int) -> list[Member]:
    """The members of the next block; ValueError if one has another name or claims more bytes than `most`."""
    block = []
    for component in COMPONENTS:
        member = next(members, None)
        if member is None or member.name != f"{key}.{component}":
            raise ValueError(f"found {member.name if member else 'the end'!r} where {key}.{component} should be")
        if member.size > most:
            raise ValueError(f"{component} claims {member.size:,} bytes")
        block.append(member)
    return block


def _load(content: bytes, component: str, dtype: str, shape: tuple[int, ...]) -> NDArray:
    """Decode a .npy file; ValueError, before memory is allocated, if it is not the array of this type and shape."""
    file = io.BytesIO(content)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError(f"{component} is not of .npy format 1.0")
    found_shape, fortran_order, found_dtype = np.lib.format.read_array_header_1_0(file)
    if (found_shape, found_dtype) != (shape, np.dtype(dtype)) or fortran_order:
        raise ValueError(f"{component} is {found_dtype} {list(found_shape)}, not {np.dtype(dtype)} {list(shape)}")
    file.seek(0)
    return np.load(file, allow_pickle=False)


def _check_index(path: Path, shard: Shard, first_block: int, expected: list[str]) -> list[str]:
    """Compare the index byte for byte with the lines that the blocks ask for (of those that could be read)."""
    index = path.with_suffix(".idx")
    if not index.is_file():
        return [f"{index}: missing"]
    blocks = len(shard.blocks_crc32)
    first, *lines = index.read_bytes().decode(errors="replace").split("\n")
    if first != f"{INDEX_VERSION} {blocks}" or len(lines) != blocks + 1 or lines[-1]:
        return [f"{index}: not an {INDEX_VERSION} index of {blocks} blocks"]
    return [
        f"{index}: block {block_key(number)} lies elsewhere in {path.name}"
        for number, (line, wanted) in enumerate(zip(lines, expected, strict=False), start=first_block)
        if line != wanted
    ]
