"""The full check of records: every image is decoded, every label and row parsed, from the members of the tar file."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np

from shards.errors import UserError
from shards.manifest import Manifest, Shard
from shards.stores.base import read_at
from shards.stores.image_header import MAX_BYTES, decode
from shards.stores.record_index import (
    find_components,
    index_content,
    index_line,
    index_name,
    parse_number,
    read_records,
    same_ranges,
)
from shards.stores.tar_members import Member
from shards.verify.sample_counts import SampleCounter


def check_store(directory: Path, manifest: Manifest, counter: SampleCounter) -> Iterator[str]:
    """Check all records; see `shards.verify.check.CheckStore`. Faults name a record by its key instead of a block."""
    first = 0
    for shard in manifest.shards:
        if (directory / shard.name).is_file():
            yield from _check_shard(directory, shard, manifest, first, counter)
        first += shard.samples


def _check_shard(
    directory: Path, shard: Shard, manifest: Manifest, first: int, counter: SampleCounter
) -> Iterator[str]:
    path = directory / shard.name
    lines: list[str] = []
    valid: list[tuple[int, int]] = []
    try:
        with open(path, "rb", buffering=0) as file:
            # One record more than expected is enough to detect a surplus.
            for key, components in islice(read_records(path), shard.samples + 1):
                try:
                    label, row = _check_record(file, components, manifest)
                    valid.append((label, first + len(lines) if row is None else row))
                except ValueError as error:
                    yield f"{path}: record {key}: {error}"
                lines.append(index_line(components))
    except UserError as error:
        yield error.found
        return
    if valid:
        labels, rows = np.array(valid, np.int64).T
        yield from (f"{path}: {fault}" for fault in counter.add(labels, rows))
    if len(lines) != shard.samples:
        count = "more" if len(lines) > shard.samples else f"{len(lines):,}"
        yield f"{path}: {count} records, the manifest says {shard.samples:,}"
    elif len(valid) == len(lines):
        yield from _check_index(directory / index_name(shard), path.name, index_content(lines))


def _check_record(file: BinaryIO, components: dict[str, Member], manifest: Manifest) -> tuple[int, int | None]:
    """Return the label and the row of a record; raise ValueError if the record is invalid."""
    selected = find_components(tuple(components))
    members = list(components.values())
    decode(_content(file, members[selected.image]), manifest.image_shape[2])
    label = _number(file, members[selected.label])
    if label >= len(manifest.classes):
        raise ValueError(f"label {label} outside 0 .. {len(manifest.classes) - 1}")
    return label, None if selected.row is None else _number(file, members[selected.row])


def _content(file: BinaryIO, member: Member) -> bytes:
    if member.size > MAX_BYTES:
        raise ValueError(f"{member.name!r} of {member.size:,} bytes, more than {MAX_BYTES:,}")
    return read_at(file, member.offset, member.size)


def _number(file: BinaryIO, member: Member) -> int:
    try:
        return parse_number(_content(file, member))
    except ValueError as error:
        raise ValueError(f"{member.name!r} holds {error}") from None


def _check_index(index: Path, shard: str, expected: bytes) -> Iterator[str]:
    """Compare an index with the byte ranges of the records."""
    if not index.is_file():
        return
    with open(index, "rb") as file:
        if not same_ranges(file.read(4 * len(expected)), expected):
            yield f"{index}: not an index of {shard}, or with wrong byte ranges"
