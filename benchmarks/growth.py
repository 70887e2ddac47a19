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

from benchmarks.common.arguments import DEFAULT_OUT, SHARDS_HELP, parse_numbers, positive, select_names
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
    add("--shards", metavar="DIR", help=SHARDS_HELP)
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
    add("--out", type=Path, default=DEFAULT_OUT, metavar="DIR", help=f"output directory (default: {DEFAULT_OUT})")
    return parser.parse_args()


def main() -> int:
    """Run the command."""
    arguments = parse()
    # Imported here, so that --help and errors are immediate.
    import torch

    from benchmarks.common.default_set import choose_set
    from benchmarks.common.harness import write_lines, write_results
    from benchmarks.loaders import growth_report
    from benchmarks.loaders.growth_runs import Limits, checkout, measure_all, subjects_of, write_source
    from trainer.runtime.env_info import collect_env_info

    sizes = parse_numbers("--sizes", arguments.sizes, int, "comma-separated numbers of images", "100000,1000000")
    limits = Limits(arguments.limit * 1e9, arguments.seconds, arguments.real)
    path = arguments.out / "growth.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()] if arguments.append and path.exists() else []
    with checkout(arguments.before) as before, tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        known = {subject.name: subject for subject in subjects_of(before, arguments.window)}
        subjects = [known[name] for name in select_names("--loaders", arguments.loaders, known)]
        source = write_source(choose_set(arguments.shards), Path(scratch) / "source")
        skipped = [f"{subject.name}: skipped, {subject.missing}" for subject in subjects if subject.missing]
        for record in measure_all(subjects, sizes, source, Path(scratch), limits):
            key = growth_report.key(record)
            records = [*(one for one in records if growth_report.key(one) != key), record]
            write_lines(path, records)  # an interrupted benchmark keeps its measurements
            print(growth_report.describe(record), flush=True)
    environment = collect_env_info(torch.device("cpu"))
    report = growth_report.growth_markdown(records, skipped, environment)
    write_results(arguments.out / "growth", records, report, partial(growth_report.plot_growth, records))
    return 0


if __name__ == "__main__":
    run_command(main)
