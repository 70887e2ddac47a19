"""The full check of zarr arrays: decoded by zarr-python, block by block."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shards.errors import UserError, damaged, first_line
from shards.manifest import Manifest
from shards.stores.base import block_key
from shards.stores.zarr import ShardFile
from shards.stores.zarr_arrays import GROUP, OpenedArrays, cut_of, open_arrays
from shards.verify.sample_counts import SampleCounter


def check_store(directory: Path, manifest: Manifest, counter: SampleCounter) -> Iterator[str]:
    """See `shards.verify.check.CheckStore`."""
    try:
        opened = open_arrays(directory, manifest)
    except UserError as error:
        yield error.found
        return
    for number in range(len(manifest.shards)):
        yield from _check_shard(directory, manifest, opened, number, counter)


def _check_shard(
    directory: Path, manifest: Manifest, opened: OpenedArrays, number: int, counter: SampleCounter
) -> Iterator[str]:
    """Check shard `number` of all three arrays."""
    cuts = cut_of(manifest)
    sizes = {file.name: file.bytes for file in manifest.everything}
    files = {}
    for cut in cuts:
        path = directory / cut.shard_name(number)
        size = sizes[cut.shard_name(number)]
        if path.is_file() and path.stat().st_size == size:
            try:
                files[cut.name] = ShardFile(directory, cut, number, size, opened.compressed)
            except UserError as error:
                yield error.found
    for block, crc in enumerate(manifest.shards[number].blocks_crc32, start=number * cuts[0].blocks_in_shard):
        samples = cuts[0].samples_of_block(block)
        values = {}
        for name, file in files.items():
            try:
                values[name] = _decode(opened, name, file, block, samples)
                if name == "images" and zlib.crc32(values[name].tobytes()) != crc:
                    yield f"{file.place(block)} was changed (CRC-32 differs)"
            except UserError as error:
                yield error.found
        if {"labels", "rows"} <= values.keys():
            for fault in counter.add(values["labels"], values["rows"]):
                yield f"{directory / GROUP}: block {block_key(block)}: {fault}"


def _decode(opened: OpenedArrays, name: str, file: ShardFile, block: int, samples: range) -> NDArray:
    """A block as zarr-python decodes it. Raises `UserError` if it does not, or other than our own reader."""
    ours = file.read(block)  # first, because it refuses what claims more memory than a block takes
    try:
        values = opened.read(name, samples)
    except Exception as error:  # whatever zarr-python and its codecs make of bytes that were made to mislead them
        raise damaged(file.place(block), first_line(error)) from None
    if not np.array_equal(values, ours):
        raise damaged(file.place(block), "zarr-python decodes it otherwise")
    return values
