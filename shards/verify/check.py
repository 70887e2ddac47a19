"""The full check of a packed split.

It decodes record by record with code that training does not use: slow and simple.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shards.atomic import detect_replacement
from shards.errors import CorruptError
from shards.manifest import MANIFEST_NAME, REQUIRED_SPLITS, SPLITS, Manifest, RawFile
from shards.remote.cache import mark_unchecked


def check_split(directory: Path) -> tuple[Manifest, list[str]]:
    """Check one split completely.

    The check of a store is `check_store(directory, manifest, counter)` of `shards/verify/STORE.py`. It decodes every
    block of the split, adds the labels and rows of each intact block to `counter`, and yields a line for each fault:
    `FILE: block NUMBER: REASON`, where NUMBER is `shards.stores.base.block_key`. The content of the files cannot make
    it raise. It holds a few blocks in memory. It skips missing files: `check_hashes` reports missing files, sizes and
    hashes.

    Returns:
        The manifest, and a line for each fault.
    """
    with detect_replacement(directory / MANIFEST_NAME):
        manifest = Manifest.read(directory)
        counter = SampleCounter(manifest)
        check_store = import_module(f"shards.verify.{manifest.store}").check_store
        faults = [*check_hashes(directory, manifest), *check_store(directory, manifest, counter)]
    return manifest, faults or [f"{directory}: {fault}" for fault in counter.faults()]


class SampleCounter:
    """Count labels and rows block by block, and compare the totals with the manifest."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._counts = np.zeros(len(manifest.classes), np.int64)
        self._rows: list[NDArray[np.int64]] = []

    def add(self, location: object, labels: NDArray[np.int64], rows: NDArray[np.int64]) -> Iterator[str]:
        """Count the samples of one block. `labels` and `rows` are int64 [n]. Yields a line if one is invalid."""
        if len(labels) and (labels.min() < 0 or labels.max() >= len(self._counts)):
            yield f"{location}: a label outside 0 .. {len(self._counts) - 1}"
        elif len(rows) and rows.min() < 0:
            yield f"{location}: a row below 0"
        else:
            self._counts += np.bincount(labels, minlength=len(self._counts))
            self._rows.append(rows)

    def faults(self) -> Iterator[str]:
        """Yield the differences of the totals from the manifest. Only meaningful if every block was added."""
        if self._counts.tolist() != list(self._manifest.counts):
            yield "counts by class differ from the manifest"
        if len(np.unique(np.concatenate(self._rows))) != self._manifest.samples:
            yield "a source row is packed twice"


def check_hashes(directory: Path, manifest: Manifest) -> Iterator[str]:
    """Compare size and SHA-256 of every file with the manifest; yield a line for each that differs."""
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
