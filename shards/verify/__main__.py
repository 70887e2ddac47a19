"""Check packed shards: count, hash and decode every block, and list the damaged ones.

    python -m shards.verify DIR        DIR is a packed data set (train, test, perhaps val) or one split of it

The exit status is 0 if every file is as it was packed, 2 otherwise.
"""

from __future__ import annotations

from shards.atomic import detect_replacement
from shards.cli import command_parser, plural, run_command
from shards.manifest import manifest_paths
from shards.remote.datasets import resolve_dataset
from shards.verify.check import check_split, corrupt_files, split_directories


def main() -> int:
    """Run the command. Returns the exit status."""
    parser = command_parser("shards.verify", __doc__)
    parser.add_argument("place", metavar="DIR", help="directory or address of a packed data set, or of one split of it")
    directory = resolve_dataset(parser.parse_args().place, whole=True)
    all_faults = []
    with detect_replacement(*manifest_paths(directory)):
        for split in split_directories(directory):
            manifest, faults = check_split(split)
            all_faults += faults
            shards = plural(len(manifest.shards), "shard")
            print(
                f"{'damaged ' if faults else 'complete'}  {split}: {manifest.samples:,} samples of "
                f"{len(manifest.classes)} classes in {shards}, {manifest.packed_bytes:,} bytes"
            )
    if all_faults:
        hint = "pack again (python -m pipeline.shard SOURCE --out DIR --force), or download the files again"
        raise corrupt_files(all_faults, hint)
    return 0


if __name__ == "__main__":
    run_command(main)
