"""Measure the throughput of Inkstream's loader and of other loaders.

    python benchmarks/loader_throughput.py [--shards DIR] [--resolutions 28,56,112,224] [--loaders a,b,...] [--out DIR]

Each loader packs the same images in its own file format and returns shuffled batches of the same model input, in the
documented way and in the fastest way, with the number of worker processes that is fastest in a short trial. Each loader
runs in its own process. The loaders run in turn (A B C A B C ...). Each batch is released before the next one is
requested, as in training. The first and last batch of each run are compared with a float64 reference. Loaders that are
not installed are skipped. Default: packed EMNIST ByClass if present, else the digits of scikit-learn. Output:
loader_throughput.jsonl, .md and .png.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from benchmarks.common.arguments import add_out_argument, add_shards_argument, positive, select_names
from benchmarks.loaders.baselines import REGISTRY
from shards.cli import run_command

RESOLUTIONS = "28,56,112,224"
BATCH_SIZE = 512
RUNS = 3
SECONDS = 0.5


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Measure the throughput of Inkstream's loader and of other loaders.")
    count = positive(int)
    add = parser.add_argument
    add_shards_argument(parser)
    add("--images", type=count, metavar="N", help="number of training images (default: all)")
    add("--resolutions", default=RESOLUTIONS, metavar="28,56", help=f"output sides in pixels (default: {RESOLUTIONS})")
    add("--loaders", metavar="A,B", help="comma-separated loaders (default: all that are installed)")
    add("--batch-size", type=count, default=BATCH_SIZE, metavar="N", help=f"images per batch (default: {BATCH_SIZE})")
    add("--runs", type=count, default=RUNS, metavar="N", help=f"runs of each loader (default: {RUNS})")
    add("--seconds", type=float, default=SECONDS, metavar="S", help=f"minimum time of a run (default: {SECONDS})")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="device of the batches (default: cpu)")
    add("--json", type=Path, metavar="FILE", help="additional file for the JSON lines")
    add_out_argument(parser)
    return parser.parse_args()


def main() -> int:
    """Run the command."""
    arguments = parse()
    loaders = [REGISTRY[name] for name in select_names("--loaders", arguments.loaders, REGISTRY)]
    # Imported here because every measured process imports this file and must load nothing but its loader.
    from benchmarks.loaders import report
    from benchmarks.loaders.runs import measure_all
    from benchmarks.loaders.setting import make_config

    config = make_config(arguments)
    with tempfile.TemporaryDirectory(prefix="inkstream-loaders-") as scratch:
        for results in measure_all(loaders, config, Path(scratch)):
            report.write_records(results, config)  # an interrupted benchmark keeps its measurements
    report.write_report(results, config)
    return 1 if results.failed else 0


if __name__ == "__main__":
    run_command(main)
