"""Records of one image file each (an ordinary WebDataset): for images of different sizes, and for adopted shards."""

from __future__ import annotations

import itertools
import mmap
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shards.errors import corrupt_shard
from shards.manifest import Manifest, RawFile, Shard
from shards.stores.base import Block, Layout, block_key, check_positions, open_packed_file, read_at, shard_name
from shards.stores.image_header import EXTENSIONS
from shards.stores.record_index import (
    ROW,
    InvalidNumberError,
    index_name,
    name_in_index,
    read_component_ranges,
    read_numbers,
)
from shards.stores.tar_writer import TarRecord, write_tar_shard

_THREADS = 8  # shards opened in parallel: with a cold file cache each waits for many small reads
_LARGE_RECORD = 64 << 10  # bytes from which read-ahead costs more than it saves


class RecordWriter:
    """The `shards.stores.base.SplitWriter` of records: an unchanged image file, its label and its row."""

    def __init__(self, directory: Path, layout: Layout) -> None:
        self._directory = directory

    def start(self) -> tuple[RawFile, ...]:
        return ()

    def write_shard(self, number: int, blocks: Iterable[Block]) -> tuple[Shard, tuple[RawFile, ...]]:
        shard, index = write_tar_shard(self._directory / shard_name(number), _records(blocks), with_crc=False)
        return shard, (index,)


def _records(blocks: Iterable[Block]) -> Iterator[TarRecord]:
    for block in blocks:
        for position, (image, label, row) in enumerate(
            zip(block.images, block.labels, block.rows, strict=True), start=block.first
        ):
            assert not isinstance(image, np.ndarray) and image.extension in EXTENSIONS
            components = ((image.extension, [image.content]), ("cls", [b"%d" % label]), (ROW, [b"%d" % row]))
            yield TarRecord(block_key(position), 1, components)


class _OpenShard(NamedTuple):
    """Byte offsets and sizes of the images int64 [n, 2], labels int64 [n], and rows if the shard has them."""

    images: NDArray[np.int64]
    labels: NDArray[np.int64]
    rows: NDArray[np.int64] | None


class RecordStore:
    """The `EncodedStore` of records. Labels and rows are read on opening, images on request.

    Images are read, not mapped, so that the memory of the process does not grow with the images it has touched.
    """

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.manifest = manifest
        self._paths = [directory / shard.name for shard in manifest.shards]
        self._index_bytes = {file.name: file.bytes for file in manifest.files}
        with ThreadPoolExecutor(_THREADS) as pool:
            shards = list(pool.map(self._open, range(len(self._paths))))
        self._starts = np.cumsum([0, *(shard.samples for shard in manifest.shards)])
        self._ranges = np.concatenate([shard.images for shard in shards])
        self.labels = np.concatenate([shard.labels for shard in shards])
        rows = [shard.rows for shard in shards if shard.rows is not None]
        if rows and len(rows) < len(shards):
            raise corrupt_shard(directory, "shards with rows and shards without")
        self.rows = np.concatenate(rows) if rows else np.arange(manifest.samples)

    def __len__(self) -> int:
        return self.manifest.samples

    def read(self, samples: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        """Return image files, each uint8 [bytes], read-only; see `shards.stores.base.Store.read`."""
        check_positions(samples, len(self))
        shards = self._shards_of(samples).tolist()
        ranges = self._ranges[samples].tolist()
        images: list[NDArray[np.uint8]] = [np.empty(0, np.uint8)] * len(samples)
        in_order = np.argsort(samples, kind="stable").tolist()
        # Files are opened for each batch: there may be more shards than a process may keep open.
        for number, positions in itertools.groupby(in_order, key=shards.__getitem__):
            with open_packed_file(self._paths[number]) as file:
                for position in positions:
                    content = read_at(file, *ranges[position])
                    if len(content) != ranges[position][1]:
                        raise corrupt_shard(self.describe_sample(int(samples[position])), "its shard ends inside it")
                    images[position] = np.frombuffer(content, np.uint8)
        return images

    def describe_sample(self, sample: int) -> str:
        """Return the shard of a sample and its file name there, for messages."""
        number = int(self._shards_of(np.array([sample]))[0])
        return self._describe(number, sample - int(self._starts[number]))

    def _shards_of(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.searchsorted(self._starts, samples, side="right") - 1

    def _describe(self, number: int, record: int) -> str:
        return f"{self._paths[number]}: {name_in_index(self._read_index(number), record)}"

    def _read_index(self, number: int) -> bytes:
        size = self._index_bytes.get(index_name(self.manifest.shards[number]), 0)
        with open_packed_file(self._paths[number].with_suffix(".idx"), size) as file:
            return file.read(size)

    def _open(self, number: int) -> _OpenShard:
        path, shard = self._paths[number], self.manifest.shards[number]
        with open_packed_file(path, shard.bytes) as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if shard.bytes // shard.samples > _LARGE_RECORD and hasattr(mmap, "MADV_RANDOM"):
            mapped.madvise(mmap.MADV_RANDOM)  # without it the system reads far more than the labels
        data = np.frombuffer(mapped, np.uint8)
        try:
            ranges = read_component_ranges(self._read_index(number))
            ranges.check_within(shard.bytes)
            if len(ranges.images) != shard.samples:
                raise ValueError(f"{len(ranges.images):,} records where the manifest says {shard.samples:,}")
        except ValueError as error:
            raise corrupt_shard(path.with_suffix(".idx"), f"no index that fits the shard: {error}") from None
        try:
            labels = read_numbers(data, ranges.labels)
            rows = None if ranges.rows is None else read_numbers(data, ranges.rows)
        except InvalidNumberError as error:
            raise corrupt_shard(self._describe(number, error.record), f"{error.text!r} for a label or row") from None
        outside = np.flatnonzero(labels >= len(self.manifest.classes))
        if len(outside):
            reason = f"label {labels[outside[0]]} outside 0 .. {len(self.manifest.classes) - 1}"
            raise corrupt_shard(self._describe(number, int(outside[0])), reason)
        return _OpenShard(ranges.images, labels, rows)
