"""Check packed shards: re-count, re-hash and decode every block, and name what is wrong.

    python -m shards.verify DIR        DIR is a packed set (train, test, perhaps val) or one split of it

Exit status 0 if all is as it was packed, 2 otherwise.
"""

from __future__ import annotations

import argparse

from shards.cli import program_name, run_command
from shards.errors import CorruptError
from shards.remote.sets import resolve_dataset
from shards.verify.check import check_split, split_directories


def main() -> int:
    parser = argparse.ArgumentParser(prog=program_name("shards.verify"), description=__doc__.split("\n")[0])
    parser.add_argument("place", metavar="DIR", help="a packed set or one split of it, a directory or an address")
    directory = resolve_dataset(parser.parse_args().place)
    all_faults = []
    for split in split_directories(directory):
        manifest, faults = check_split(split)
        all_faults += faults
        print(
            f"{'damaged' if faults else 'whole  '}  {split}: {manifest.samples:,} samples of "
            f"{len(manifest.classes)} classes in {len(manifest.shards)} shards, {manifest.packed_bytes:,} bytes"
        )
    if all_faults:
        raise CorruptError(
            found="\n       ".join(all_faults),
            expected="every byte as the manifest tells",
            hint="pack again (python -m pipeline.shard SOURCE --out DIR --force), or get the files again",
        )
    return 0


if __name__ == "__main__":
    run_command(main)
