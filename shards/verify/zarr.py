"""The full check of zarr arrays: decoded by zarr-python, block by block."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shards.errors import UserError, corrupt_shard, first_line
from shards.manifest import Manifest
from shards.stores.base import Layout, block_key
from shards.stores.split_files import SplitFiles
from shards.stores.zarr import ShardFile
from shards.stores.zarr_arrays import GROUP, ZarrArray, array_layouts, open_arrays
from shards.verify.check import SampleCounter


def check_store(directory: Path, manifest: Manifest, counter: SampleCounter) -> Iterator[str]:
    """Check all blocks; see `shards.verify.check.check_split`."""
    try:
        arrays, compressed = open_arrays(directory, manifest)
    except UserError as error:
        yield error.found
        return
    layouts = array_layouts(Layout.of(manifest))
    split = SplitFiles(directory, manifest)
    for number, shard in enumerate(manifest.shards):
        files = {}
        for layout in layouts:
            try:
                files[layout.name] = ShardFile(split, layout, number, compressed)
            except UserError as error:
                yield error.found
        start = number * layouts[0].blocks_in_shard
        for block in range(start, start - (-shard.samples // layouts[0].block)):
            samples = layouts[0].samples_of_block(block)
            values = {}
            for name, file in files.items():
                try:
                    values[name] = _decode(arrays[name], file, block, samples)
                    if name == "images":
                        content = values[name].tobytes()
                        if shard.blocks_crc32 and zlib.crc32(content) != shard.blocks_crc32[block - start]:
                            yield f"{file.describe(block)} was changed (CRC-32 differs)"
                        offset, length = file.ranges[block - start].tolist()
                        yield from counter.check_images(file.describe(block), block, (offset, length), content)
                except UserError as error:
                    yield error.found
            if {"labels", "rows"} <= values.keys():
                yield from counter.add(
                    f"{directory / GROUP}: block {block_key(block)}", samples.start, values["labels"], values["rows"]
                )


def _decode(array: ZarrArray, file: ShardFile, block: int, samples: range) -> NDArray:
    """Decode a block with zarr-python. Raises `CorruptError` if that fails or differs from our reader."""
    ours = file.read(block)  # first, because it refuses a block that claims too much memory
    try:
        values = np.asarray(array[samples.start : samples.stop])
    except Exception as error:  # zarr-python and its codecs raise many types for damaged content
        raise corrupt_shard(file.describe(block), first_line(error)) from None
    if not np.array_equal(values, ours):
        raise corrupt_shard(file.describe(block), "zarr-python decodes it otherwise")
    return values
