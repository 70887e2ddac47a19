"""The full check of a packed split.

It decodes record by record with code that training does not use: slow and simple.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import TypeAlias

from shards.errors import CorruptError
from shards.manifest import REQUIRED_SPLITS, SPLITS, Manifest, RawFile
from shards.verify.sample_counts import SampleCounter

CheckStore: TypeAlias = Callable[[Path, Manifest, SampleCounter], Iterator[str]]
"""The check of one kind of store: `check_store(directory, manifest, counter)` of `shards/verify/STORE.py`.

It decodes every block of the split in `directory`, adds the labels and rows of each intact block to `counter`, and
yields a line for each fault: `FILE: block NUMBER: REASON`, where NUMBER is `shards.stores.base.block_key`. The content
of the files cannot make it raise. It holds a few blocks in memory. It skips missing files: `check_hashes` reports
missing files, sizes and hashes.
"""


def check_split(directory: Path) -> tuple[Manifest, list[str]]:
    """Check one split completely. Returns its manifest and a line for each fault."""
    manifest = Manifest.read(directory)
    counter = SampleCounter(manifest)
    check_store: CheckStore = import_module(f"shards.verify.{manifest.store}").check_store
    faults = [*check_hashes(directory, manifest), *check_store(directory, manifest, counter)]
    if not faults:
        faults = [f"{directory}: {fault}" for fault in counter.faults()]
    return manifest, faults


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
            yield f"{path}: SHA-256 {actual.sha256[:16]}…, the manifest says {expected.sha256[:16]}…"


def corrupt_files(faults: list[str], hint: str) -> CorruptError:
    """Return the error that lists faults, one per line."""
    return CorruptError(found="\n       ".join(faults), expected="files as in the manifest", hint=hint)


def split_directories(directory: Path) -> list[Path]:
    """Return the splits of a packed data set, or the directory itself if it is one split."""
    present = [split for split in SPLITS if (directory / split).is_dir()]
    # A data set without its test split is damaged, one without a val split is not.
    return [directory / split for split in SPLITS if split in (*REQUIRED_SPLITS, *present)] if present else [directory]
