"""The full check of tar shards, member by member."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shards.errors import UserError
from shards.manifest import Manifest, Shard
from shards.stores.base import INDEX_VERSION, block_key, read_at
from shards.stores.record_index import index_content, index_line
from shards.stores.sample_arrays import npy_header
from shards.stores.tar import COMPONENTS
from shards.stores.tar_members import Member, read_members, round_up
from shards.verify.check import SampleCounter

_MAX_NPY_HEADER = 16 << 10


def check_store(directory: Path, manifest: Manifest, counter: SampleCounter) -> Iterator[str]:
    """Check all blocks; see `shards.verify.check.check_split`."""
    first_block = 0
    for shard in manifest.shards:
        path = directory / shard.name
        blocks = -(-shard.samples // manifest.block_size)
        if path.is_file():
            lines: list[str] = []
            yield from _check_blocks(path, shard, manifest, first_block, counter, lines)
            # After an unreadable block the expected index is unknown; its SHA-256 is checked in any case.
            if len(lines) == blocks:
                yield from _check_index(path.with_suffix(".idx"), index_content(lines), first_block)
        first_block += blocks


def _check_blocks(
    path: Path, shard: Shard, manifest: Manifest, first_block: int, counter: SampleCounter, lines: list[str]
) -> Iterator[str]:
    """Decode a shard's blocks; append the index line of each readable block to `lines`."""
    start = 0
    with open(path, "rb") as file:
        members = read_members(path)
        for number in range(-(-shard.samples // manifest.block_size)):
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
            if shard.blocks_crc32 and zlib.crc32(content) != shard.blocks_crc32[number]:
                yield f"{location} was changed (CRC-32 differs)"
                continue
            try:
                images = _decode(contents[0], COMPONENTS[0], "|u1", (size, *manifest.pixel_shape))
                labels, rows = (
                    _decode(content, component, "<i8", (size,))
                    for content, component in zip(contents[1:], COMPONENTS[1:], strict=True)
                )
            except ValueError as error:
                yield f"{location}: {error}"
                continue
            place = block[0].offset + block[0].size - images.nbytes, images.nbytes
            yield from counter.check_images(location, first_block + number, place, images.tobytes())
            yield from counter.add(location, (first_block + number) * manifest.block_size, labels, rows)


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


def _decode(content: bytes, component: str, dtype: str, shape: tuple[int, ...]) -> NDArray:
    """Decode a .npy file; raise ValueError if it has another type or shape."""
    header = npy_header(dtype, shape)
    if not content.startswith(header) or len(content) != len(header) + math.prod(shape) * np.dtype(dtype).itemsize:
        raise ValueError(f"{component} is not {np.dtype(dtype)} {list(shape)} of .npy format 1.0")
    return np.frombuffer(content, dtype, offset=len(header)).reshape(shape)


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
