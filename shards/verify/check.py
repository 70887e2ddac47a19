"""The full check of a packed split.

The decoding here is deliberately not the one that training uses: slow, plain and record by record.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

from shards.manifest import REQUIRED_SPLITS, SPLITS, Manifest, StoreKind
from shards.verify.sample_counts import SampleCounter

CheckStore: TypeAlias = Callable[[Path, Manifest, SampleCounter], Iterator[str]]
"""The deep check of one kind of store: `check_store(directory, manifest, counter)` of `shards/verify/STORE.py`.

Decodes every block of the split in `directory`, adds the labels and rows of each sound one to `counter` (and passes on
the faults that it yields), and yields a line for each fault, `FILE: block NUMBER: what is wrong`, FILE being the path
and NUMBER `shards.stores.base.block_key`. Raises nothing because of what is in the files, holds a few blocks in memory,
and skips files that are missing: those, their sizes and their hashes are checked here.
"""


def check_split(directory: Path) -> tuple[Manifest, list[str]]:
    """Check one split fully. Returns its manifest and a line for each fault (none if it is whole)."""
    manifest = Manifest.read(directory)
    counter = SampleCounter(manifest)
    faults = [*check_hashes(directory, manifest), *_check_of(manifest.store)(directory, manifest, counter)]
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
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if path.stat().st_size != expected.bytes:
            yield f"{path}: {path.stat().st_size:,} bytes, the manifest says {expected.bytes:,}"
        elif digest != expected.sha256:
            yield f"{path}: SHA-256 {digest[:16]}…, the manifest says {expected.sha256[:16]}…"


def _check_of(store: StoreKind) -> CheckStore:
    if store == "zarr":
        from shards.verify.zarr import check_store
    elif store == "records":
        from shards.verify.records import check_store
    else:
        from shards.verify.tar import check_store
    return check_store


def split_directories(directory: Path) -> list[Path]:
    """The splits of a packed set, or the directory itself if it is one split."""
    there = [split for split in SPLITS if (directory / split).is_dir()]
    # A set without its test split is damaged, one without a val split is not.
    return [directory / split for split in SPLITS if split in (*REQUIRED_SPLITS, *there)] if there else [directory]
