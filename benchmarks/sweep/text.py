"""Report of a resolution sweep in Markdown: tables, recommendation, growth of the costs, notes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.common.text import (
    Table,
    bullets,
    format_bytes,
    format_machine,
    format_percent,
    format_spread,
    markdown_table,
    tabulate,
)
from benchmarks.sweep.plan import INTERPOLATIONS, point_of
from benchmarks.sweep.stats import (
    BY_EPOCHS,
    BY_TIME,
    Estimate,
    PowerLaw,
    Recommendation,
    SeedGroup,
    fit_power_law,
    group_seeds,
    recommend,
)
from shards.cli import plural

RUNS = (BY_EPOCHS, BY_TIME)


@dataclass(frozen=True)
class Series:
    """Results of one model and one subset of the training images, by resolution, with the recipe's interpolation."""

    model: str
    subset: float
    groups: tuple[SeedGroup, ...]

    @property
    def title(self) -> str:
        return f"{self.model}, {self.subtitle}"

    @property
    def subtitle(self) -> str:
        fraction = "all" if self.subset == 1 else f"{100 * self.subset:.3g}%:"
        return f"{fraction} {self.groups[0].records[0]['training_images']:,} training images"

    @property
    def pixels(self) -> list[int]:
        return [group.resolution**2 for group in self.groups]

    def recommend(self, run: str) -> Recommendation | None:
        return recommend(self.groups, run)

    def growth(self) -> dict[str, PowerLaw | None]:
        """Fit the training time and the loader's CPU time in ms/image over the number of pixels."""
        return {
            "training time": fit_power_law(self.pixels, [group.train_ms for group in self.groups]),
            "loader CPU time": fit_power_law(self.pixels, [group.loader_ms for group in self.groups]),
        }


@dataclass(frozen=True)
class Section:
    """Part of the report: the resolutions of one model, or the models at one resolution.

    Attributes:
        title: Heading.
        by: Attribute of `SeedGroup` that distinguishes the rows of the tables.
        groups: The rows.
        paragraphs: Explanations.
        growth: Lines on how the costs grow with the number of pixels; none for models.
    """

    title: str
    by: str
    groups: Sequence[SeedGroup]
    paragraphs: list[str]
    growth: list[str]


class SweepResults:
    """All results of a sweep: groups of seeds, and a series for each model and subset.

    Args:
        records: One per measured or failed point.
        interpolation: Interpolation of the recipe.
        skipped: Points that did not fit into the time budget.
    """

    def __init__(self, records: Sequence[dict[str, Any]], interpolation: str, skipped: Sequence[str] = ()) -> None:
        self.records = records
        self.skipped = skipped
        self.groups = group_seeds(records)
        by_key: dict[tuple[str, float], list[SeedGroup]] = {}
        for group in self.groups:
            if group.interpolation == interpolation:
                by_key.setdefault((group.model, group.subset), []).append(group)
        self.series = [Series(*key, tuple(own)) for key, own in by_key.items()]

    @property
    def first(self) -> dict[str, Any]:
        return self.series[0].groups[0].records[0]

    @property
    def main(self) -> Series:
        """The series of the headline recommendation: the first model with the largest subset."""
        return self.largest_subsets[0]

    @property
    def largest_subsets(self) -> list[Series]:
        """The series with the largest subset of each model."""
        models = dict.fromkeys(series.model for series in self.series)
        return [max((one for one in self.series if one.model == model), key=lambda one: one.subset) for model in models]

    @property
    def compares_models(self) -> bool:
        """Whether several models were measured at one resolution, so that no resolution can be recommended."""
        resolutions = {group.resolution for series in self.series for group in series.groups}
        return len(self.largest_subsets) > 1 and len(resolutions) == 1

    @property
    def subject(self) -> str:
        """What the tables and charts compare."""
        return "model" if self.compares_models else "resolution"

    @property
    def runs(self) -> list[str]:
        """Kinds of runs with results."""
        return [run for run in RUNS if any(group.metric(run, "accuracy") for group in self.groups)]

    @property
    def subsets(self) -> list[float]:
        return sorted({series.subset for series in self.series})

    def of_subset(self, subset: float) -> list[Series]:
        """Return the series of one subset, by model."""
        return [series for series in self.series if series.subset == subset]

    def interpolation_group(self) -> SeedGroup | None:
        """Return the group at which interpolations are compared: the recommended resolution.

        At the stored size nothing is resized, so the next larger resolution replaces it. None if there is none.
        """
        choice = self.main.recommend(BY_EPOCHS) if self.series else None
        if choice is None:
            return None
        height, width, _ = choice.chosen.records[0]["image_shape"]
        return choice.next_larger if height == width == choice.chosen.resolution else choice.chosen

    def interpolations(self) -> list[SeedGroup]:
        """Return the groups that differ only in interpolation; empty if only one was measured."""
        base = self.interpolation_group()
        if base is None:
            return []
        key = (base.model, base.subset, base.resolution)
        groups = [one for one in self.groups if (one.model, one.subset, one.resolution) == key]
        return sorted(groups, key=lambda one: INTERPOLATIONS.index(one.interpolation)) if len(groups) > 1 else []


def run_name(run: str, record: dict[str, Any]) -> str:
    """Name a kind of run: `5 epochs`, `10 s of training` or `30 min of training`."""
    if run == BY_EPOCHS:
        return plural(record["epochs"], "epoch")
    seconds = record["seconds"]
    return f"{seconds / 60:.3g} min of training" if seconds >= 120 else f"{seconds:g} s of training"


def format_estimate(estimate: Estimate | None) -> str:
    """Format the mean and standard deviation of a fraction."""
    return "" if estimate is None else format_percent(estimate.mean, estimate.std)


def cost_table(groups: Sequence[SeedGroup], by: str) -> Table:
    """Tabulate the costs of each resolution or model. Models do not differ in loading and storage."""
    training = {
        "training images/s (range)": lambda group: format_spread(group.spread("training_images_per_second")),
        "data wait": lambda group: format_percent(group.median("data_wait_share")),
        "peak memory": lambda group: format_bytes(group.largest("peak_memory_bytes") or 0),
    }
    if any(group.largest("peak_device_memory_bytes") for group in groups):
        training["peak GPU memory"] = lambda group: format_bytes(group.largest("peak_device_memory_bytes") or 0)
    if by == "model":
        parameters = {"parameters": lambda group: f"{group.records[0]['parameters']:,}"}
        return tabulate({by: _row_label(by), **parameters, **training}, groups)
    loader = {
        "loader images/s (range)": lambda group: format_spread(group.spread("loader_images_per_second")),
        "loader CPU-s / 1,000 (range)": _loader_cpu,
    }
    disk = {
        "on disk": lambda group: format_bytes(group.records[0]["bytes_at_rest"]),
        "pre-resized (uint8 / float32)": lambda group: " / ".join(
            format_bytes(group.records[0][f"bytes_pre_resized_{dtype}"]) for dtype in ("uint8", "float32")
        ),
    }
    return tabulate({by: _row_label(by), **loader, **training, **disk}, groups)


def _row_label(by: str) -> Callable[[SeedGroup], str]:
    return lambda group: str(getattr(group, by))


def _loader_cpu(group: SeedGroup) -> str:
    return format_spread(group.spread("loader_cpu_seconds_per_thousand"), ",.4f")


def accuracy_table(groups: Sequence[SeedGroup], run: str, by: str) -> Table:
    """Tabulate the test metrics after one kind of run: mean and standard deviation over seeds."""
    columns = {
        by: _row_label(by),
        "seeds": lambda group: str(len(group.records)),
        "accuracy": lambda group: format_estimate(group.metric(run, "accuracy")),
        "macro F1": lambda group: format_estimate(group.metric(run, "macro_f1")),
        "calibration error": lambda group: format_estimate(group.metric(run, "ece")),
        "validation accuracy": lambda group: format_estimate(group.validation(run)),
    }
    if by == "interpolation":
        columns["loader CPU-s / 1,000 (range)"] = _loader_cpu
    else:
        columns["updates"] = lambda group: f"{updates.mean:,.0f}" if (updates := group.metric(run, "updates")) else ""
    return tabulate(columns, groups)


def interpolation_title(groups: Sequence[SeedGroup]) -> str:
    """Return the heading of the comparison of interpolations."""
    first = groups[0]
    after = run_name(BY_EPOCHS, first.records[0])
    return f"Interpolation at {first.resolution}x{first.resolution}, {first.model}, {after}"


def sections(results: SweepResults) -> list[Section]:
    """Return the parts of the report: one per model and subset, or one per subset if models are compared."""
    if not results.compares_models:
        return [
            Section(series.title, "resolution", series.groups, recommendation_text(series), growth_lines(series))
            for series in results.series
        ]
    parts = []
    for subset in results.subsets:
        own = results.of_subset(subset)
        groups = [series.groups[0] for series in own]
        side = groups[0].resolution
        best = [_explain_best(group, run) for run in results.runs if (group := best_model(groups, run))]
        parts.append(Section(f"Models at {side}x{side}, {own[0].subtitle}", "model", groups, best, []))
    return parts


def headlines(results: SweepResults) -> list[tuple[str, str, str]]:
    """Return the result of each kind of run: its label, the recommended resolution or best model, and its figures."""
    lines = []
    for run in results.runs:
        if results.compares_models:
            label, group = "Best validation accuracy", best_model(sections(results)[-1].groups, run)
        else:
            choice = results.main.recommend(run)
            label, group = "Recommended", choice.chosen if choice is not None else None
        if group is not None:
            name = group.model if results.compares_models else f"{group.resolution}x{group.resolution}"
            accuracy = format_estimate(group.metric(run, "accuracy"))
            figures = f"{accuracy} test accuracy, {group.throughput:,.0f} training images/s"
            lines.append((f"{label} after {run_name(run, results.first)}", name, figures))
    return lines


def best_model(groups: Sequence[SeedGroup], run: str) -> SeedGroup | None:
    """Return the group with the best validation accuracy; None without a successful run."""
    scored = [(score.mean, group) for group in groups if (score := group.validation(run)) is not None]
    return max(scored, key=lambda pair: pair[0])[1] if scored else None


def recommendation_text(series: Series) -> list[str]:
    """Explain which resolution is recommended and what the next larger one costs; two paragraphs per kind of run."""
    choices = [choice for run in RUNS if (choice := series.recommend(run)) is not None]
    return [text for choice in choices for text in (_explain_choice(choice), _explain_next(choice))]


def _explain_choice(choice: Recommendation) -> str:
    chosen, best = choice.chosen, choice.best
    best_score, score = best.validation(choice.run), chosen.validation(choice.run)
    assert best_score and score
    error = f"{100 * (best_score.std_error or 0):.2f} points"
    if chosen is best:
        reason = f"the best validation accuracy, {format_percent(score.mean)} (standard error {error})"
    else:
        reason = (
            f"the smallest resolution whose validation accuracy ({format_percent(score.mean)}) lies within one "
            f"standard error ({error}) of the best, {format_percent(best_score.mean)} at "
            f"{best.resolution}x{best.resolution}"
        )
    after = run_name(choice.run, chosen.records[0])
    return f"After {after}: {chosen.resolution}x{chosen.resolution}, {reason}. {_explain_test(chosen, choice.run)}"


def _explain_best(group: SeedGroup, run: str) -> str:
    score = group.validation(run)
    assert score
    return (
        f"After {run_name(run, group.records[0])}: {group.model} has the best validation accuracy, "
        f"{format_percent(score.mean)} (standard error {100 * (score.std_error or 0):.2f} points). "
        f"{_explain_test(group, run)}"
    )


def _explain_test(group: SeedGroup, run: str) -> str:
    test = group.metric(run, "accuracy")
    assert test
    seeds = f"mean of {test.n} seeds" if test.n > 1 else "one seed, so the spread between seeds is unknown"
    error = f"standard error {100 * (test.std_error or 0):.2f} points"
    return f"Its test accuracy is {format_estimate(test)} ({seeds}; {error})."


def _explain_next(choice: Recommendation) -> str:
    chosen, larger = choice.chosen, choice.next_larger
    if larger is None:
        return "No larger resolution was measured, so the cost of the next larger one is unknown."
    memory = [
        group.largest("peak_device_memory_bytes") or group.largest("peak_memory_bytes") or 0
        for group in (larger, chosen)
    ]
    text = (
        f"The next larger resolution, {larger.resolution}x{larger.resolution}, costs "
        f"{larger.train_ms / chosen.train_ms:.2f} times the training time per image, "
        f"{larger.loader_ms / chosen.loader_ms:.2f} times the CPU time of the loader and "
        f"{memory[0] / memory[1]:.2f} times the peak memory"
    )
    ours, theirs = chosen.metric(choice.run, "accuracy"), larger.metric(choice.run, "accuracy")
    if ours is None or theirs is None:
        return f"{text}."
    gain = theirs.mean - ours.mean
    error = math.hypot(ours.std_error or 0, theirs.std_error or 0)
    if choice.run == BY_TIME:
        text += " (so fewer images in the same time)"
    verb = "gains" if gain >= 0 else "loses"
    return f"{text}, and {verb} {100 * abs(gain):.2f} points of test accuracy (standard error {100 * error:.2f})."


def growth_lines(series: Series) -> list[str]:
    """Describe how the costs of an image grow with its number of pixels."""
    return [
        f"{name} per image grows with the number of pixels to the power of {fit}"
        for name, fit in series.growth().items()
        if fit is not None
    ]


def notes(results: SweepResults) -> list[str]:
    """Describe the conditions of the measurement and what could not be measured."""
    first = results.first
    lines = [
        f"{first['dataset']}: {plural(first['by_epochs']['samples'], 'test image')}; batch size {first['batch_size']}, "
        f"{first['precision']}, loader {first['loader_backend']}; {format_machine(first['environment'])}",
        "percentages: mean ± standard deviation over seeds; rates: median and range over all runs and seeds",
        "each training selects its best epoch on the validation split and evaluates the test split once, at its end; "
        f"{results.subject}s are selected on the validation split as well",
    ]
    timed = [record["by_time"] for record in results.records if (record.get("by_time") or {}).get("training_seconds")]
    if timed:
        seconds = [run["training_seconds"] for run in timed]
        lines.append(
            f"{run_name(BY_TIME, first)}: the number of updates is fixed in advance from the measured throughput, so "
            f"that the learning-rate schedule completes; actual training time "
            f"{min(seconds):.1f} .. {max(seconds):.1f} s"
        )
    for record in results.records:
        point = point_of(record)
        if "failed" in record:
            lines.append(f"{point}: FAILED, {record['failed']}")
        elif record["out_of_memory"]:
            lines.append(
                f"{point}: out of memory at batch size {record['out_of_memory'][0]['batch_size']}, so measured with "
                f"batch size {record['batch_size']} and gradient accumulation {record['accumulation']}"
            )
        elif "failed" in (record["by_time"] or {}):
            lines.append(f"{point}: {record['by_time']['failed']}")
    return lines + [f"{point}: skipped, exceeds the time budget" for point in results.skipped]


def sweep_markdown(results: SweepResults) -> str:
    """Format the complete report."""
    blocks = []
    for section in sections(results):
        blocks += [f"### {section.title}", markdown_table(*cost_table(section.groups, section.by))]
        for run in results.runs:
            table = accuracy_table(section.groups, run, section.by)
            blocks += [f"After {run_name(run, results.first)}:", markdown_table(*table)]
        blocks += [*section.paragraphs, bullets(section.growth)]
    if groups := results.interpolations():
        table = accuracy_table(groups, BY_EPOCHS, by="interpolation")
        blocks += [f"### {interpolation_title(groups)}", markdown_table(*table)]
    blocks += ["### Conditions", bullets(notes(results))]
    return "\n\n".join(filter(None, blocks))
