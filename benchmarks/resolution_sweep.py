"""Measure what each resolution costs (time, memory, bytes) and which accuracy it reaches.

    python benchmarks/resolution_sweep.py [--config FILE] [--resolutions 28,56,112] [--subset 0.002 --subset 1.0]
                                          [--models A,B] [--seeds N] [--seconds S] [--budget-minutes M] [--resume]
    python benchmarks/resolution_sweep.py --full
    python benchmarks/resolution_sweep.py --compare A.jsonl B.jsonl

Each point (model, resolution, subset of the training images, seed) is measured in its own process: throughput of the
loader and of training, memory, and accuracy after the recipe's epochs and after equal training time. Then the
interpolations are compared at the recommended resolution. Results are written as points finish; --resume continues an
interrupted sweep. Without it, earlier results are moved to resolution_sweep.previous.jsonl.

Default: packed EMNIST ByClass if present (about 2,000 training images), else the digits of scikit-learn; a small
network, three seeds, at most 15 minutes on two cores. --full: configs/byclass.yaml at seven resolutions on 0.2% and
100% of the images, for a GPU. Output: resolution_sweep.jsonl, .md, .png and .html.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.common.arguments import add_out_argument, add_shards_argument, fraction_of, parse_numbers, positive
from benchmarks.common.default_set import choose_set
from benchmarks.common.harness import write_results
from benchmarks.sweep.plan import INTERPOLATIONS, NAME, Journal, Point, SweepConfig, expected_seconds, make_points
from benchmarks.sweep.point import measure_point
from shards import Manifest, UserError
from shards.atomic import file_lock, make_directory
from shards.cli import run_command
from shards.manifest import REQUIRED_SPLITS, VALIDATION, has_split
from shards.remote.datasets import resolve_dataset
from trainer.config import load as config

_SMALL_IMAGES = 2_000  # training images without arguments
_SMALL_TEST_IMAGES = 10_000
_BUDGET_OF_RESOLUTIONS = 0.8  # fraction of the time budget; the rest is for the interpolations
_SMALL_RECIPE: dict[str, Any] = {
    "data": {"shards": "", "val_fraction": 0.1},
    "loader": {"batch_size": 64},
    "model": {"name": "three_block_cnn", "drop_rate": 0.3},
    "optim": {"name": "adamw", "lr": 3e-3},
    "schedule": {"name": "one_cycle", "warmup": 1},
    "trainer": {"epochs": 5},
}


class Defaults(NamedTuple):
    """Values of options that the command line omits."""

    config: Path | None
    resolutions: str
    subsets: tuple[float, ...] | None
    seeds: int
    seconds: float
    budget_minutes: float | None
    test_images: int | None


QUICK = Defaults(None, "28,56,84,112", None, 3, 10.0, 14.0, _SMALL_TEST_IMAGES)
FULL = Defaults(Path("configs/byclass.yaml"), "28,56,84,112,140,168,224", (0.002, 1.0), 3, 1800.0, None, None)


class SweepRunner:
    """Measures the points that are not in the journal yet and fit into the time budget.

    Args:
        config: The sweep.
        journal: File of the results.
        minutes: Time budget; None for no limit.
    """

    def __init__(self, config: SweepConfig, journal: Journal, minutes: float | None) -> None:
        self._config = config
        self._journal = journal
        self._budget = float("inf") if minutes is None else 60 * minutes
        self._start = time.monotonic()
        self.skipped: list[str] = []

    def run(self, points: Sequence[Point], budget_fraction: float = 1.0) -> None:
        """Measure points; skip those that would exceed this fraction of the time budget."""
        for number, point in enumerate(points, 1):
            label = f"[{number}/{len(points)}] {point}"
            remaining = self._start + budget_fraction * self._budget - time.monotonic()
            if self._journal.has(point):
                print(f"{label}: already measured")
            elif remaining <= (expected_seconds(point, self._journal.records) or 0):
                self.skipped.append(str(point))
                print(f"{label}: skipped, exceeds the time budget", flush=True)
            else:
                print(f"{label} ...", flush=True)
                self._measure(point)

    def _measure(self, point: Point) -> None:
        for result in measure_point(self._config, point):
            if isinstance(result, str):
                print(f"    {result}", flush=True)
                continue
            self._journal.append(point, result)
            if "failed" in result:
                print(f"    FAILED: {result['failed']}", flush=True)
                continue
            accuracy, rate = result["by_epochs"]["accuracy"], result["training_images_per_second"]["median"]
            print(f"    accuracy {accuracy:.2%}, {rate:,.0f} images/s, {result['point_seconds']:.0f} s", flush=True)


def run_sweep(
    config: SweepConfig, points: Sequence[Point], seeds: int, out: Path, resume: bool, minutes: float | None
) -> dict[str, str]:
    """Run a sweep and write its results.

    Args:
        config: The sweep.
        points: Points to measure before the comparison of interpolations.
        seeds: Number of seeds of that comparison.
        out: Path of the results without suffix.
        resume: Whether to continue the existing results.
        minutes: Time budget; None for no limit.

    Returns:
        The reason of each failed point.
    """
    make_directory(out.parent)
    busy = UserError(
        found=f"another sweep that writes {out}.jsonl",
        expected="one sweep per output directory",
        hint="wait until it ends, or choose another --out",
    )
    settings = config.settings
    with file_lock(out.with_name(f".{out.name}.lock"), busy):
        journal = Journal(out.with_suffix(".jsonl"), config, resume)
        if journal.other_records:
            print(f"{out}.jsonl: {len(journal.other_records)} records of other settings or data are kept, not reported")
        runner = SweepRunner(config, journal, minutes)
        runner.run(points, _BUDGET_OF_RESOLUTIONS)
        # Imported here because every measured process imports this file.
        from benchmarks.sweep.text import SweepResults, sweep_markdown

        interpolation = settings.data.interpolation
        group = SweepResults(journal.records, interpolation).interpolation_group()
        if group is not None:
            print(f"interpolations at {group.resolution}x{group.resolution}:")
            key = (group.model, group.subset, group.resolution)
            numbers = range(settings.seed, settings.seed + seeds)
            runner.run([Point(*key, name, seed) for seed in numbers for name in INTERPOLATIONS])
        results = SweepResults(journal.records, interpolation, runner.skipped)
        if not results.series:
            print("no point could be measured")
            return journal.failures()
        from benchmarks.sweep.charts import write_png
        from benchmarks.sweep.page import write_page

        write_page(results, out.with_suffix(".html"))
        write_results(out, journal.all_records, sweep_markdown(results), partial(write_png, results))
        print(f"{out}.html")
    return journal.failures()


def make_config(arguments: argparse.Namespace, defaults: Defaults) -> SweepConfig:
    """Build the sweep of a command line.

    Raises:
        UserError: The recipe is invalid or has no validation split.
    """
    path = arguments.config or defaults.config
    if path is None:
        shards = choose_set(arguments.shards)
        # Validation on many more images than training would dominate the time.
        val_fraction = min(_SMALL_RECIPE["data"]["val_fraction"], fraction_of(_SMALL_IMAGES, shards))
        settings = config.validate({**_SMALL_RECIPE, "data": {"shards": "", "val_fraction": val_fraction}}, "the sweep")
    else:
        settings = config.load(path, [])
        shards = resolve_dataset(arguments.shards or settings.data.shards)
    if arguments.epochs is not None:
        settings = config.replace_settings(settings, {"trainer.epochs": arguments.epochs}, "--epochs")
    manifests = [Manifest.read(shards / split) for split in REQUIRED_SPLITS]
    if settings.data.val_fraction == 0 and not has_split(shards, VALIDATION):
        raise UserError(
            found=f"data.val_fraction=0 in {path}, and no val split in {shards}",
            expected="a validation split, which selects the resolution",
            hint="set data.val_fraction: 0.05",
        )
    # The resolution of a point replaces a resolution schedule.
    side = manifests[0].image_shape[0] or 28
    settings = config.replace_settings(settings, {"data.resolution": side}, "the sweep")
    return SweepConfig(
        shards=shards,
        dataset=manifests[0].name,
        data_identity="".join(manifest.identity() for manifest in manifests),
        recipe=settings.model_dump(mode="json"),
        seconds=arguments.seconds or defaults.seconds,
        test_images=defaults.test_images,
    )


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    description = "Measure what each resolution costs (time, memory, bytes) and which accuracy it reaches."
    parser = argparse.ArgumentParser(description=description)
    count, number = positive(int), positive(float)
    add = parser.add_argument
    add("--config", type=Path, metavar="FILE", help="training recipe (default: a small network)")
    add_shards_argument(parser)
    add("--resolutions", metavar="28,56", help=f"image sides in pixels (default: {QUICK.resolutions})")
    add("--subset", action="append", metavar="FRACTION", help="fraction of the training images; may be repeated")
    add("--models", metavar="A,B", help="three_block_cnn or timm models (default: that of the recipe)")
    add("--seeds", type=count, metavar="N", help=f"seeds per point (default: {QUICK.seeds})")
    add("--epochs", type=count, metavar="N", help="epochs per point (default: those of the recipe)")
    add("--seconds", type=number, metavar="S", help="training time of the runs of equal time (default: 10)")
    add("--budget-minutes", type=number, metavar="M", help="skip points that would exceed this time (default: 14)")
    add("--resume", action="store_true", help="continue the existing results")
    add("--full", action="store_true", help="use configs/byclass.yaml at 28 .. 224 pixels, without a time limit")
    add("--compare", nargs=2, type=Path, metavar="FILE", help="compare two result files; exit with 1 on a regression")
    add_out_argument(parser)
    return parser.parse_args(arguments)


def main() -> int:
    """Run the command."""
    arguments = parse()
    if arguments.compare:
        from benchmarks.sweep.compare import compare

        text, has_regression = compare(*arguments.compare)
        print(text)
        return 1 if has_regression else 0
    defaults = FULL if arguments.full else QUICK
    sides = arguments.resolutions or defaults.resolutions
    resolutions = parse_numbers("--resolutions", sides, int, "comma-separated sides in pixels", "28,56,112")
    sweep_config = make_config(arguments, defaults)
    settings = sweep_config.settings
    subsets = defaults.subsets or [fraction_of(_SMALL_IMAGES, sweep_config.shards)]
    if arguments.subset:
        expected = "fractions of the training images, above 0 and up to 1"
        parsed = [parse_numbers("--subset", text, float, expected, "0.002", highest=1) for text in arguments.subset]
        subsets = [fraction for fractions in parsed for fraction in fractions]
    models = arguments.models.split(",") if arguments.models else [settings.model.name]
    seeds = arguments.seeds or defaults.seeds
    minutes = arguments.budget_minutes or defaults.budget_minutes
    points = make_points(sweep_config, models, subsets, resolutions, seeds)
    for point in points:  # refuse invalid settings before anything is measured
        sweep_config.point_config(point, settings.loader.batch_size, settings.optim.grad_accumulation)
    failures = run_sweep(sweep_config, points, seeds, arguments.out / NAME, arguments.resume, minutes)
    for label, reason in failures.items():
        print(f"{label}: {reason}")
    return 1 if failures else 0


if __name__ == "__main__":
    run_command(main)
