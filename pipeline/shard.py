"""Pack a data set into shards, with the splits train, test and (optionally) val.

python -m pipeline.shard emnist                              download if required, pack ByClass
python -m pipeline.shard emnist --split balanced --raw DIR   read files that you have
python -m pipeline.shard folder --raw DIR --size 64          your own images, one directory per class
python -m pipeline.shard hf USER/NAME                        a data set on the Hugging Face Hub
torchrun --nproc_per_node=4 -m pipeline.shard ...            several processes, on one machine or many
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.common.process_group import ProcessGroup, init_process_group, report_errors_on_main
from pipeline.datasets import find_source, source_names
from pipeline.datasets.base import DatasetSource
from pipeline.packing.output import open_output
from pipeline.packing.pack import DEFAULT_BLOCK_SIZE, UNREADABLE, Packed, PackSettings, find_pack, pack
from pipeline.packing.splits import make_splits, read_exclusions
from pipeline.readers.formats.csv import CsvTable
from pipeline.readers.naming import warn
from pipeline.readers.raw_split import RawSplit, SourceOptions
from shards.atomic import check_is_file
from shards.cli import command_parser, plural, run_command
from shards.errors import UserError, printable, quote
from shards.manifest import Manifest
from shards.remote.datasets import is_remote, resolve_dataset, resolve_files

MAX_SIDE = 4096
_RANGES = {
    "block_size": (1, 1 << 20),
    "seed": (0, 2**63 - 1),
    "workers": (1, 1024),
    "test_fraction": (0, 1),
    "val_fraction": (0, 1),
    "subset": (0, 1),
}
_SPLIT_DEFAULTS = {"test_fraction": None, "val_fraction": None, "stratify": "", "subset": 1.0}


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = command_parser(
        "pipeline.shard",
        __doc__,
        epilog="Data sets: " + "; ".join(f"{name}: {find_source(name).description}" for name in source_names()),
    )
    parser.add_argument("source", metavar="SOURCE", help=f"data set: {', '.join(source_names())}")
    parser.add_argument(
        "name", nargs="?", metavar="NAME", help="for hf: the data set on the Hugging Face Hub, USER/NAME"
    )
    add = parser.add_argument_group("input and output").add_argument
    add("--split", metavar="VARIANT", help="variant of the data set, if it has several (default: the first)")
    add("--raw", metavar="PATH", help="raw files: a directory, file or address (default: data/raw/SOURCE)")
    add(
        "--out",
        metavar="PATH",
        help="packed set: a directory or address (default: data/shards/ and the name of the data set; for "
        "folder, npz and parquet that of --raw, for hf that of NAME; -VARIANT is appended if there is one)",
    )
    add("--dry-run", action="store_true", help="print what would be done, and exit")
    add("--force", action="store_true", help="replace a complete pack")
    add("--workers", type=int, metavar="N", help="number of processes (default: number of CPUs)")

    add = parser.add_argument_group("storage format").add_argument
    add("--store", choices=("tar", "zarr", "records"), help="tar blocks (default), zarr, or encoded image files")
    add("--compression", choices=("zstd", "none"), default="zstd", help="compression of a zarr store (default: zstd)")
    add(
        "--block-size",
        type=int,
        default=DEFAULT_BLOCK_SIZE,
        metavar="N",
        help="images per block (default: %(default)s)",
    )
    add("--seed", type=int, default=0, metavar="N", help="seed of the order of images and of all choices (default: 0)")

    add = parser.add_argument_group("image files").add_argument
    add("--size", metavar="N or HxW", help="size in pixels at which images are stored (default: their own)")
    add("--fit", choices=("pad", "crop", "stretch"), default="pad", help="how images are resized (default: pad)")
    add("--color", choices=("auto", "gray", "rgb"), default="auto", help="channels to store (default: as in the files)")
    add(
        "--skip-bad",
        action="store_true",
        help=f"skip unreadable images (listed in {UNREADABLE}), rows without a label, directories beside the splits",
    )
    add("--image-column", default="", metavar="NAME", help="table column of images, if it cannot be detected")
    add("--label-column", default="", metavar="NAME", help="table column of labels, if it cannot be detected")

    add = parser.add_argument_group("splits").add_argument
    add("--test-fraction", type=float, metavar="F", help="fraction for the test split, if the data set has none")
    add("--val-fraction", type=float, metavar="F", help="fraction of the train split for a val split")
    add(
        "--stratify", default="", metavar="COLUMN", help="choose in proportion by label and this column (else by label)"
    )
    add("--subset", type=float, default=1.0, metavar="F", help="fraction of the train split to keep, by label")
    add("--exclude", type=Path, metavar="FILE", help="CSV of images to leave out (columns part and row)")
    add(
        "--near-duplicates",
        choices=("report", "remove", "report-all", "remove-all"),
        help="list or remove train images that are also in test; with -all, also those that repeat another train image",
    )
    return parser.parse_args()


def choose_source(arguments: argparse.Namespace) -> tuple[DatasetSource, str]:
    """Return the requested data set and its variant.

    Raises:
        UserError: If there is no such data set or variant.
    """
    name = arguments.source
    if name not in source_names():
        near = difflib.get_close_matches(name, source_names(), n=1)
        raise UserError(
            found=f"data set {name!r}",
            expected=f"one of {', '.join(source_names())}",
            hint=(f"did you mean {near[0]}? " if near else "")
            + "for your own images: python -m pipeline.shard folder --raw DIR",
        )
    source = find_source(name)
    variants = source.variants
    variant = arguments.split or (variants[0] if variants else "")
    if (source.address is not None) != bool(arguments.name):
        raise UserError(
            found=f"{name} {arguments.name}" if arguments.name else f"{name} without a name",
            expected="no second word" if arguments.name else "the name of a data set on the Hugging Face Hub",
            hint=f"python -m pipeline.shard {name} "
            + (f"--raw {quote(arguments.name)}" if arguments.name else "ylecun/mnist"),
        )
    if variant and variant not in variants and source.address is None:
        raise UserError(
            found=f"split {variant!r}",
            expected=f"one of {', '.join(variants)}" if variants else f"no --split: {name} has none",
            hint=f"python -m pipeline.shard {name}" + (f" --split {variants[0]}" if variants else ""),
        )
    if source.generic and source.address is None and not arguments.raw:
        raise UserError(
            found=f"{name} without --raw",
            expected=f"the files to pack ({source.description})",
            hint=f"python -m pipeline.shard {name} --raw PATH",
        )
    if not source.has_test and arguments.test_fraction is None:  # before a long download
        given = {"--split": arguments.split, "--raw": arguments.raw}
        options = [f"{option} {quote(value)}" for option, value in given.items() if value is not None]
        raise UserError(
            found=f"{name} without --test-fraction",
            expected="a fraction for testing, because the data set has no test split",
            hint=" ".join(["python -m pipeline.shard", name, *options, "--test-fraction 0.1"]),
        )
    return source, variant


def check_ranges(arguments: argparse.Namespace) -> None:
    """Raise `UserError` if a number is out of range."""
    for name, (low, high) in _RANGES.items():
        value = getattr(arguments, name)
        if value is not None and not low <= value <= high:
            option = f"--{name.replace('_', '-')}"
            raise UserError(
                found=f"{option} {value}",
                expected=f"a number {low} .. {high}",
                hint=f"{option} 0.2" if name.endswith("_fraction") else f"omit {option} for the default",
            )


def parse_size(text: str | None) -> tuple[int, int] | None:
    """Return `64` or `48x64` (height x width) as (H, W)."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,9})(?:x(\d{1,9}))?", text)
    height, width = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE):
        raise UserError(
            found=f"--size {text}", expected=f"a side, or height x width, of 1 .. {MAX_SIDE} pixels", hint="--size 64"
        )
    return height, width


def source_options(
    arguments: argparse.Namespace, source: DatasetSource, raw: Path, variant: str
) -> tuple[SourceOptions, dict[str, Any]]:
    """Return the options of the data set, and all options as the manifest records them; warn of unused ones.

    Raises:
        UserError: If an option does not fit the data set.
    """
    options = SourceOptions(
        raw,
        variant,
        size=parse_size(arguments.size),
        fit=arguments.fit,
        color=arguments.color,
        encoded=arguments.store == "records",
        image_column=arguments.image_column,
        label_column=arguments.label_column,
        skip_bad=arguments.skip_bad,
    )
    if options.encoded and "encoded" not in source.options:
        raise UserError(
            found=f"--store records for {source.name}",
            expected="tar or zarr: its images are arrays of one size, not image files",
            hint="omit --store",
        )
    # Data sets of several users of the Hub may have one name, and so one default output.
    recorded: dict[str, Any] = {"name": arguments.name} if arguments.name else {}
    for name in ("size", "fit", "color", "image_column", "label_column"):
        value = getattr(options, name)
        if value != getattr(SourceOptions, name):
            if name in source.options:
                recorded[name] = "x".join(map(str, value)) if name == "size" else value
            else:
                warn(f"--{name.replace('_', '-')} has no effect on {source.name}")
    if arguments.stratify and not (arguments.val_fraction or arguments.test_fraction) and arguments.subset == 1:
        warn("--stratify has no effect without --test-fraction, --val-fraction or --subset")
    if arguments.compression != "zstd" and arguments.store != "zarr":
        warn("--compression has no effect without --store zarr")
    for name, default in _SPLIT_DEFAULTS.items():
        if (value := getattr(arguments, name)) != default:
            recorded[name] = value
    if arguments.near_duplicates in ("remove", "remove-all"):
        recorded["near_duplicates"] = arguments.near_duplicates
    if arguments.skip_bad:
        recorded["skip_bad"] = 1
    return options, recorded


def describe(manifest: Manifest) -> str:
    """Return a line about a packed split: images, classes, shards and size."""
    classes, shards = len(manifest.classes), len(manifest.shards)
    if manifest.encoded:
        size = f"{manifest.packed_bytes / manifest.samples:,.0f} bytes/image"
    else:
        size = f"{manifest.packed_bytes / (manifest.samples * manifest.image_bytes):.3f} times the raw pixels"
    return (
        f"  {manifest.split:5}  {plural(manifest.samples, 'image')} of {plural(classes, 'class', 'es')} in "
        f"{plural(shards, 'shard')}, {manifest.packed_bytes / 1e6:,.1f} MB ({size})"
    )


class Command:
    """One call of the command, on one rank.

    Args:
        arguments: The parsed command line.
        group: The ranks.
    """

    def __init__(self, arguments: argparse.Namespace, group: ProcessGroup) -> None:
        self._arguments = arguments
        self._group = group
        check_ranges(arguments)
        source, variant = choose_source(arguments)
        self._source = source
        options, recorded = source_options(arguments, source, self._find_raw(), variant)
        self._files = arguments.name or arguments.raw
        dataset = re.split(r"[.?#]", os.path.basename(os.path.abspath(self._files)))[0] if source.generic else ""
        dataset = printable(dataset) or source.name  # the name of the files may have control characters
        self._excluded: CsvTable | None = None
        if arguments.exclude:
            self._excluded, recorded["exclude"] = read_exclusions(arguments.exclude)
        self._name = f"{dataset}-{variant}" if variant else dataset
        out = arguments.out or f"data/shards/{self._name}"
        self._out: Path | str = out if is_remote(out) else resolve_dataset(out)
        self._options = replace(options, out=self._out if isinstance(self._out, Path) else None)
        self._settings = PackSettings(
            dataset=dataset,
            variant=variant,
            block_size=arguments.block_size,
            seed=arguments.seed,
            store=arguments.store or "tar",
            compression=arguments.compression,
            options=recorded,
        )

    def run(self) -> None:
        """Pack the data set, or print what would be done."""
        arguments = self._arguments
        if arguments.dry_run:
            self._print_plan()
            return
        start = time.perf_counter()
        packed = pack(
            self._load,
            self._out,
            self._settings,
            skip_bad=arguments.skip_bad,
            workers=arguments.workers,
            group=self._group,
            force=arguments.force,
        )
        self._report(packed, time.perf_counter() - start)

    def _find_raw(self) -> Path:
        source, raw, address = self._source, self._arguments.raw, self._source.address
        if address is not None:
            if raw:
                warn(f"--raw has no effect, {source.name} downloads the files")
            raw = self._group.run_on_main(lambda: address(self._arguments.name, self._arguments.split or ""))
        if not raw:
            return Path("data/raw") / source.name
        if not source.raw_files:
            warn(f"--raw has no effect, {source.name} reads no files")
            return Path(raw)
        path = self._group.barrier_run(lambda: resolve_files(raw))
        check_is_file(path, "a file or directory of raw data")
        if not (source.raw_file or source.generic) and path.exists() and not path.is_dir():
            raise UserError(found=f"--raw {path}, a file", expected="a directory", hint=f"--raw {quote(path.parent)}")
        return path

    def _print(self, text: str) -> None:
        if self._group.is_main_process:
            print(text, flush=True)

    def _print_plan(self) -> None:
        existing = self._group.run_on_main(lambda: find_pack(open_output(self._out), self._settings, self._out))
        if existing and not self._arguments.force:
            self._print(f"{self._name}: would leave the complete pack alone")
            return
        self._print(f"{self._name}: would {self._source.plan(self._options)}")
        self._print(f"{self._name}: would write {self._out}, one directory per split")
        if self._source.generic:  # other data sets would be downloaded
            for split in self._group.barrier_run(self._read_splits):
                classes = plural(len(split.classes), "class", "es")
                self._print(f"  {split.name:5}  {plural(len(split.labels), 'image')} of {classes}")

    def _read_splits(self) -> tuple[RawSplit, ...]:
        """Read the raw splits, and make those of the packed set."""
        options = {name: getattr(self._arguments, name) for name in _SPLIT_DEFAULTS}
        return make_splits(
            self._source.load(self._options), seed=self._arguments.seed, exclude=self._excluded, **options
        )

    def _load(self) -> tuple[RawSplit, ...]:
        """Read the splits of the packed set, and report or remove near-duplicates."""
        arguments = self._arguments
        splits = self._read_splits()
        if arguments.near_duplicates:
            # Importing scipy.fft takes 0.2 s of CPU time, a quarter of packing EMNIST ByClass.
            from pipeline.dedup.between_splits import find_duplicates, remove_duplicates, summarize, write_report

            # On rank 0 only: on different processors the ranks might disagree about a borderline pair.
            within_train = "all" in arguments.near_duplicates
            duplicates = self._group.run_on_main(lambda: find_duplicates(splits, within_train, arguments.workers))
            self._print(f"  {summarize(duplicates)}")
            if "remove" in arguments.near_duplicates:
                return remove_duplicates(splits, duplicates)
            beside = self._name if is_remote(self._out) else self._out
            report = Path(f"{beside}.near-duplicates.csv")
            self._group.run_on_main(lambda: write_report(duplicates, report))
            self._print(f"  listed in {report}")
        return splits

    def _report(self, packed: Packed, seconds: float) -> None:
        images = sum(manifest.samples for manifest in packed.manifests)
        # The pack may be of other files: directories with the same name share a default output.
        unread = f"; {self._files} was not read" if self._source.generic else ""
        self._print(
            f"{self._name}: packed {plural(images, 'image')} in {seconds:.1f} s ({images / seconds:,.0f} images/s)"
            if packed.is_new
            else f"{self._name}: already packed{unread} (--force packs again)"
        )
        if not packed.is_new and self._arguments.near_duplicates in ("report", "report-all"):
            self._print("  near-duplicates: not searched, as nothing was packed")
        for manifest in packed.manifests:
            self._print(describe(manifest))
        if packed.skipped:
            skipped = plural(packed.skipped, "unreadable image")
            self._print(f"  skipped {skipped}, listed in {self._out}/{UNREADABLE}")
        self._print(f"  in     {self._out}")


def main() -> int:
    """Run the command; returns its exit status."""
    arguments = parse_arguments()
    with report_errors_on_main(), init_process_group() as group:
        Command(arguments, group).run()
    return 0


if __name__ == "__main__":
    run_command(main)
