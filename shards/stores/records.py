"""Records of one image file each (an ordinary WebDataset): for images of different sizes, and for adopted shards."""

from __future__ import annotations

import itertools
import mmap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shards.errors import corrupt_shard
from shards.manifest import BLOCKS, VERSION, Manifest
from shards.stores.base import Block, Store, block_key, check_positions
from shards.stores.image_header import EXTENSIONS, MAX_BYTES
from shards.stores.record_index import (
    MAX_NUMBER_BYTES,
    ROW,
    check_within,
    index_name,
    name_in_index,
    parse_number,
    read_component_ranges,
)
from shards.stores.sample_arrays import BLOCK_DTYPE, BlockChecks, SampleArrays
from shards.stores.split_files import SplitFiles
from shards.stores.tar_writer import TarRecord, TarShardWriter

_THREADS = 8  # shards opened in parallel: with a cold file cache each waits for many small reads
_LARGE_RECORD = 64 << 10  # bytes from which read-ahead costs more than it saves


class RecordWriter(TarShardWriter):
    """Writes records of one image: an unchanged image file, its label and its row."""

    def records(self, block: Block) -> Iterator[TarRecord]:
        for position, (image, label, row) in enumerate(
            zip(block.images, block.labels, block.rows, strict=True), start=block.first
        ):
            assert not isinstance(image, np.ndarray) and image.extension in EXTENSIONS
            components = ((image.extension, [image.content]), ("cls", [b"%d" % label]), (ROW, [b"%d" % row]))
            yield TarRecord(block_key(position), components, np.array([label]), np.array([row]))


class RecordStore(Store):
    """The store of records, each an image file.

    Images are read, not mapped, so that the memory of the process does not grow with the images that were read.

    Args:
        directory: The directory of the split.
        manifest: Its manifest.
        verify: Whether image files are compared with their checksums when they are read.

    Raises:
        CorruptError: If a file is missing or does not fit the manifest.
    """

    files: SplitFiles

    def __init__(self, directory: Path, manifest: Manifest, verify: bool = True) -> None:
        self.manifest = manifest
        self.files = SplitFiles(directory, manifest)
        self._starts = self.shard_bounds
        self._shard_bytes = np.array([shard.bytes for shard in manifest.shards])
        self.files.check_present(shard.name for shard in manifest.shards)
        arrays = SampleArrays.open(self.files, manifest) if manifest.version == VERSION else self._read_version_2()
        self.arrays, self.labels, self.rows = arrays, arrays.labels, arrays.rows
        self._checks = BlockChecks(self.files, manifest, arrays, verify)

    def _read_version_2(self) -> SampleArrays:
        """Read byte ranges, labels and rows from the shards and their indices."""
        with ThreadPoolExecutor(_THREADS) as pool:
            shards = list(pool.map(self._open, range(len(self.manifest.shards))))
        if len({len(numbers) for _, *numbers in shards}) > 1:
            raise corrupt_shard(self.files.directory, "shards with rows and shards without")
        ranges, labels, *rows = map(np.concatenate, zip(*shards, strict=True))
        blocks = np.zeros(len(labels), BLOCK_DTYPE)
        blocks["offset"], blocks["bytes"] = ranges.T
        return SampleArrays(labels, rows[0] if rows else np.arange(self.manifest.samples), blocks)

    def read(self, samples: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        """Return image files, each uint8 [bytes], read-only; see `shards.stores.base.Store.read`."""
        check_positions(samples, len(self))
        self.files.check_mapped()
        numbers = self._shards_of(samples)
        offsets, sizes = (self.arrays.blocks[samples][name].astype(np.int64) for name in ("offset", "bytes"))
        invalid = (offsets < 0) | (sizes < 1) | (sizes > MAX_BYTES) | (offsets > self._shard_bytes[numbers] - sizes)
        if invalid.any():
            location = self.describe_sample(int(samples[np.argmax(invalid)]))
            raise corrupt_shard(
                location, f"{BLOCKS} places it outside the shard, or with more than {MAX_BYTES:,} bytes"
            )
        shards, ranges = numbers.tolist(), list(zip(offsets.tolist(), sizes.tolist(), strict=True))
        images: list[NDArray[np.uint8]] = [np.empty(0, np.uint8)] * len(samples)
        in_order = np.argsort(samples, kind="stable").tolist()
        for number, positions in itertools.groupby(in_order, key=shards.__getitem__):
            with self.files.open(self.manifest.shards[number].name) as file:
                for position in positions:
                    content = file.read(*ranges[position])
                    if len(content) != ranges[position][1]:
                        raise corrupt_shard(self.describe_sample(int(samples[position])), "its shard ends inside it")
                    self._checks.check(int(samples[position]), content, self.describe_sample)
                    images[position] = np.frombuffer(content, np.uint8)
        return images

    def describe_sample(self, sample: int) -> str:
        """Return the shard of a sample and its file name there, for messages."""
        number = int(self._shards_of(np.array([sample]))[0])
        return self._describe(number, sample - int(self._starts[number]))

    def _shards_of(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.searchsorted(self._starts, samples, side="right") - 1

    def _describe(self, number: int, record: int) -> str:
        shard = self.manifest.shards[number]
        name = name_in_index(self.files.read_all(index_name(shard)), record)
        return f"{self.files.directory / shard.name}: {name}"

    def _open(self, number: int) -> list[NDArray[np.int64]]:
        """Return byte offset and size of the images of a shard [n, 2], its labels [n] and, if it has them, its rows."""
        shard = self.manifest.shards[number]
        mapped, _ = self.files.map([shard.name])
        if shard.bytes // shard.samples > _LARGE_RECORD and isinstance(mapped, mmap.mmap):
            mapped.madvise(mmap.MADV_RANDOM)  # without it the system reads far more than the labels
        try:
            ranges = read_component_ranges(self.files.read_all(index_name(shard)))
            check_within(ranges, shard.bytes)
            largest = ranges[:, 0, 1].max()
            if largest > MAX_BYTES:
                raise ValueError(f"a picture of {largest:,} bytes, more than {MAX_BYTES:,}")
            if len(ranges) != shard.samples:
                raise ValueError(f"{len(ranges):,} records where the manifest says {shard.samples:,}")
        except ValueError as error:
            raise corrupt_shard(
                self.files.directory / index_name(shard), f"no index that fits the shard: {error}"
            ) from None
        images, labels, *rows = ranges.transpose(1, 0, 2)
        highest = len(self.manifest.classes) - 1
        return [
            images,
            self._parse_numbers(number, mapped, labels, highest),
            *(self._parse_numbers(number, mapped, one, np.iinfo(np.int64).max) for one in rows),
        ]

    def _parse_numbers(
        self, number: int, shard: mmap.mmap | bytearray, ranges: NDArray[np.int64], highest: int
    ) -> NDArray[np.int64]:
        """Parse the decimal integers at byte ranges [n, 2] of a shard; returns int64 [n]. Raises `CorruptError`."""
        values = np.empty(len(ranges), np.int64)
        for record, (offset, size) in enumerate(ranges.tolist()):
            try:
                values[record] = parse_number(bytes(shard[offset : offset + min(size, MAX_NUMBER_BYTES + 1)]))
                if values[record] > highest:
                    raise ValueError(f"label {values[record]} outside 0 .. {highest}")
            except ValueError as error:
                raise corrupt_shard(self._describe(number, record), str(error)) from None
        return values
