"""Pack a data set into shards.

python -m pipeline.shard emnist                              download if need be, pack ByClass
python -m pipeline.shard emnist --split balanced --raw DIR   from files that are there
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from pipeline.pack import DEFAULT_BLOCK_SIZE, check_is_ours, find_pack, pack
from pipeline.sources import Source, find_source, source_names
from shards.errors import UserError, run_command
from shards.manifest import Manifest

MAX_SEED = 2**63 - 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.shard",
        description="Pack a data set into shards of block records, train and test part.",
        epilog="Data sets: " + "; ".join(f"{name}: {find_source(name).description}" for name in source_names()),
    )
    parser.add_argument("source", metavar="SOURCE", help=f"data set: {', '.join(source_names())}")
    parser.add_argument("--split", help="official split, where the data set has several (the first is the default)")
    parser.add_argument("--raw", type=Path, metavar="DIR", help="directory of raw files (default data/raw/SOURCE)")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="packed set to make, with train/ and test/ (default data/shards/NAME)"
    )
    parser.add_argument("--block-size", type=int, default=DEFAULT_BLOCK_SIZE, metavar="N", help="images in a block")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the order of samples")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and stop")
    parser.add_argument("--force", action="store_true", help="replace a complete pack")
    return parser.parse_args()


def choose_source(arguments: argparse.Namespace) -> tuple[Source, str]:
    """The source and split that were asked for; raises `UserError` for unknown ones."""
    if arguments.source not in source_names():
        raise UserError(
            found=f"data set {arguments.source!r}",
            expected=f"one of {', '.join(source_names())}",
            hint="a new data set is one file in pipeline/sources/",
        )
    source = find_source(arguments.source)
    split = arguments.split or (source.splits[0] if source.splits else "")
    if split and split not in source.splits:
        raise UserError(
            found=f"split {split!r}",
            expected=f"one of {', '.join(source.splits)}" if source.splits else f"no --split: {source.name} has none",
            hint=f"python -m pipeline.shard {source.name}" + (f" --split {source.splits[0]}" if source.splits else ""),
        )
    return source, split


def check_numbers(arguments: argparse.Namespace) -> None:
    for option, value, low, high in (
        ("--block-size", arguments.block_size, 1, 1 << 20),
        ("--seed", arguments.seed, 0, MAX_SEED),
    ):
        if not low <= value <= high:
            raise UserError(
                found=f"{option} {value}", expected=f"a number {low} .. {high}", hint="leave it out for the default"
            )


def describe(manifest: Manifest) -> str:
    raw_bytes = manifest.samples * manifest.image_bytes
    return (
        f"  {manifest.part:5}  {manifest.samples:,} images of {len(manifest.classes)} classes in "
        f"{len(manifest.shards)} shards, {manifest.packed_bytes / 1e6:,.1f} MB "
        f"({manifest.packed_bytes / raw_bytes:.3f} times the raw pixels)"
    )


def main() -> int:
    arguments = parse_arguments()
    check_numbers(arguments)
    source, split = choose_source(arguments)
    name = f"{source.name}-{split}" if split else source.name
    raw = arguments.raw or Path("data/raw") / source.name
    out = arguments.out or Path("data/shards") / name
    if arguments.raw and source.raw_files and arguments.raw.exists() and not arguments.raw.is_dir():
        raise UserError(found=f"--raw {raw}, a file", expected="a directory", hint=f"--raw {raw.parent}")
    if arguments.raw and not source.raw_files:
        print(f"warning: --raw has no effect, {source.name} reads no files", file=sys.stderr)
    settings = {"dataset": source.name, "split": split, "block_size": arguments.block_size, "seed": arguments.seed}
    if arguments.dry_run:
        check_is_ours(out)
        there = None if arguments.force else find_pack(out, *settings.values())
        print(f"{name}: would {'leave the complete pack alone' if there else source.plan(raw, split)}")
        if not there:
            print(f"{name}: would write {out}/train and {out}/test")
        return 0
    start = time.perf_counter()
    manifests, packed = pack(lambda: source.load(raw, split), out, **settings, force=arguments.force)
    seconds = time.perf_counter() - start
    images = sum(manifest.samples for manifest in manifests)
    print(
        f"{name}: packed {images:,} images in {seconds:.1f} s ({images / seconds:,.0f} images/s)"
        if packed
        else f"{name}: already packed (--force packs again)"
    )
    for manifest in manifests:
        print(describe(manifest))
    print(f"  in     {out}")
    return 0


if __name__ == "__main__":
    run_command(main)
