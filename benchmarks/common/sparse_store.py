"""Packed data sets of any size that take little disk space: their shards are sparse files of black images."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np

from shards.manifest import BLOCKS, LABELS, ROWS, Manifest, RawFile, Shard
from shards.stores.base import shard_name
from shards.stores.sample_arrays import BLOCK_DTYPE, npy_header, write_array

_NO_HASH = "0" * 64  # hashing the zeros of a terabyte would take an hour
_START = 1024  # bytes of a shard before the first image of a block, for tar and array headers


def write_sparse_split(
    directory: Path,
    samples: int,
    split: str = "train",
    shape: tuple[int, int, int] = (28, 28, 1),
    block_size: int = 512,
    shard_size: int = 512 * 83,
) -> Manifest:
    """Write a split of a store `tar` of format version 3, all of whose images and rows are zero.

    The labels are 1 in the first half of the first block, 0 otherwise. The split can be opened, read and verified
    lazily. The hashes of shards, labels and rows in its manifest are not those of the files.

    Args:
        directory: The directory of the data set.
        samples: N, a multiple of 2 * `block_size`.
        split: The name of the split.
        shape: [H, W, C] of the images.
        block_size: Samples of a block.
        shard_size: Samples of a shard, a multiple of `block_size`; by default 32 MiB of 28x28 images, as when packing.
    """
    directory = directory / split
    directory.mkdir(parents=True)
    image_bytes, ones = int(np.prod(shape)), block_size // 2
    block_bytes = block_size * image_bytes
    shards = []
    for number, first in enumerate(range(0, samples, shard_size)):
        count = min(shard_size, samples - first)
        size = count // block_size * (_START + block_bytes)
        _write_zeros(directory / shard_name(number), b"", size)
        shards.append(Shard(name=shard_name(number), samples=count, bytes=size, sha256=_NO_HASH))
    label_header, row_header = npy_header("|u1", (samples,)), npy_header("<u4", (samples,))
    _write_zeros(directory / LABELS, label_header + b"\1" * ones, len(label_header) + samples)
    _write_zeros(directory / ROWS, row_header, len(row_header) + 4 * samples)
    blocks = np.zeros(samples // block_size, BLOCK_DTYPE)
    blocks["offset"] = np.arange(len(blocks)) % (shard_size // block_size) * (_START + block_bytes) + _START
    blocks["bytes"], blocks["crc32"] = block_bytes, zlib.crc32(bytes(block_bytes))
    blocks["numbers_crc32"] = zlib.crc32(bytes(16 * block_size))
    labels = np.zeros(block_size, "<i8")
    labels[:ones] = 1
    blocks["numbers_crc32"][0] = zlib.crc32(labels.tobytes() + bytes(8 * block_size))
    sizes = {name: (directory / name).stat().st_size for name in (LABELS, ROWS)}
    manifest = Manifest(
        dataset="sparse",
        variant="",
        split=split,
        classes=("0", "1"),
        counts=(samples - ones, ones),
        image_shape=shape,
        transposed=False,
        samples=samples,
        block_size=block_size,
        seed=0,
        shards=tuple(shards),
        files=(
            *(RawFile(name=name, bytes=size, sha256=_NO_HASH) for name, size in sizes.items()),
            write_array(directory / BLOCKS, BLOCK_DTYPE, len(blocks), [blocks]),
        ),
        raw=(),
        versions={},
    )
    manifest.write(directory)
    return manifest


def _write_zeros(path: Path, start: bytes, size: int) -> None:
    """Write a file of `size` bytes: `start`, then zeros, which take no disk space."""
    with open(path, "wb") as file:
        file.write(start)
        file.truncate(size)
