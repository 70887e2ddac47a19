"""What does each addition to a recipe bring, at equal compute?

    python benchmarks/ablation.py [key=value ...] [--plan FILE.yaml] [--shards DIR] [--seeds 3]
                                  [--budget-minutes M] [--out DIR]

A plan names a base configuration, the overrides that make it the recipe to compare with, and additions, each with a
name and further overrides. Every variant is trained once per seed in a fresh process, on the same images, from the same
initial weights and with the same validation split. The report gives the gain of each addition over the recipe; which
additions to adopt is left to the reader. An addition with a `teacher` is distilled from that variant's run of the same
seed, so it takes one more run.

Runs that are already recorded with the same settings and data are not repeated, so a stopped ablation resumes.
Overrides on the command line (key=value) apply to all runs. Writes NAME.jsonl (a line per run), NAME.md and NAME.png,
where NAME is the plan's.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from benchmarks.common.default_set import choose_set
from benchmarks.common.harness import in_process
from benchmarks.training.ablation_report import draw, markdown
from shards.atomic import make_directory, replace_file, write_file
from shards.cli import run_command
from shards.errors import UserError
from shards.open import open_split
from trainer.checkpoint.run_dir import RunDirectory
from trainer.config import load as config
from trainer.config.schema import Config, DataConfig
from trainer.data.training_data import open_data
from trainer.loop import engine
from trainer.loop.state import make_training
from trainer.models.precision import resolve_precision
from trainer.runtime.distributed import init_distributed
from trainer.runtime.env_info import collect_env_info

DEFAULT_OUT = Path("benchmarks/out")
DEFAULT_PLAN = Path("benchmarks/training/plans/ablation.yaml")
RECIPE = "recipe"
SEEDS = 3


@dataclass(frozen=True)
class Variant:
    """overrides: of the base, by dotted name. teacher: the variant whose run of the same seed teaches this one."""

    name: str
    overrides: dict[str, Any] = field(default_factory=dict)
    teacher: str | None = None

    def settings(self, plan: Plan, seed: int, shards: Path, kept: Path) -> Config:
        """Its complete settings. kept: where the checkpoints of teachers are."""
        overrides = plan.recipe | self.overrides | plan.common | {"seed": seed, "data.shards": str(shards)}
        if self.teacher is not None:
            overrides["distillation.teacher"] = str(checkpoint_of(kept, self.teacher, seed))
        return config.load(plan.base, [f"{name}={json.dumps(value)}" for name, value in overrides.items()])


@dataclass(frozen=True)
class Plan:
    """base: a configuration file. recipe: overrides of it. additions: each on top of the recipe. common: overrides that
    hold for all."""

    base: Path
    recipe: dict[str, Any]
    additions: tuple[Variant, ...]
    common: dict[str, Any]

    @property
    def variants(self) -> tuple[Variant, ...]:
        return (Variant(RECIPE), *self.additions)

    @property
    def teachers(self) -> set[str]:
        """Names of the variants that teach others."""
        return {variant.teacher for variant in self.additions if variant.teacher is not None}


def read_plan(path: Path, common: list[str]) -> Plan:
    """A plan from its file (see `benchmarks/training/plans/ablation.yaml`). Raises `UserError` for what is none."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        additions = [
            Variant(one["name"], dict(one.get("set") or {}), one.get("teacher")) for one in content["additions"]
        ]
        overrides = dict(override.split("=", 1) for override in common)
        plan = Plan(
            base=Path(content["base"]),
            recipe=dict(content.get("recipe") or {}),
            additions=tuple(additions),
            common={name: yaml.safe_load(value) for name, value in overrides.items()},
        )
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            found=f"{path}, which is no plan: {type(error).__name__} {error}".replace("\n", " "),
            expected="base, recipe and additions, each of these with a name and overrides under set",
            hint=f"compare it with {DEFAULT_PLAN}",
        ) from None
    names = [variant.name for variant in plan.variants]
    strange = plan.teachers - set(names)
    if len(set(names)) < len(names) or strange:
        raise UserError(
            found=f"{path} with additions {', '.join(names)}" + (f" taught by {min(strange)}" if strange else ""),
            expected=f"distinct names, none of them {RECIPE}, and teachers among them",
            hint="rename one",
        )
    return plan


def measure(settings: Config, keep: Path | None) -> dict[str, Any]:
    """Train and test once; called in a process of its own. keep: where to copy the best checkpoint to."""
    start = time.perf_counter()
    with init_distributed(settings.device) as world, tempfile.TemporaryDirectory() as run:
        settings = resolve_precision(settings, world.device)
        data = open_data(settings, world)
        training = make_training(settings, data, world)
        directory = RunDirectory(Path(run))
        with directory.lock(), contextlib.redirect_stdout(io.StringIO()):
            evaluation = engine.fit(training, directory, loggers=[])
        if keep is not None:
            make_directory(keep.parent)
            with directory.best.open("rb") as source, replace_file(keep) as target:
                shutil.copyfileobj(source, target)
        decision = training.decision
        assert decision is not None, "an ablation needs a validation split"
        return {
            "tau": decision.tau,
            "best_epoch": training.state.best_epoch,
            "validation": decision.validation.summary(),
            "test": evaluation.summary(),
            "training_images": len(data.train.samples),
            "images_seen": training.state.total.samples,
            "training_seconds": training.state.total.seconds,
            "seconds": time.perf_counter() - start,
            "device": str(world.device),
            "environment": collect_env_info(world.device),
        }


def checkpoint_of(kept: Path, variant: str, seed: int) -> Path:
    """Where the best checkpoint of a variant that teaches others is kept."""
    return kept / f"{variant.replace(' ', '-')}-{seed}.pt"


class Results:
    """The records of an ablation, each appended to a file as soon as it is there."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.records: list[dict[str, Any]] = []
        make_directory(path.parent)
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        for line in lines:
            # A process that was killed while it wrote leaves half a line.
            with contextlib.suppress(json.JSONDecodeError):
                self.records.append(json.loads(line))
        if len(self.records) < len(lines):
            write_file(path, "".join(json.dumps(record) + "\n" for record in self.records))

    def find(self, settings: Config, data: str) -> dict[str, Any] | None:
        """The newest record of a run with these settings on this data; what it says nothing of, being older than the
        setting, was at its default."""
        identity = identity_of(settings, data)
        defaults = identity_of(Config(data=DataConfig(shards=settings.data.shards)), data)
        return next((one for one in reversed(self.records) if defaults | one["identity"] == identity), None)

    def append(self, record: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.records.append(record)


def identity_of(settings: Config, data: str) -> dict[str, Any]:
    """What a run's figures depend on. data: the digest of the packed set. A teacher is known by its name alone."""
    recipe = settings.recipe()
    if recipe.get("distillation.teacher"):
        recipe["distillation.teacher"] = Path(recipe["distillation.teacher"]).name
    return json.loads(json.dumps({"data": data, **recipe}))


@dataclass
class Ablation:
    """Runs what a plan asks for and is not in the results yet."""

    plan: Plan
    shards: Path
    seeds: int
    results: Results
    kept: Path
    until: float = float("inf")
    """Seconds of `time.monotonic()` after which no run is begun."""

    def __post_init__(self) -> None:
        self._data = "".join(open_split(self.shards, part).manifest.digest() for part in ("train", "test"))
        for variant in self.plan.variants:  # what is wrong in one is told before anything runs
            variant.settings(self.plan, 0, self.shards, self.kept)

    def run(self) -> bool:
        """Run every variant, seed by seed.

        Returns:
            Whether all runs were completed within the time budget.
        """
        return all(self._run(variant, seed) for seed in range(self.seeds) for variant in self.plan.variants)

    def rows(self) -> list[dict[str, Any]]:
        """One row per variant that has been run: its name and its records by seed."""
        rows = [{"name": variant.name, "records": dict(self._found(variant))} for variant in self.plan.variants]
        return [row for row in rows if row["records"]]

    def _found(self, variant: Variant) -> Iterator[tuple[int, dict[str, Any]]]:
        for seed in range(self.seeds):
            record = self.results.find(variant.settings(self.plan, seed, self.shards, self.kept), self._data)
            if record is not None:
                yield seed, record

    def _run(self, variant: Variant, seed: int) -> bool:
        settings = variant.settings(self.plan, seed, self.shards, self.kept)
        keep = checkpoint_of(self.kept, variant.name, seed) if variant.name in self.plan.teachers else None
        if self.results.find(settings, self._data) and (keep is None or keep.exists()):
            return True
        if time.monotonic() > self.until:
            return False
        print(f"{variant.name}, seed {seed} ...", end=" ", flush=True)
        found = in_process(measure, settings, keep)
        if "failed" in found:
            raise UserError(
                found=f"{variant.name} with seed {seed}: {found['failed']}",
                expected="a run that fits in the memory",
                hint="a smaller loader.batch_size or data.resolution, as a further override; what ran is kept",
            )
        names = {"name": "ablation", "variant": variant.name, "seed": seed, "overrides": variant.overrides}
        self.results.append({**names, "identity": identity_of(settings, self._data), **found})
        judged = found["validation"]
        print(f"validation {judged['accuracy']:.2%}, macro F1 {judged['macro_f1']:.2%}  ({found['seconds']:.0f} s)")
        return True


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return int(text)


def main() -> int:
    parser = argparse.ArgumentParser(description="What does each addition to a recipe bring, at equal compute?")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that hold for all runs")
    parser.add_argument("--plan", type=Path, default=DEFAULT_PLAN, metavar="FILE", help=f"default: {DEFAULT_PLAN}")
    parser.add_argument(
        "--shards", metavar="DIR", help="packed set or its address (default: EMNIST ByClass, or digits)"
    )
    parser.add_argument("--seeds", type=positive, default=SEEDS, help="runs of each, with seeds 0, 1, ...")
    parser.add_argument("--budget-minutes", type=float, metavar="M", help="begin no run after so many minutes")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, metavar="DIR", help="where to write the results")
    arguments = parser.parse_intermixed_args()
    out = arguments.out / arguments.plan.stem
    plan = read_plan(arguments.plan, arguments.overrides)
    shards = choose_set(arguments.shards)
    ablation = Ablation(plan, shards, arguments.seeds, Results(out.with_suffix(".jsonl")), arguments.out / "teachers")
    if arguments.budget_minutes is not None:
        ablation = replace(ablation, until=time.monotonic() + 60 * arguments.budget_minutes)
    complete = ablation.run()
    rows = ablation.rows()
    if rows:
        text = markdown(rows)
        write_file(out.with_suffix(".md"), text + "\n")
        draw(rows, out.with_suffix(".png"))
        print(f"\n{text}\n\n{out}.jsonl, .md, .png")
    if not complete:
        print("the time is over; the same command goes on")
    return 0


if __name__ == "__main__":
    run_command(main)
