"""How well does each loader shuffle?

    python benchmarks/shuffle_quality.py [--samples N] [--batch-size B] [--epochs E] [--loaders a,b,...] [--out DIR]

Every loader is given the same made-up images, sorted by class, as a folder read class by class would give them, and is
run for a few epochs; the rows that it gives are compared with a uniformly random order. Loaders that are not installed
are skipped. Writes shuffle_quality.jsonl, .md and .png.
"""

from __future__ import annotations

import argparse
import difflib
import tempfile
from collections.abc import Callable
from pathlib import Path

from shards.atomic import check_writable
from shards.cli import run_command
from shards.errors import UserError

SAMPLES = 32_768
BATCH_SIZE = 512
EPOCHS = 2
CLASSES = 32
# Loader and variant; each is run as it is measured for speed, in one process without workers.
LIBRARIES = (
    ("ffcv", "best"),
    ("mosaicml-streaming", "documented"),
    ("litdata", "best"),
    ("litdata", "documented"),
    ("dali-webdataset", "blocks"),
    ("dali-webdataset", "documented"),
    ("webdataset", "blocks"),
    ("webdataset", "best"),
    ("webdataset", "documented"),
)


def at_least(least: int) -> Callable[[str], int]:
    """A parser of whole numbers of at least so much."""

    def parse(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is not {least} or more")
        return int(text)

    return parse


def chosen_libraries(text: str | None) -> list[tuple[str, str]]:
    """Loaders and variants whose loader is named, with commas; all of them without a text."""
    names = list(dict.fromkeys(name for name, _ in LIBRARIES))
    wanted = names if text is None else [name.strip() for name in text.split(",") if name.strip()]
    for name in wanted:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            raise UserError(
                found=f"--loaders {name}",
                expected=f"some of {', '.join(names)}",
                hint=f"did you mean {near[0]}?" if near else "leave --loaders out to run all",
            )
    return [(name, variant) for name, variant in LIBRARIES if name in wanted]


def main() -> int:
    parser = argparse.ArgumentParser(description="How well does each loader shuffle?")
    parser.add_argument("--samples", type=at_least(64), default=SAMPLES, help="made-up images, sorted by class")
    parser.add_argument("--batch-size", type=at_least(2), default=BATCH_SIZE, help="images of a batch")
    parser.add_argument("--epochs", type=at_least(2), default=EPOCHS, help="epochs that are compared")
    parser.add_argument("--loaders", metavar="A,B", help="of other libraries, with commas (default: all installed)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write one JSON line an order here, too")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write the results (default: benchmarks/out)")
    arguments = parser.parse_args()
    libraries = chosen_libraries(arguments.loaders)
    if 4 * arguments.batch_size > arguments.samples:
        raise UserError(
            found=f"--batch-size {arguments.batch_size} of {arguments.samples} samples",
            expected="an epoch of at least four batches",
            hint=f"--batch-size {arguments.samples // 4}",
        )
    if arguments.json is not None:
        check_writable(arguments.json)
    # Here and not above: every process that is run imports this file.
    from benchmarks.loaders import shuffle_report
    from benchmarks.loaders.shuffle_orders import gather_orders

    with tempfile.TemporaryDirectory(prefix="inkstream-orders-") as scratch:
        found = gather_orders(
            libraries, Path(scratch), arguments.samples, CLASSES, arguments.batch_size, arguments.epochs
        )
    shuffle_report.write(found, arguments.batch_size, arguments.out, arguments.json)
    return 1 if found.failed else 0


if __name__ == "__main__":
    run_command(main)
