"""Check packed shards: re-count, re-hash and decode every block, and name what is wrong.

    python -m shards.verify DIR        DIR is a packed set (train, test, perhaps val) or one part of it

Exit status 0 if all is as it was packed, 2 otherwise. The decoding here is deliberately not the one that
training uses: slow, plain and record by record.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

from shards.errors import UserError
from shards.cli import run_command
from shards.manifest import ALL_PARTS, PARTS, Manifest, StoreKind
from shards.remote.sets import resolve_dataset
from shards.verify.sample_counts import Tally

CheckStore: TypeAlias = Callable[[Path, Manifest, Tally], Iterator[str]]
"""The deep check of one kind of store: `check_store(directory, manifest, tally)` of `shards/verify_STORE.py`.

Decodes every block of the part in `directory`, adds the labels and rows of each sound one to `tally` (and passes on
the faults that it yields), and yields a line for each fault, `FILE: block NUMBER: what is wrong`, FILE being the path
and NUMBER `shards.stores.base.block_key`. Raises nothing because of what is in the files, holds a few blocks in memory, and
skips files that are missing: those, their sizes and their hashes are checked here.
"""


def check_part(directory: Path) -> tuple[Manifest, list[str]]:
    """Check one part fully. Returns its manifest and a line for each fault (none if it is whole)."""
    manifest = Manifest.read(directory)
    tally = Tally(manifest)
    faults = [*check_hashes(directory, manifest), *_check_of(manifest.store)(directory, manifest, tally)]
    if not faults:
        faults = [f"{directory}: {fault}" for fault in tally.faults()]
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


def parts_of(directory: Path) -> list[Path]:
    """The parts of a packed set, or the directory itself if it is one part."""
    there = [part for part in ALL_PARTS if (directory / part).is_dir()]
    # A set without its test part is damaged, one without a val part is not.
    return [directory / part for part in ALL_PARTS if part in (*PARTS, *there)] if there else [directory]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m shards.verify", description=__doc__.split("\n")[0])
    parser.add_argument("place", metavar="DIR", help="a packed set or one part of it, a directory or an address")
    directory = resolve_dataset(parser.parse_args().place)
    all_faults = []
    for part in parts_of(directory):
        manifest, faults = check_part(part)
        all_faults += faults
        print(
            f"{'damaged' if faults else 'whole  '}  {part}: {manifest.samples:,} samples of "
            f"{len(manifest.classes)} classes in {len(manifest.shards)} shards, {manifest.packed_bytes:,} bytes"
        )
    if all_faults:
        raise UserError(
            found="\n           ".join(all_faults),
            expected="every byte as the manifest tells",
            hint="pack again (python -m pipeline.shard SOURCE --out DIR --force), or get the files again",
        )
    return 0


if __name__ == "__main__":
    run_command(main)
