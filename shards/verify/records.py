"""The full check of records: every picture decoded, every label and row read, found by the members of the tar file."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np

from shards.errors import UserError
from shards.manifest import Manifest, Shard
from shards.stores.image_header import MAX_BYTES, decode
from shards.stores.record_index import (
    choose,
    index_content,
    index_line,
    index_name,
    parse_number,
    read_records,
    same_places,
)
from shards.stores.tar_members import Member
from shards.verify.sample_counts import SampleCounter

_AT_ONCE = 1024  # records counted together


def check_store(directory: Path, manifest: Manifest, counter: SampleCounter) -> Iterator[str]:
    """See `shards.verify.check.CheckStore`. What it calls a block is a record here, named by its key."""
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
    sound: list[tuple[int, int]] = []
    with open(path, "rb", buffering=0) as file:
        # One more than there should be is enough to know that there are too many.
        records = islice(read_records(path), shard.samples + 1)
        try:
            for key, components in records:
                try:
                    label, row = _check_record(file, components, manifest)
                except ValueError as error:
                    yield f"{path}: record {key}: {error}"
                else:
                    sound.append((label, first + len(lines) if row is None else row))
                lines.append(index_line(components))
        except UserError as error:
            yield error.found
            return
    for start in range(0, len(sound), _AT_ONCE):
        labels, rows = np.array(sound[start : start + _AT_ONCE], np.int64).T
        yield from (f"{path}: {fault}" for fault in counter.add(labels, rows))
    if len(lines) != shard.samples:
        more = "more" if len(lines) > shard.samples else f"{len(lines):,}"
        yield f"{path}: {more} records, the manifest says {shard.samples:,}"
    elif len(sound) == len(lines):
        yield from _check_index(directory / index_name(shard), path.name, index_content(lines))


def _check_record(file: BinaryIO, components: dict[str, Member], manifest: Manifest) -> tuple[int, int | None]:
    """Read one record; its label and row. ValueError says what is wrong with it."""
    choice = choose(tuple(components))
    members = list(components.values())
    decode(_content(file, members[choice.picture]), manifest.image_shape[2])
    label = _number(file, members[choice.label])
    if label >= len(manifest.classes):
        raise ValueError(f"label {label} outside 0 .. {len(manifest.classes) - 1}")
    return label, None if choice.row is None else _number(file, members[choice.row])


def _content(file: BinaryIO, member: Member) -> bytes:
    if member.size > MAX_BYTES:
        raise ValueError(f"{member.name!r} of {member.size:,} bytes, more than {MAX_BYTES:,}")
    file.seek(member.offset)
    return file.read(member.size)


def _number(file: BinaryIO, member: Member) -> int:
    try:
        return parse_number(_content(file, member))
    except ValueError as error:
        raise ValueError(f"{member.name!r} holds {error}") from None


def _check_index(index: Path, shard: str, expected: bytes) -> Iterator[str]:
    """Compare an index with the places at which the records were found."""
    if not index.is_file():
        return
    with open(index, "rb") as file:
        if not same_places(file.read(4 * len(expected)), expected):
            yield f"{index}: not an index of {shard}, or some records lie elsewhere in it"
