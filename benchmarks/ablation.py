"""Measure what each addition to a training recipe gains at equal compute.

    python benchmarks/ablation.py [key=value ...] [--plan FILE.yaml] [--shards DIR] [--seeds 3]
                                  [--budget-minutes M] [--out DIR]

A plan names a base configuration, overrides that turn it into the recipe, and additions with further overrides. Each
variant is trained once per seed in a fresh process, on the same images, from the same initial weights and with the same
validation split. The report shows the gain of each addition over the recipe; it does not select any. An addition with a
`teacher` is distilled from the run of that variant with the same seed.

Runs that are already recorded with the same settings and data are skipped, so the same command resumes an interrupted
ablation. Overrides on the command line (key=value) apply to all runs. Output: NAME.jsonl (a line per run), NAME.md and
NAME.png, where NAME is that of the plan. The chart of a plan with `published` results, such as
`benchmarks/training/plans/frontier.yaml`, shows the metrics over the CPU time of a run.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.common.arguments import add_out_argument, add_shards_argument, positive
from benchmarks.common.default_set import choose_set
from benchmarks.common.harness import in_process
from benchmarks.common.training import fit_and_test
from benchmarks.training.ablation_report import ablation_markdown, plot_gains
from benchmarks.training.frontier_report import plot_frontier
from shards.atomic import append_line, make_directory, read_file, replace_file, write_file
from shards.cli import run_command
from shards.errors import UserError
from shards.manifest import VALIDATION, has_split
from shards.open import open_split
from trainer.checkpoint.run_dir import RunDirectory
from trainer.config import load as config
from trainer.config.schema import Config, DataConfig
from trainer.data.training_data import open_data
from trainer.loop.state import make_training
from trainer.models.auto import resolve_auto
from trainer.runtime.distributed import init_distributed
from trainer.runtime.env_info import collect_env_info

DEFAULT_PLAN = Path("benchmarks/training/plans/ablation.yaml")
RECIPE = "recipe"
SEEDS = 3


@dataclass(frozen=True)
class RecipeVariant:
    """Recipe with further overrides.

    Args:
        name: Name in the report.
        overrides: Values by dotted setting.
        teacher: Variant to distil from; None for no distillation.
    """

    name: str
    overrides: dict[str, Any] = field(default_factory=dict)
    teacher: str | None = None

    def make_config(self, plan: Plan, seed: int, shards: Path, teachers: Path) -> Config:
        """Build the settings of a run; `teachers` is the directory of the teachers' checkpoints."""
        overrides = plan.recipe | self.overrides | plan.common | {"seed": seed, "data.shards": str(shards)}
        if self.teacher is not None:
            teacher = next(variant for variant in plan.variants if variant.name == self.teacher)
            settings = teacher.make_config(plan, seed, shards, teachers)
            overrides["distillation.teacher"] = str(checkpoint_of(teachers, self.teacher, settings))
        return config.load(plan.base, [f"{name}={json.dumps(value)}" for name, value in overrides.items()])


@dataclass(frozen=True)
class Plan:
    """Content of a plan.

    Args:
        base: Configuration file.
        recipe: Overrides that turn the base into the recipe.
        additions: Variants of the recipe.
        common: Overrides of all runs.
        published: Results of others, see `plot_frontier`; with them the chart shows the metrics over the CPU time.
    """

    base: Path
    recipe: dict[str, Any]
    additions: tuple[RecipeVariant, ...]
    common: dict[str, Any]
    published: tuple[dict[str, Any], ...] = ()

    @property
    def variants(self) -> tuple[RecipeVariant, ...]:
        return (RecipeVariant(RECIPE), *self.additions)

    @property
    def teachers(self) -> set[str]:
        """Names of the variants that others are distilled from."""
        return {variant.teacher for variant in self.additions if variant.teacher is not None}


def read_plan(path: Path, common: list[str]) -> Plan:
    """Read a plan, such as `benchmarks/training/plans/ablation.yaml`.

    Args:
        path: YAML file.
        common: Overrides of all runs, `key=value`.

    Raises:
        UserError: The file is not a plan.
    """
    try:
        content = config.parse_yaml(read_file(path, config.MAX_YAML_BYTES).decode())
        additions = [
            RecipeVariant(one["name"], dict(one.get("set") or {}), one.get("teacher")) for one in content["additions"]
        ]
        overrides = dict(override.split("=", 1) for override in common)
        plan = Plan(
            base=Path(content["base"]),
            recipe=dict(content.get("recipe") or {}),
            additions=tuple(additions),
            common={name: config.parse_yaml(value) for name, value in overrides.items()},
            published=tuple(dict(one) for one in content.get("published") or ()),
        )
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            found=f"{path}, not a plan: {type(error).__name__} {error}".replace("\n", " "),
            expected="base, recipe and additions, each addition with a name and overrides under set",
            hint=f"compare it with {DEFAULT_PLAN}",
        ) from None
    names = [variant.name for variant in plan.variants]
    unknown = plan.teachers - set(names)
    if len(set(names)) < len(names) or unknown:
        raise UserError(
            found=f"{path} with additions {', '.join(names)}" + (f" and teacher {min(unknown)}" if unknown else ""),
            expected=f"distinct names other than {RECIPE}, and teachers among them",
            hint="rename an addition or its teacher",
        )
    return plan


def measure(settings: Config, checkpoint: Path | None) -> dict[str, Any]:
    """Train and test once; copy the best checkpoint to `checkpoint` unless it is None."""
    start, cpu_start = time.perf_counter(), time.process_time()
    with init_distributed(settings.device) as world, tempfile.TemporaryDirectory() as run:
        settings = resolve_auto(settings, world.device)
        data = open_data(settings, world)
        training = make_training(settings, data, world)
        directory = RunDirectory(Path(run))
        evaluation = fit_and_test(training, directory)
        if checkpoint is not None:
            make_directory(checkpoint.parent)
            with directory.best.open("rb") as source, replace_file(checkpoint) as target:
                shutil.copyfileobj(source, target)
        posthoc = training.posthoc
        assert posthoc is not None, "an ablation needs a validation split"
        return {
            "tau": posthoc.tau,
            "best_epoch": training.state.best_epoch,
            "validation": posthoc.validation.summary(),
            "test": evaluation.summary(),
            "training_images": len(data.train.samples),
            "images_seen": training.state.total.samples,
            "training_seconds": training.state.total.seconds,
            "seconds": time.perf_counter() - start,
            "cpu_seconds": time.process_time() - cpu_start,
            "device": str(world.device),
            "environment": collect_env_info(world.device),
        }


def checkpoint_of(teachers: Path, variant: str, settings: Config) -> Path:
    """Return the path of the best checkpoint of a teacher, in a directory named by the hash of its settings."""
    return teachers / _digest(settings.recipe()) / f"{variant.replace(' ', '-')}-{settings.seed}.pt"


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


class RunRecords:
    """Records of an ablation in a file of JSON lines, appended as runs finish."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.records: list[dict[str, Any]] = []
        make_directory(path.parent)
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            # A killed process leaves an incomplete line.
            with contextlib.suppress(json.JSONDecodeError):
                self.records.append(json.loads(line))

    def find(self, settings: Config, data: str) -> dict[str, Any] | None:
        """Return the newest record of a run with these settings and data, or None.

        A setting that an older record does not contain had its default value.
        """
        identity = identity_of(settings, data)
        defaults = identity_of(Config(data=DataConfig(shards=settings.data.shards)), data)
        return next((one for one in reversed(self.records) if defaults | one["identity"] == identity), None)

    def append(self, record: dict[str, Any]) -> None:
        append_line(self._path, json.dumps(record))
        self.records.append(record)


def identity_of(settings: Config, data: str) -> dict[str, Any]:
    """Return all that the metrics of a run depend on; `data` is the identity of the packed data set."""
    recipe = settings.recipe()
    if recipe.get("distillation.teacher"):
        recipe["distillation.teacher"] = Path(recipe["distillation.teacher"]).name
    return json.loads(json.dumps({"data": data, **recipe}))


@dataclass
class Ablation:
    """Runs of a plan that are not recorded yet.

    Args:
        plan: The plan.
        shards: Packed data set.
        seeds: Number of seeds.
        results: Records.
        teachers: Directory of the teachers' checkpoints, by data set and settings.
        until: Value of `time.monotonic()` after which no run starts.
    """

    plan: Plan
    shards: Path
    seeds: int
    results: RunRecords
    teachers: Path
    until: float = float("inf")

    def __post_init__(self) -> None:
        self._data = "".join(open_split(self.shards, split).manifest.identity() for split in ("train", "test"))
        self._teachers = self.teachers / _digest(self._data)
        for variant in self.plan.variants:  # refuse invalid settings before the first run
            settings = variant.make_config(self.plan, 0, self.shards, self._teachers)
            if settings.data.val_fraction == 0 and not has_split(self.shards, VALIDATION):
                raise UserError(
                    found=f"variant {variant.name}: data.val_fraction=0, and {self.shards} has no val split",
                    expected="a validation split, which selects the epoch",
                    hint="add data.val_fraction=0.1 to the command, or pack a val split",
                )

    def run(self) -> bool:
        """Run every variant, seed by seed.

        Returns:
            Whether all runs were completed within the time budget.
        """
        return all(self._run(variant, seed) for seed in range(self.seeds) for variant in self.plan.variants)

    def rows(self) -> list[dict[str, Any]]:
        """Return name and records by seed of each variant with results."""
        rows = [{"name": variant.name, "records": dict(self._find(variant))} for variant in self.plan.variants]
        return [row for row in rows if row["records"]]

    def _find(self, variant: RecipeVariant) -> Iterator[tuple[int, dict[str, Any]]]:
        for seed in range(self.seeds):
            record = self.results.find(variant.make_config(self.plan, seed, self.shards, self._teachers), self._data)
            if record is not None:
                yield seed, record

    def _run(self, variant: RecipeVariant, seed: int) -> bool:
        settings = variant.make_config(self.plan, seed, self.shards, self._teachers)
        is_teacher = variant.name in self.plan.teachers
        checkpoint = checkpoint_of(self._teachers, variant.name, settings) if is_teacher else None
        if self.results.find(settings, self._data) and (checkpoint is None or checkpoint.exists()):
            return True
        if time.monotonic() > self.until:
            return False
        print(f"{variant.name}, seed {seed} ...", end=" ", flush=True)
        result = in_process(measure, settings, checkpoint)
        if "failed" in result:
            raise UserError(
                found=f"{variant.name} with seed {seed}: {result['failed']}",
                expected="a run that fits into memory",
                hint="override loader.batch_size or data.resolution with a smaller value; complete runs are kept",
            )
        names = {"name": "ablation", "variant": variant.name, "seed": seed, "overrides": variant.overrides}
        self.results.append({**names, "identity": identity_of(settings, self._data), **result})
        scores = result["validation"]
        print(f"validation {scores['accuracy']:.2%}, macro F1 {scores['macro_f1']:.2%}  ({result['seconds']:.0f} s)")
        return True


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Measure what each addition to a recipe gains at equal compute.")
    add = parser.add_argument
    add("overrides", nargs="*", default=[], metavar="key=value", help="settings of all runs")
    add("--plan", type=Path, default=DEFAULT_PLAN, metavar="FILE", help=f"plan (default: {DEFAULT_PLAN})")
    add_shards_argument(parser)
    add("--seeds", type=positive(int), default=SEEDS, metavar="N", help=f"runs per variant (default: {SEEDS})")
    add("--budget-minutes", type=float, metavar="M", help="start no run after this time (default: no limit)")
    add_out_argument(parser)
    arguments = parser.parse_intermixed_args()
    out = arguments.out / arguments.plan.stem
    plan = read_plan(arguments.plan, arguments.overrides)
    shards = choose_set(arguments.shards)
    ablation = Ablation(
        plan, shards, arguments.seeds, RunRecords(out.with_suffix(".jsonl")), arguments.out / "teachers"
    )
    if arguments.budget_minutes is not None:
        ablation = replace(ablation, until=time.monotonic() + 60 * arguments.budget_minutes)
    is_complete = ablation.run()
    rows = ablation.rows()
    if rows:
        text = ablation_markdown(rows)
        write_file(out.with_suffix(".md"), text + "\n")
        if plan.published:
            plot_frontier(rows, plan.published, out.with_suffix(".png"))
        else:
            plot_gains(rows, out.with_suffix(".png"))
        print(f"\n{text}\n\n{out}.jsonl, .md, .png")
    if not is_complete:
        print("time budget exhausted; run the same command to resume")
    return 0


if __name__ == "__main__":
    run_command(main)
