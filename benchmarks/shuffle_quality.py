"""Measure how well each loader shuffles.

    python benchmarks/shuffle_quality.py [--samples N] [--batch-size B] [--epochs E] [--loaders a,b,...] [--out DIR]

Each loader reads the same synthetic images, sorted by class as in a folder that is read class by class, for a few
epochs. The order of the samples is compared with a uniformly random one. Loaders that are not installed are skipped.
Output: shuffle_quality.jsonl, .md and .png.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from benchmarks.common.arguments import add_out_argument, positive, select_names
from shards.atomic import check_writable
from shards.cli import run_command
from shards.errors import UserError

SAMPLES = 32_768
BATCH_SIZE = 512
EPOCHS = 2
CLASSES = 32
# Loader and variant; each runs as in the loader benchmark, in one process without workers.
LIBRARIES = (
    ("ffcv", "best"),
    ("grain", "best"),
    ("spdl", "best"),
    ("mosaicml-streaming", "documented"),
    ("litdata", "best"),
    ("litdata", "documented"),
    ("dali-webdataset", "blocks"),
    ("dali-webdataset", "documented"),
    ("webdataset", "blocks"),
    ("webdataset", "best"),
    ("webdataset", "documented"),
)


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Measure how well each loader shuffles.")
    add = parser.add_argument
    add("--samples", type=positive(int, 64), default=SAMPLES, metavar="N", help=f"images (default: {SAMPLES})")
    add("--batch-size", type=positive(int, 2), default=BATCH_SIZE, metavar="N", help=f"default: {BATCH_SIZE}")
    add("--epochs", type=positive(int, 2), default=EPOCHS, metavar="N", help=f"epochs to compare (default: {EPOCHS})")
    add("--loaders", metavar="A,B", help="comma-separated other loaders (default: all that are installed)")
    add("--json", type=Path, metavar="FILE", help="additional file for the JSON lines")
    add_out_argument(parser)
    return parser.parse_args()


def main() -> int:
    """Run the command."""
    arguments = parse()
    names = select_names("--loaders", arguments.loaders, dict.fromkeys(name for name, _ in LIBRARIES))
    if 4 * arguments.batch_size > arguments.samples:
        raise UserError(
            found=f"--batch-size {arguments.batch_size} with {arguments.samples} samples",
            expected="at least four batches per epoch",
            hint=f"--batch-size {arguments.samples // 4}",
        )
    if arguments.json is not None:
        check_writable(arguments.json)
    # Imported here because every measured process imports this file.
    from benchmarks.loaders import shuffle_report
    from benchmarks.loaders.shuffle_orders import collect_orders

    with tempfile.TemporaryDirectory(prefix="inkstream-orders-") as scratch:
        results = collect_orders(
            [(name, variant) for name, variant in LIBRARIES if name in names],
            Path(scratch),
            arguments.samples,
            CLASSES,
            arguments.batch_size,
            arguments.epochs,
        )
    shuffle_report.write_report(results, arguments.batch_size, arguments.out, arguments.json)
    return 1 if results.failed else 0


if __name__ == "__main__":
    run_command(main)
