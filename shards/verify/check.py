"""The full check of a packed split.

It decodes record by record with code that training does not use: slow and simple.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shards.atomic import detect_replacement
from shards.errors import CorruptError, first_line
from shards.manifest import (
    ARRAYS,
    BLOCKS,
    LABELS,
    MANIFEST_NAME,
    REQUIRED_SPLITS,
    ROWS,
    SPLITS,
    STATISTICS_SAMPLES,
    VERSION,
    Content,
    Manifest,
    RawFile,
)
from shards.remote.cache import mark_unchecked
from shards.stores.base import block_key
from shards.stores.record_index import index_name
from shards.stores.sample_arrays import BLOCK_DTYPE, map_array


def check_split(directory: Path) -> tuple[Manifest, list[str]]:
    """Check one split completely.

    The check of a store is `check_store(directory, manifest, counter)` of `shards/verify/STORE.py`. It decodes every
    block of the split, passes its images, labels and rows to `counter`, and yields a line for each fault:
    `FILE: block NUMBER: REASON`, where NUMBER is `shards.stores.base.block_key`. The content of the files cannot make
    it raise. It holds a few blocks in memory. It skips missing files: `check_hashes` reports missing files, sizes and
    hashes.

    Returns:
        The manifest, and a line for each fault.
    """
    with detect_replacement(directory / MANIFEST_NAME):
        manifest = Manifest.read(directory)
        counter = SampleCounter(directory, manifest)
        check_store = import_module(f"shards.verify.{manifest.store}").check_store
        faults = [
            *check_hashes(directory, manifest),
            *counter.faults_of_arrays,
            *check_store(directory, manifest, counter),
        ]
    return manifest, faults or [f"{directory}: {fault}" for fault in counter.faults()]


class SampleCounter:
    """Compares the blocks with the arrays of version 3, and the totals with the manifest.

    Attributes:
        faults_of_arrays: A line for each array that cannot be compared.
    """

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self._manifest = manifest
        self._counts = np.zeros(len(manifest.classes), np.int64)
        self._sums = np.zeros((2, manifest.image_shape[2]), np.int64)
        self._rows: list[NDArray[np.int64]] = []
        self._arrays: dict[str, NDArray] = {}
        self._changed: dict[str, Path] = {}  # arrays that are not those of the manifest: a difference is theirs
        self.faults_of_arrays: list[str] = []
        for file in manifest.files if manifest.version == VERSION else ():
            if file.name in ARRAYS and (directory / file.name).is_file():
                self._load(directory, file)

    def _load(self, directory: Path, file: RawFile) -> None:
        manifest, path = self._manifest, directory / file.name
        blocks = sum(-(-shard.samples // manifest.block_size) for shard in manifest.shards)
        try:
            array = map_array(path)
            fits = array.dtype == BLOCK_DTYPE if file.name == BLOCKS else array.dtype.kind in "ui"
            if not fits or array.shape != (blocks if file.name == BLOCKS else manifest.samples,):
                raise ValueError(f"{array.dtype} {list(array.shape)} is not what the manifest describes")
            self._arrays[file.name] = array
        except Exception as error:  # NumPy raises many types for damaged files
            self.faults_of_arrays.append(f"{path}: {first_line(error)}")
        if RawFile.of(directory, file.name) != file:
            self._changed[file.name] = path

    def check_images(self, location: object, block: int, place: tuple[int, int], images: Content) -> Iterator[str]:
        """Compare a block with its entry; yield a line for each difference.

        Args:
            location: Its file and number, for messages.
            block: Its number.
            place: Byte offset and size of its images in the shard.
            images: Its pixels, or the image file.
        """
        if BLOCKS in self._arrays:
            offset, size, crc, _ = self._arrays[BLOCKS][block].item()
            location = self._locate(BLOCKS, block, location)
            if (offset, size) != place:
                yield f"{location}: another byte range than in {BLOCKS}"
            if zlib.crc32(images) != crc:
                yield f"{location} was changed (CRC-32 differs)"
        if not self._manifest.encoded:
            first = block * self._manifest.block_size
            counted = max(0, STATISTICS_SAMPLES - first) * self._manifest.image_bytes
            pixels = np.frombuffer(images, np.uint8)[:counted].reshape(-1, self._manifest.image_shape[2])
            for channel in range(pixels.shape[1]):
                histogram = np.bincount(pixels[:, channel], minlength=256)
                self._sums[:, channel] += [histogram @ np.arange(256), histogram @ np.arange(256) ** 2]

    def add(self, location: object, first: int, labels: NDArray[np.int64], rows: NDArray[np.int64]) -> Iterator[str]:
        """Count labels and rows, and compare them with the arrays; yield a line for each fault.

        Args:
            location: File and number of their block, for messages.
            first: Position of the first sample.
            labels: int64 [n].
            rows: int64 [n].
        """
        if len(labels) and (labels.min() < 0 or labels.max() >= len(self._counts)):
            yield f"{location}: a label outside 0 .. {len(self._counts) - 1}"
        elif len(rows) and rows.min() < 0:
            yield f"{location}: a row below 0"
        else:
            self._counts += np.bincount(labels, minlength=len(self._counts))
            self._rows.append(rows)
        for name, values in ((LABELS, labels), (ROWS, rows)):
            if name in self._arrays:
                differs = self._arrays[name][first : first + len(values)] != values
                if differs.any():
                    block = (first + int(np.argmax(differs))) // self._manifest.block_size
                    at = self._locate(name, block, location)
                    yield f"{at}: other {name.removesuffix('.npy')} than in {name if at == location else 'the shard'}"
        if BLOCKS in self._arrays:
            size = self._manifest.block_size
            for start in range(0, len(labels), size):
                numbers = b"".join(array[start : start + size].astype("<i8").tobytes() for array in (labels, rows))
                block = (first + start) // size
                if zlib.crc32(numbers) != self._arrays[BLOCKS]["numbers_crc32"][block]:
                    at = self._locate(BLOCKS, block, location)
                    yield f"{at}: another checksum of labels and rows than in {BLOCKS}"

    def _locate(self, name: str, block: int, location: object) -> object:
        """Return the place that a message names: the block in the array if the array was changed, else `location`."""
        return f"{self._changed[name]}: block {block_key(block)}" if name in self._changed else location

    def faults(self) -> Iterator[str]:
        """Yield the differences of the totals from the manifest. Only meaningful if every block was added."""
        if self._counts.tolist() != list(self._manifest.counts):
            yield "counts by class differ from the manifest"
        if len(np.unique(np.concatenate(self._rows))) != self._manifest.samples:
            yield "a source row is packed twice"
        statistics = self._manifest.statistics
        expected = statistics and (statistics.samples, [list(statistics.sums), list(statistics.squares)])
        if expected and expected != (min(self._manifest.samples, STATISTICS_SAMPLES), self._sums.tolist()):
            yield "statistics of the pixels differ from the manifest"


def check_hashes(directory: Path, manifest: Manifest) -> Iterator[str]:
    """Compare size and SHA-256 of every file with the manifest; yield a line for each that differs."""
    if manifest.version == 1 and manifest.store != "zarr":  # it does not list the indices
        for shard in manifest.shards:
            if not (index := directory / index_name(shard)).is_file():
                yield f"{index}: missing"
    for expected in manifest.everything:
        path = directory / expected.name
        if not path.is_file():
            yield f"{path}: missing"
            continue
        actual = RawFile.of(directory, expected.name)
        if actual.bytes != expected.bytes:
            yield f"{path}: {actual.bytes:,} bytes, the manifest says {expected.bytes:,}"
        elif actual.sha256 != expected.sha256:
            mark_unchecked(path)
            yield f"{path}: SHA-256 {actual.sha256[:16]}…, the manifest says {expected.sha256[:16]}…"


def corrupt_files(faults: list[str], hint: str) -> CorruptError:
    """Return the error that lists faults, one per line."""
    return CorruptError(found="\n       ".join(faults), expected="files as in the manifest", hint=hint)


def split_directories(directory: Path) -> list[Path]:
    """Return the splits of a packed data set, or the directory itself if it is one split."""
    present = [split for split in SPLITS if (directory / split).is_dir()]
    # A data set without its test split is damaged, one without a val split is not.
    return [directory / split for split in SPLITS if split in (*REQUIRED_SPLITS, *present)] if present else [directory]
