"""How fast is the loader, and how fast are the others?

    python benchmarks/loader_throughput.py [--shards DIR] [--resolutions 28,56,112,224] [--loaders a,b,...] [--out DIR]

Without arguments: a packed EMNIST ByClass if there is one, the digits inside scikit-learn otherwise. Every loader packs
the same images in its own form and gives shuffled batches of the same model input, as its documentation shows it and at
its best, with the number of worker processes that a short trial finds best. Each is measured in a fresh process of its
own; they run in turn (A B C A B C ...), each batch is let go before the next is asked for, as training does, and every
batch that begins or ends a run is held against a float64 reference. Loaders that are not installed are skipped. Writes
loader_throughput.jsonl, .md and .png.
"""

from __future__ import annotations

import argparse
import difflib
import tempfile
from pathlib import Path

from benchmarks.loaders.baselines import LISTINGS, Listing
from shards.cli import run_command
from shards.errors import UserError

RESOLUTIONS = (28, 56, 112, 224)
BATCH_SIZE = 512
RUNS = 3
SECONDS = 0.5


def chosen_loaders(text: str | None) -> list[Listing]:
    """The loaders named with commas, all of them without a text."""
    names = list(LISTINGS) if text is None else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in LISTINGS:
            near = difflib.get_close_matches(name, LISTINGS, n=1)
            raise UserError(
                found=f"--loaders {name}",
                expected=f"some of {', '.join(LISTINGS)}",
                hint=f"did you mean {near[0]}?" if near else "leave --loaders out to measure all",
            )
    return [LISTINGS[name] for name in dict.fromkeys(names)]


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return number


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="How fast is the loader, and how fast are the others?")
    parser.add_argument("--shards", type=Path, metavar="DIR", help="packed set (default: EMNIST ByClass, or digits)")
    parser.add_argument("--images", type=positive, metavar="N", help="of the train part (default: all)")
    parser.add_argument("--resolutions", default=",".join(map(str, RESOLUTIONS)), help="sides in pixels, with commas")
    parser.add_argument("--loaders", metavar="A,B", help="some of them, with commas (default: all that are installed)")
    parser.add_argument("--batch-size", type=positive, default=BATCH_SIZE, help="images of a batch")
    parser.add_argument("--runs", type=positive, default=RUNS, help="of every loader; the median counts")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of a run, at least")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the batches are to be")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write one JSON line a measurement here, too")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write the results (default: benchmarks/out)")
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    loaders = chosen_loaders(arguments.loaders)
    # Here and not above: every process that is measured imports this file, and is to hold nothing but its loader.
    from benchmarks.loaders import report
    from benchmarks.loaders.runs import measure_all
    from benchmarks.loaders.setting import choose

    setting = choose(arguments)
    with tempfile.TemporaryDirectory(prefix="inkstream-loaders-") as scratch:
        for results in measure_all(loaders, setting, Path(scratch)):
            report.write_records(results, setting)  # of a run that is cut off, what was measured stays
    report.write(results, setting)
    return 1 if results.failed else 0


if __name__ == "__main__":
    run_command(main)
