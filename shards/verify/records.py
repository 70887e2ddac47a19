"""The full check of records: every image is decoded, every label and row parsed, from the members of the tar file."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from shards.errors import UserError
from shards.manifest import Manifest, Shard
from shards.stores.base import read_at
from shards.stores.image_header import decode
from shards.stores.record_index import index_content, index_line, index_name, is_index_of, parse_record, read_records
from shards.verify.check import SampleCounter


def check_store(directory: Path, manifest: Manifest, counter: SampleCounter) -> Iterator[str]:
    """Check all records; see `shards.verify.check.check_split`. Faults name a record by its key instead of a block."""
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
                    image, label, row = parse_record(file, key, components, len(manifest.classes))
                    content = read_at(file, image.offset, image.size)
                    decode(content, manifest.image_shape[2])
                    block, place = first + len(lines), (image.offset, image.size)
                    if len(lines) < shard.samples:
                        yield from counter.check_images(f"{path}: record {key}", block, place, content)
                    valid.append((label, first + len(lines) if row is None else row))
                except ValueError as error:
                    yield f"{path}: record {key}: {error}"
                lines.append(index_line(components))
    except UserError as error:
        yield error.found
        return
    if len(valid) == shard.samples:
        yield from counter.add(path, first, *np.array(valid, np.int64).T)
    index = directory / index_name(shard)
    if len(lines) != shard.samples:
        count = "more" if len(lines) > shard.samples else f"{len(lines):,}"
        yield f"{path}: {count} records, the manifest says {shard.samples:,}"
    elif len(valid) == len(lines) and index.is_file() and not is_index_of(index, index_content(lines)):
        yield f"{index}: not an index of {path.name}, or with wrong byte ranges"
