"""The full check of tar shards: `numpy.load`, record by record."""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shards.errors import UserError, first_line
from shards.manifest import Manifest, Shard
from shards.stores.base import INDEX_VERSION, block_key, read_at
from shards.stores.record_index import index_content, index_line
from shards.stores.tar import COMPONENTS
from shards.stores.tar_members import Member, read_members, round_up
from shards.verify.check import SampleCounter

_MAX_NPY_HEADER = 16 << 10


def check_store(directory: Path, manifest: Manifest, counter: SampleCounter) -> Iterator[str]:
    """Check all blocks; see `shards.verify.check.check_split`."""
    first_block = 0
    for shard in manifest.shards:
        path = directory / shard.name
        if path.is_file():
            lines: list[str] = []
            yield from _check_blocks(path, shard, manifest, first_block, counter, lines)
            # After an unreadable block the expected index is unknown; its SHA-256 is checked in any case.
            if len(lines) == len(shard.blocks_crc32):
                yield from _check_index(path.with_suffix(".idx"), index_content(lines), first_block)
        first_block += len(shard.blocks_crc32)


def _check_blocks(
    path: Path, shard: Shard, manifest: Manifest, first_block: int, counter: SampleCounter, lines: list[str]
) -> Iterator[str]:
    """Decode a shard's blocks; append the index line of each readable block to `lines`."""
    start = 0
    with open(path, "rb") as file:
        members = read_members(path)
        for number, crc in enumerate(shard.blocks_crc32):
            size = min(manifest.block_size, shard.samples - number * manifest.block_size)
            key = block_key(first_block + number)
            location = f"{path}: block {key}"
            try:
                block = _next_block(members, key, max(8, manifest.image_bytes) * size + _MAX_NPY_HEADER)
            except (UserError, ValueError) as error:
                # Without a readable header the offsets of the following blocks are unknown.
                yield f"{location} cannot be read: {getattr(error, 'found', error)}"
                return
            lines.append(index_line(dict(zip(COMPONENTS, block, strict=True))))
            end = round_up(block[-1].offset + block[-1].size)
            content = read_at(file, start, end - start)
            contents = [content[member.offset - start :][: member.size] for member in block]
            start = end
            if zlib.crc32(content) != crc:
                yield f"{location} was changed (CRC-32 differs)"
                continue
            try:
                _load(contents[0], COMPONENTS[0], "|u1", (size, *manifest.pixel_shape))
                labels, rows = (
                    _load(content, component, "<i8", (size,))
                    for content, component in zip(contents[1:], COMPONENTS[1:], strict=True)
                )
            except Exception as error:  # NumPy raises many types for damaged headers
                yield f"{location}: {first_line(error)}"
                continue
            yield from counter.add(location, labels, rows)


def _next_block(members: Iterator[Member], key: str, max_bytes: int) -> list[Member]:
    """Return the members of the next block; raise ValueError if one has another name or more than `max_bytes`."""
    block = []
    for component in COMPONENTS:
        member = next(members, None)
        if member is None or member.name != f"{key}.{component}":
            raise ValueError(f"{member.name if member else 'the end'!r} in place of {key}.{component}")
        if member.size > max_bytes:
            raise ValueError(f"{component} claims {member.size:,} bytes")
        block.append(member)
    return block


def _load(content: bytes, component: str, dtype: str, shape: tuple[int, ...]) -> NDArray:
    """Decode a .npy file; raise ValueError before allocating memory if it has another type or shape."""
    file = io.BytesIO(content)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError(f"{component} is not of .npy format 1.0")
    actual_shape, fortran_order, actual_dtype = np.lib.format.read_array_header_1_0(file)
    if (actual_shape, actual_dtype) != (shape, np.dtype(dtype)) or fortran_order:
        raise ValueError(f"{component} is {actual_dtype} {list(actual_shape)}, not {np.dtype(dtype)} {list(shape)}")
    file.seek(0)
    return np.load(file, allow_pickle=False)


def _check_index(path: Path, content: bytes, first_block: int) -> Iterator[str]:
    """Compare an index with its expected content, line by line."""
    if not path.is_file():
        return
    lines, expected = path.read_bytes().split(b"\n"), content.split(b"\n")
    if len(lines) != len(expected) or lines[0] != expected[0]:
        yield f"{path}: not an {INDEX_VERSION} index of {len(expected) - 2} blocks"
        return
    for number, (line, other) in enumerate(zip(lines[1:], expected[1:], strict=True), start=first_block):
        if line != other:
            yield f"{path}: wrong byte ranges of block {block_key(number)}"
