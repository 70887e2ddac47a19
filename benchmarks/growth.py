"""Measure how the costs of opening, shuffling, loading and packing grow with the number of images.

    python benchmarks/growth.py [--sizes 100000,1000000,10000000,100000000,1000000000] [--before REV] [--out DIR]

Each loader runs at each size in a process of its own, with a limit of memory and CPU time. Times are CPU times on one
core. Data sets of up to --real images are packed from the images of --shards, repeated. Larger ones are synthetic: one
shard of images under many names, or an index that lists the same files repeatedly. --before also measures an earlier
revision of this project. Loaders that are not installed are skipped. Default: packed EMNIST ByClass if present,
else the digits of scikit-learn. Output: growth.jsonl, .md and .png.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path

from benchmarks.common.arguments import add_out_argument, add_shards_argument, parse_numbers, positive, select_names
from shards.cli import run_command

SIZES = "100000,1000000,10000000,100000000,1000000000"
REAL = 10_000_000
MEMORY_GB = 8.0
SECONDS = 300.0
WINDOW_GB = 1.0


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Measure how the costs of a loader grow with the number of images.")
    number = positive(float)
    add = parser.add_argument
    add_shards_argument(parser)
    add("--sizes", default=SIZES, metavar="N,N", help=f"numbers of images (default: {SIZES})")
    add("--loaders", metavar="A,B", help="comma-separated loaders (default: all that are installed)")
    add("--before", metavar="REV", help="also measure this earlier git revision of the project")
    add(
        "--real",
        type=positive(int),
        default=REAL,
        metavar="N",
        help=f"pack real files up to this number of images (default: {REAL})",
    )
    add(
        "--limit",
        type=number,
        default=MEMORY_GB,
        metavar="GB",
        help=f"memory limit of a process (default: {MEMORY_GB:g})",
    )
    add(
        "--seconds",
        type=number,
        default=SECONDS,
        metavar="S",
        help=f"CPU time limit of a process (default: {SECONDS:g})",
    )
    add(
        "--window",
        type=number,
        default=WINDOW_GB,
        metavar="GB",
        help=f"memory for images with a shuffle window (default: {WINDOW_GB:g})",
    )
    add("--append", action="store_true", help="keep the measurements of other loaders and sizes in DIR/growth.jsonl")
    add("--scratch", type=Path, metavar="DIR", help="parent of the temporary files (default: the system's)")
    add_out_argument(parser)
    return parser.parse_args()


def main() -> int:
    """Run the command."""
    arguments = parse()
    # Imported here, so that --help and errors are immediate.
    import numpy as np
    import torch

    from benchmarks.common.harness import write_lines, write_results
    from benchmarks.loaders import growth_report
    from benchmarks.loaders.growth_runs import Limits, checkout, measure_all, subjects_of
    from benchmarks.loaders.setting import open_images, write_source
    from trainer.runtime.env_info import collect_env_info

    sizes = parse_numbers("--sizes", arguments.sizes, int, "comma-separated numbers of images", "100000,1000000")
    limits = Limits(arguments.limit * 1e9, arguments.seconds, arguments.real)
    path = arguments.out / "growth.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()] if arguments.append and path.exists() else []
    with checkout(arguments.before) as before, tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        known = {subject.name: subject for subject in subjects_of(before, arguments.window)}
        subjects = [known[name] for name in select_names("--loaders", arguments.loaders, known)]
        source, store = Path(scratch) / "source", open_images(arguments.shards)
        write_source(store, np.arange(len(store)), source)
        notes = [f"images: {len(store):,} of {store.manifest.name}"]
        notes += [f"{subject.name}: skipped, {subject.missing}" for subject in subjects if subject.missing]
        for record in measure_all(subjects, sizes, source, Path(scratch), limits):
            key = growth_report.key(record)
            records = [*(one for one in records if growth_report.key(one) != key), record]
            write_lines(path, records)  # an interrupted benchmark keeps its measurements
            print(growth_report.describe(record), flush=True)
    environment = collect_env_info(torch.device("cpu"))
    report = growth_report.growth_markdown(records, notes, environment)
    write_results(arguments.out / "growth", records, report, partial(growth_report.plot_growth, records))
    return 0


if __name__ == "__main__":
    run_command(main)
