"""Pack a data set into shards.

python -m pipeline.shard emnist                              download if need be, pack ByClass
python -m pipeline.shard emnist --split balanced --raw DIR   from files that are there
python -m pipeline.shard folder --raw DIR --size 64          anyone's pictures, in a directory for each class
torchrun --nproc_per_node=4 -m pipeline.shard ...            shared out among processes, on one machine or many
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.datasets import find_source, source_names
from pipeline.datasets.base import DatasetSource
from pipeline.packing.output import open_output
from pipeline.packing.pack import DEFAULT_BLOCK_SIZE, UNREADABLE, Packed, PackSettings, find_pack, pack
from pipeline.packing.ranks import ProcessGroup, init_process_group
from pipeline.packing.splits import make_splits
from pipeline.readers.raw_split import RawSplit, SourceOptions
from shards.cli import USER_ERROR_STATUS, program_name, run_command
from shards.errors import UserError
from shards.manifest import Manifest
from shards.remote.sets import is_remote, resolve_dataset, resolve_files

MAX_SEED = 2**63 - 1
MAX_SIDE = 4096


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=program_name("pipeline.shard"),
        description="Pack a data set into shards: train and test part, perhaps a val part.",
        epilog="Data sets: " + "; ".join(f"{name}: {find_source(name).description}" for name in source_names()),
    )
    add = parser.add_argument
    add("source", metavar="SOURCE", help=f"data set: {', '.join(source_names())}")
    add("--split", help="official split, where the data set has several (the first is the default)")
    add("--raw", metavar="PLACE", help="raw files: a directory, file or address (default data/raw/SOURCE)")
    add("--out", metavar="PLACE", help="packed set to make, a directory or address (default data/shards/NAME)")
    add("--dry-run", action="store_true", help="say what would be done, and stop")
    add("--force", action="store_true", help="replace a complete pack")
    add("--workers", type=int, metavar="N", help="processes that read and write (default: the cores there are)")

    stored = parser.add_argument_group("how they are stored")
    add = stored.add_argument
    add("--store", choices=("tar", "zarr", "records"), help="tar blocks (default), zarr, or picture files as they are")
    add("--compression", choices=("zstd", "none"), default="zstd", help="of a zarr store (default zstd)")
    add("--block-size", type=int, default=DEFAULT_BLOCK_SIZE, metavar="N", help="images in a block")
    add("--seed", type=int, default=0, metavar="N", help="seed of the order of samples and of all choices")

    pictures = parser.add_argument_group("picture files")
    add = pictures.add_argument
    add("--size", metavar="N or HxW", help="store all pictures at one size, in pixels")
    add("--fit", choices=("pad", "crop", "stretch"), default="pad", help="how they get that size (default pad)")
    add("--color", choices=("auto", "gray", "rgb"), default="auto", help="channels to store (default: as they are)")
    add("--skip-bad", action="store_true", help=f"leave unreadable pictures out, and list them in {UNREADABLE}")
    add("--image-column", default="", metavar="NAME", help="of a table, where it cannot be guessed")
    add("--label-column", default="", metavar="NAME", help="of a table, where it cannot be guessed")

    parts = parser.add_argument_group("parts")
    add = parts.add_argument
    add("--test-fraction", type=float, metavar="F", help="share set aside for testing, where a set has no test part")
    add("--val-fraction", type=float, metavar="F", help="share of the train part to set aside as a val part")
    add(
        "--stratify", default="", metavar="COLUMN", help="choose in proportion by label and this column (else by label)"
    )
    add("--subset", type=float, default=1.0, metavar="F", help="share of the train part to keep, by label")
    add(
        "--near-duplicates",
        choices=("report", "remove"),
        help="find train images that are in test too, and list them or leave them out",
    )
    return parser.parse_args()


def choose_source(arguments: argparse.Namespace) -> tuple[DatasetSource, str]:
    """The source and split that were asked for; raises `UserError` for unknown ones."""
    if arguments.source not in source_names():
        near = difflib.get_close_matches(arguments.source, source_names(), n=1)
        raise UserError(
            found=f"data set {arguments.source!r}",
            expected=f"one of {', '.join(source_names())}",
            hint=(f"did you mean {near[0]}? " if near else "")
            + "for pictures of your own: python -m pipeline.shard folder --raw DIR",
        )
    source = find_source(arguments.source)
    split = arguments.split or (source.splits[0] if source.splits else "")
    if split and split not in source.splits:
        raise UserError(
            found=f"split {split!r}",
            expected=f"one of {', '.join(source.splits)}" if source.splits else f"no --split: {source.name} has none",
            hint=f"python -m pipeline.shard {source.name}" + (f" --split {source.splits[0]}" if source.splits else ""),
        )
    if source.generic and not arguments.raw:
        raise UserError(
            found=f"{source.name} without --raw",
            expected=f"the files to pack ({source.description})",
            hint=f"python -m pipeline.shard {source.name} --raw PLACE",
        )
    return source, split


def check_numbers(arguments: argparse.Namespace) -> None:
    for option, value, low, high in (
        ("--block-size", arguments.block_size, 1, 1 << 20),
        ("--seed", arguments.seed, 0, MAX_SEED),
        ("--workers", arguments.workers, 1, 1024),
        ("--test-fraction", arguments.test_fraction, 0, 1),
        ("--val-fraction", arguments.val_fraction, 0, 1),
        ("--subset", arguments.subset, 0, 1),
    ):
        if value is not None and not low <= value <= high:
            raise UserError(
                found=f"{option} {value}", expected=f"a number {low} .. {high}", hint="leave it out for the default"
            )


def parse_size(text: str | None) -> tuple[int, int] | None:
    """`64` or `48x64` (height x width) as (H, W)."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    sides = tuple(int(side) for side in (match[1], match[2] or match[1])) if match else (0, 0)
    if not all(1 <= side <= MAX_SIDE for side in sides):
        raise UserError(
            found=f"--size {text}", expected=f"a side, or height x width, of 1 .. {MAX_SIDE} pixels", hint="--size 64"
        )
    return sides


def heeded_options(arguments: argparse.Namespace, source: DatasetSource) -> tuple[dict[str, Any], dict[str, Any]]:
    """What of the request this source heeds, and all options as the manifest keeps them; warns of those without effect.

    Raises `UserError` for a malformed one.
    """
    asked = {
        "size": parse_size(arguments.size),
        "fit": arguments.fit,
        "color": arguments.color,
        "encoded": arguments.store == "records",
        "image_column": arguments.image_column,
        "label_column": arguments.label_column,
    }
    defaults = SourceOptions(Path())
    given = {name: value for name, value in asked.items() if value != getattr(defaults, name)}
    if given.pop("encoded", False) and "encoded" not in source.options:
        raise UserError(
            found=f"--store records for {source.name}",
            expected="tar or zarr: its images are arrays of one size, not picture files",
            hint="leave --store out",
        )
    for name in given:
        if name not in source.options:
            warn(f"--{name.replace('_', '-')} has no effect on {source.name}")
    if arguments.stratify and not (arguments.val_fraction or arguments.test_fraction) and arguments.subset == 1:
        warn("--stratify has no effect without --test-fraction, --val-fraction or --subset")
    if arguments.compression != "zstd" and arguments.store != "zarr":
        warn("--compression has no effect without --store zarr")
    heeded = {name: value for name, value in asked.items() if name in source.options}
    kept = {name: value for name, value in given.items() if name in source.options}
    if "size" in kept:
        kept["size"] = "x".join(map(str, kept["size"]))
    untouched = {"test_fraction": None, "val_fraction": None, "stratify": "", "subset": 1.0}
    kept |= {name: getattr(arguments, name) for name, off in untouched.items() if getattr(arguments, name) != off}
    if arguments.near_duplicates == "remove":
        kept["near_duplicates"] = "remove"
    if arguments.skip_bad:
        kept["skip_bad"] = 1
    return heeded, kept


def warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


def describe(manifest: Manifest) -> str:
    shards = f"{len(manifest.shards)} shard{'s' if len(manifest.shards) > 1 else ''}"
    if manifest.encoded:
        size = f"{manifest.packed_bytes / manifest.samples:,.0f} bytes a picture"
    else:
        size = f"{manifest.packed_bytes / (manifest.samples * manifest.image_bytes):.3f} times the raw pixels"
    return (
        f"  {manifest.split:5}  {manifest.samples:,} images of {len(manifest.classes)} classes in "
        f"{shards}, {manifest.packed_bytes / 1e6:,.1f} MB ({size})"
    )


def loading(
    arguments: argparse.Namespace,
    source: DatasetSource,
    request: SourceOptions,
    name: str,
    group: ProcessGroup,
    say: Callable[[str], None],
) -> Callable[[], tuple[RawSplit, ...]]:
    """What reads the raw parts and arranges them as asked."""

    def load() -> tuple[RawSplit, ...]:
        parts = make_splits(
            source.load(request),
            test_fraction=arguments.test_fraction,
            val_fraction=arguments.val_fraction,
            subset=arguments.subset,
            stratify=arguments.stratify,
            seed=arguments.seed,
        )
        if arguments.near_duplicates:
            # Importing scipy.fft takes 0.2 s of CPU time, a quarter of packing EMNIST ByClass.
            from pipeline.dedup.between_splits import find_duplicates, remove_duplicates, summarize, write_report

            # Once for all ranks: on unlike processors they might differ over a borderline pair.
            found = group.rank0(lambda: find_duplicates(parts))
            say(f"  {summarize(found)}")
            if arguments.near_duplicates == "remove":
                parts = remove_duplicates(parts, found)
            else:
                report = Path(f"{name}.near-duplicates.csv")
                group.rank0(lambda: write_report(found, report))
                say(f"  listed in {report}")
        return parts

    return load


def run(arguments: argparse.Namespace, group: ProcessGroup) -> None:
    check_numbers(arguments)
    source, split = choose_source(arguments)
    heeded, options = heeded_options(arguments, source)
    if arguments.raw and not source.raw_files:
        warn(f"--raw has no effect, {source.name} reads no files")
    raw = Path("data/raw") / source.name
    if arguments.raw:
        raw = group.barrier_run(lambda: resolve_files(arguments.raw)) if source.raw_files else Path(arguments.raw)
        if source.raw_files and not (source.raw_file or source.generic) and raw.exists() and not raw.is_dir():
            raise UserError(found=f"--raw {raw}, a file", expected="a directory", hint=f"--raw {raw.parent}")
    dataset = Path(arguments.raw).name.partition(".")[0] or source.name if source.generic else source.name
    name = f"{dataset}-{split}" if split else dataset
    out = arguments.out or f"data/shards/{name}"
    out = out if is_remote(out) else resolve_dataset(out)
    request = SourceOptions(raw, split, **heeded)
    settings = {
        "dataset": dataset,
        "split": split,
        "block_size": arguments.block_size,
        "seed": arguments.seed,
        "store": arguments.store or "tar",
        "compression": arguments.compression,
        "options": options,
    }

    def say(text: str) -> None:
        if group.rank == 0:
            print(text, flush=True)

    if arguments.dry_run:
        there = group.rank0(lambda: find_pack(open_output(out), PackSettings(**settings), out))
        there = there and not arguments.force
        say(f"{name}: would {'leave the complete pack alone' if there else source.plan(request)}")
        if not there:
            say(f"{name}: would write {out}/train and {out}/test")
        return
    start = time.perf_counter()
    packed = pack(
        loading(arguments, source, request, name, group, say),
        out,
        **settings,
        skip_bad=arguments.skip_bad,
        workers=arguments.workers,
        group=group,
        force=arguments.force,
    )
    report(name, packed, time.perf_counter() - start, out, say)


def report(name: str, packed: Packed, seconds: float, out: Path | str, say: Callable[[str], None]) -> None:
    images = sum(manifest.samples for manifest in packed.manifests)
    say(
        f"{name}: packed {images:,} images in {seconds:.1f} s ({images / seconds:,.0f} images/s)"
        if packed.now
        else f"{name}: already packed (--force packs again)"
    )
    for manifest in packed.manifests:
        say(describe(manifest))
    if packed.skipped:
        say(f"  left out {packed.skipped:,} unreadable pictures, listed in {out}/{UNREADABLE}")
    say(f"  in     {out}")


def main() -> int:
    arguments = parse_arguments()
    with init_process_group() as group:
        try:
            run(arguments, group)
        except UserError:
            # Every rank meets it; rank 0 speaks of it.
            if group.rank == 0:
                raise
            return USER_ERROR_STATUS
    return 0


if __name__ == "__main__":
    run_command(main)
