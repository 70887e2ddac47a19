"""What does each resolution cost, and what does it buy?

    python benchmarks/resolution_sweep.py [--config FILE] [--resolutions 28,56,112] [--subset 0.002 --subset 1.0]
                                          [--models A,B] [--seeds N] [--seconds S] [--budget-minutes M] [--resume]
    python benchmarks/resolution_sweep.py --full
    python benchmarks/resolution_sweep.py --compare A.jsonl B.jsonl

Every point (model, resolution, subset of the training images, seed) is measured in a fresh process: the loader, the
training, memory, and what was learned after the recipe's epochs and after the same seconds of training. At the end the
interpolations are compared at the resolution that the figures recommend. Lines are written as points finish, so a study
that was stopped goes on with --resume; one that ran before is kept as resolution_sweep.previous.jsonl.

Without arguments: a packed EMNIST ByClass if there is one (about 2,000 training images of it), the digits inside
scikit-learn otherwise, a small network, three seeds, at most 15 minutes on two cores. --full is configs/byclass.yaml at
seven resolutions on 0.2 % of the images and on all of them, for a GPU. Writes resolution_sweep.jsonl, .md, .png, .html.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.default_set import choose_set
from benchmarks.common.harness import DEFAULT_OUT, write_results
from benchmarks.sweep.plan import INTERPOLATIONS, NAME, Journal, Point, Study, expected_seconds, points
from benchmarks.sweep.point import measure_point
from shards import Manifest, UserError
from shards.atomic import file_lock, make_directory
from shards.cli import run_command
from shards.manifest import REQUIRED_SPLITS, VALIDATION, has_split
from shards.remote.sets import resolve_dataset
from trainer.config import load as config
from trainer.config.load import validate
from trainer.config.schema import Config

SMALL_IMAGES = 2_000  # to train on without arguments
SMALL_TEST_IMAGES = 10_000
_SHARE_OF_RESOLUTIONS = 0.8  # of the time; the rest is kept for the interpolations
SMALL_RECIPE = {
    "data": {"shards": "", "val_fraction": 0.1},
    "loader": {"batch_size": 64},
    "model": {"name": "three_block_cnn", "drop_rate": 0.3},
    "optim": {"name": "adamw", "lr": 3e-3},
    "schedule": {"name": "one_cycle", "warmup": 1},
    "trainer": {"epochs": 5},
}


@dataclasses.dataclass(frozen=True)
class Defaults:
    """What is measured where nothing else is said."""

    config: Path | None
    resolutions: str
    subsets: tuple[float, ...] | None
    seeds: int
    seconds: float
    budget_minutes: float | None
    test_images: int | None


QUICK = Defaults(None, "28,56,84,112", None, 3, 10.0, 14.0, SMALL_TEST_IMAGES)
FULL = Defaults(Path("configs/byclass.yaml"), "28,56,84,112,140,168,224", (0.002, 1.0), 3, 1800.0, None, None)


class Sweep:
    """A study that runs: measures the points that are not there yet and still fit into its time."""

    def __init__(self, study: Study, journal: Journal, minutes: float | None) -> None:
        self._study = study
        self._journal = journal
        self._seconds = None if minutes is None else 60 * minutes
        self._start = time.monotonic()
        self.left_out: list[str] = []

    def run(self, wanted: Sequence[Point], share: float = 1.0) -> None:
        """share: of the time, from the start of the study on, until which these points have to end."""
        for number, point in enumerate(wanted, 1):
            place = f"[{number}/{len(wanted)}] {point}"
            if self._journal.has(point):
                print(f"{place}: measured already")
            elif not self._fits(point, share):
                self.left_out.append(str(point))
                print(f"{place}: left out, it would not fit into the time that is left", flush=True)
            else:
                print(f"{place} ...", flush=True)
                self._measure(point)

    def _fits(self, point: Point, share: float) -> bool:
        if self._seconds is None:
            return True
        left = self._start + share * self._seconds - time.monotonic()
        return left > 0 and (expected_seconds(point, self._journal.records) or 0) < left

    def _measure(self, point: Point) -> None:
        for found in measure_point(self._study, point):
            if isinstance(found, str):
                print(f"    {found}", flush=True)
                continue
            self._journal.append(point, found)
            if "failed" in found:
                print(f"    FAILED: {found['failed']}", flush=True)
            else:
                print(
                    f"    accuracy {found['by_epochs']['accuracy']:.2%}, "
                    f"{found['training_images_per_second']['median']:,.0f} images/s, {found['point_seconds']:.0f} s",
                    flush=True,
                )


def sweep(
    study: Study, wanted: Sequence[Point], seeds: int, out: Path, resume: bool, minutes: float | None
) -> dict[str, Any]:
    """Measure a study and write what it found. Returns the failed points with their reasons."""
    make_directory(out.parent)
    busy = UserError(
        found=f"another study that writes {out}.jsonl", expected="one at a time", hint="wait for it, or another --out"
    )
    interpolation = study.settings.data.interpolation
    with file_lock(out.with_name(f".{out.name}.lock"), busy):
        journal = Journal(out.with_suffix(".jsonl"), study, resume)
        if journal.others:
            print(f"{journal.others} lines of other settings or another set stay in {out}.jsonl and are not shown")
        running = Sweep(study, journal, minutes)
        running.run(wanted, _SHARE_OF_RESOLUTIONS)
        # Here and not above: every process that is measured imports this file, and is to hold nothing but its work.
        from benchmarks.sweep.text import Findings, markdown

        place = Findings(journal.records, interpolation).to_interpolate()
        if place is not None:
            print(f"interpolations at {place.resolution}x{place.resolution}:")
            chosen = (place.model, place.subset, place.resolution)
            numbers = [study.settings.seed + number for number in range(seeds)]
            running.run([Point(*chosen, name, seed) for seed in numbers for name in INTERPOLATIONS])
        failed = {str(point): reason for point, reason in journal.failures()}
        findings = Findings(journal.records, interpolation, running.left_out)
        if not findings.panels:
            print("nothing could be measured")
            return failed
        from benchmarks.sweep.charts import write_png
        from benchmarks.sweep.page import write_page

        write_page(findings, out.with_suffix(".html"))
        picture = functools.partial(write_png, findings)
        write_results(out, journal.lines, markdown(findings), picture)
        print(f"{out}.html")
    return failed


def make_study(arguments: argparse.Namespace, defaults: Defaults) -> tuple[Study, Config]:
    """The study that a command line asks for, and its recipe. Raises `UserError`."""
    path = arguments.config or defaults.config
    if path is None:
        shards = choose_set(arguments.shards)
        # Validating many more images than are trained on would take most of the time.
        share = min(SMALL_RECIPE["data"]["val_fraction"], SMALL_IMAGES / Manifest.read(shards / "train").samples)
        settings = validate({**SMALL_RECIPE, "data": {**SMALL_RECIPE["data"], "val_fraction": share}}, "the sweep")
    else:
        settings = config.load(path, [])
        shards = resolve_dataset(arguments.shards or settings.data.shards)
    if arguments.epochs is not None:
        trainer = {**settings.trainer.model_dump(mode="json"), "epochs": arguments.epochs}
        settings = validate({**settings.model_dump(mode="json"), "trainer": trainer}, "--epochs")
    manifests = [Manifest.read(shards / part) for part in REQUIRED_SPLITS]
    if settings.data.val_fraction == 0 and not has_split(shards, VALIDATION):
        raise UserError(
            found=f"data.val_fraction=0 in {path}, and no val part in {shards}",
            expected="a validation part, by which resolutions are chosen",
            hint="data.val_fraction: 0.05",
        )
    # A schedule of resolutions gives way to the resolution of the point.
    data = settings.data.model_copy(update={"resolution": manifests[0].image_shape[0] or 28})
    study = Study(
        shards=shards,
        dataset=manifests[0].name,
        digest="".join(manifest.digest() for manifest in manifests),
        recipe=settings.model_copy(update={"data": data}).model_dump(mode="json"),
        seconds=arguments.seconds or defaults.seconds,
        test_images=defaults.test_images,
    )
    return study, settings


def _numbers(text: str, option: str, expected: str, hint: str, most: float = float("inf")) -> list[float]:
    try:
        numbers = [float(word) for word in text.split(",")]
        if not all(0 < number <= most for number in numbers):
            raise ValueError
    except ValueError:
        raise UserError(found=f"{option} {text}", expected=expected, hint=hint) from None
    return list(dict.fromkeys(numbers))


def _resolutions(text: str) -> list[int]:
    expected, hint = "sides in pixels with commas", "--resolutions 28,56,112"
    numbers = _numbers(text, "--resolutions", expected, hint)
    if not all(number.is_integer() for number in numbers):
        raise UserError(found=f"--resolutions {text}", expected=expected, hint=hint)
    return [int(number) for number in numbers]


def _subsets(given: list[str] | None, defaults: Defaults, shards: Path) -> list[float]:
    if given is not None:
        expected = "a share of the training images, above 0 and up to 1"
        return [share for text in given for share in _numbers(text, "--subset", expected, "--subset 0.002", 1)]
    return list(defaults.subsets or [min(1.0, SMALL_IMAGES / Manifest.read(shards / "train").samples)])


def _positive(kind: type) -> Any:
    def parse(text: str) -> Any:
        if not 0 < kind(text) < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return kind(text)

    return parse


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What does each resolution cost, and what does it buy?")
    number, share = _positive(int), _positive(float)
    parser.add_argument("--config", type=Path, metavar="FILE", help="recipe to train by (default: a small network's)")
    parser.add_argument("--shards", metavar="DIR", help="packed set or its address (default: the recipe's, or digits)")
    parser.add_argument("--resolutions", metavar="28,56", help=f"sides in pixels (default: {QUICK.resolutions})")
    parser.add_argument(
        "--subset", action="append", metavar="SHARE", help="of the training images; may be given several times"
    )
    parser.add_argument("--models", metavar="A,B", help="three_block_cnn or timm models (default: the recipe's)")
    parser.add_argument("--seeds", type=number, metavar="N", help=f"at every point (default: {QUICK.seeds})")
    parser.add_argument("--epochs", type=number, metavar="N", help="at every resolution (default: the recipe's)")
    parser.add_argument(
        "--seconds", type=share, metavar="S", help="of training at every resolution, beside the epochs (default: 10)"
    )
    parser.add_argument("--budget-minutes", type=share, metavar="M", help="begin no point that would not fit into this")
    parser.add_argument("--resume", action="store_true", help="go on with the lines that are there")
    parser.add_argument(
        "--full", action="store_true", help="the full study, for a GPU: configs/byclass.yaml, 28 .. 224"
    )
    parser.add_argument(
        "--compare", nargs=2, type=Path, metavar="FILE", help="compare two files of lines; status 1 for a regression"
    )
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, metavar="DIR", help="where to write the results")
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    if arguments.compare:
        from benchmarks.sweep.compare import compare

        text, worse = compare(*arguments.compare)
        print(text)
        return 1 if worse else 0
    defaults = FULL if arguments.full else QUICK
    resolutions = _resolutions(arguments.resolutions or defaults.resolutions)
    study, settings = make_study(arguments, defaults)
    subsets = _subsets(arguments.subset, defaults, study.shards)
    models = arguments.models.split(",") if arguments.models else [settings.model.name]
    seeds = arguments.seeds or defaults.seeds
    minutes = arguments.budget_minutes or defaults.budget_minutes
    wanted = points(study, models, subsets, resolutions, seeds)
    for point in wanted:  # a mistake ends it before anything is measured
        study.config(point, settings.loader.batch_size, settings.optim.grad_accumulation)
    failed = sweep(study, wanted, seeds, arguments.out / NAME, arguments.resume, minutes)
    for point, reason in failed.items():
        print(f"{point}: {reason}")
    return 1 if failed else 0


if __name__ == "__main__":
    run_command(main)
