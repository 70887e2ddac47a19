"""The findings of a resolution study in words and Markdown: tables, recommendation, growth, what is missing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.common.harness import Spread, size, table
from benchmarks.sweep.plan import INTERPOLATIONS, point_of
from benchmarks.sweep.stats import BY_EPOCHS, BY_TIME, Cell, Choice, Estimate, Growth, cells, choose, growth

RUNS = (BY_EPOCHS, BY_TIME)


@dataclass(frozen=True)
class Panel:
    """One model and one subset of the training images. cells: by resolution, with the recipe's interpolation."""

    model: str
    subset: float
    cells: tuple[Cell, ...]

    @property
    def title(self) -> str:
        share = "all" if self.subset == 1 else f"{100 * self.subset:.3g} %:"
        return f"{self.model}, {share} {self.cells[0].records[0]['training_images']:,} training images"

    def choice(self, run: str) -> Choice | None:
        return choose(self.cells, run)

    def growth(self) -> dict[str, Growth | None]:
        """How the costs of an image grow with its pixels, by the name of the cost."""
        pixels = [cell.resolution**2 for cell in self.cells]
        training = [cell.seconds_per_image for cell in self.cells]
        loading = [cell.spread("loader_cpu_seconds_per_thousand").median for cell in self.cells]
        return {"training time": growth(pixels, training), "loader's processor time": growth(pixels, loading)}


@dataclass(frozen=True)
class Findings:
    """All that a study measured. left_out: words about points that did not fit into the time."""

    records: Sequence[dict[str, Any]]
    interpolation: str
    left_out: Sequence[str] = ()
    panels: tuple[Panel, ...] = field(init=False)
    cells: tuple[Cell, ...] = field(init=False)

    def __post_init__(self) -> None:
        found = tuple(cells(self.records))
        own = [cell for cell in found if cell.interpolation == self.interpolation]
        keys = dict.fromkeys((cell.model, cell.subset) for cell in own)
        panels = tuple(Panel(*key, tuple(cell for cell in own if (cell.model, cell.subset) == key)) for key in keys)
        object.__setattr__(self, "cells", found)
        object.__setattr__(self, "panels", panels)

    @property
    def first(self) -> dict[str, Any]:
        return self.panels[0].cells[0].records[0]

    @property
    def main(self) -> Panel:
        """The panel that the recommendation stands on: the first model with most images."""
        model = self.panels[0].model
        return max((panel for panel in self.panels if panel.model == model), key=lambda panel: panel.subset)

    def to_interpolate(self) -> Cell | None:
        """Where interpolations are compared: the recommended resolution, or the next one if that is the stored size,
        at which nothing is resized. None if there is no such."""
        choice = self.main.choice(BY_EPOCHS) if self.panels else None
        if choice is None:
            return None
        height, width, _ = choice.chosen.records[0]["image_shape"]
        return choice.larger if height == width == choice.chosen.resolution else choice.chosen

    def interpolations(self) -> list[Cell]:
        """The cells of that resolution, in the usual order of interpolations; none if only one was measured."""
        place = self.to_interpolate()
        if place is None:
            return []
        key = (place.model, place.subset, place.resolution)
        here = [cell for cell in self.cells if (cell.model, cell.subset, cell.resolution) == key]
        return sorted(here, key=lambda cell: INTERPOLATIONS.index(cell.interpolation)) if len(here) > 1 else []


def run_name(run: str, record: dict[str, Any]) -> str:
    """`5 epochs`, `10 s of training` or `30 min of training`."""
    if run == BY_TIME:
        seconds = record["seconds"]
        return f"{seconds / 60:.3g} min of training" if seconds >= 120 else f"{seconds:g} s of training"
    return f"{record['epochs']} {'epoch' if record['epochs'] == 1 else 'epochs'}"


def percent(found: Estimate | None) -> str:
    """Mean and standard deviation over seeds of a share."""
    if found is None:
        return ""
    deviation = f" ± {100 * found.deviation:.2f}" if found.deviation is not None else ""
    return f"{100 * found.mean:.2f}{deviation} %"


def spread(found: Spread, digits: int = 0) -> str:
    return f"{found.median:,.{digits}f} ({found.low:,.{digits}f} .. {found.high:,.{digits}f})"


def cost_rows(panel: Panel) -> tuple[list[str], list[list[str]]]:
    """Head and rows of what each resolution costs."""
    head = ["resolution", "loader images/s (range)", "loader CPU-s / 1,000 (range)", "training images/s (range)"]
    head += ["data wait", "peak memory", "at rest", "pre-resized (uint8 / float32)"]
    on_gpu = any(cell.largest("peak_device_memory_bytes") for cell in panel.cells)
    rows = []
    for cell in panel.cells:
        first = cell.records[0]
        rows.append(
            [
                str(cell.resolution),
                spread(cell.spread("loader_images_per_second")),
                spread(cell.spread("loader_cpu_seconds_per_thousand"), 4),
                spread(cell.spread("training_images_per_second")),
                f"{cell.median('data_wait_share'):.1%}",
                size(cell.largest("peak_memory_bytes") or 0),
                size(first["bytes_at_rest"]),
                f"{size(first['bytes_pre_resized_uint8'])} / {size(first['bytes_pre_resized_float32'])}",
            ]
        )
        if on_gpu:
            rows[-1].append(size(cell.largest("peak_device_memory_bytes") or 0))
    return head + (["peak memory, device"] if on_gpu else []), rows


def gain_rows(panel: Panel, runs: Sequence[str] = RUNS) -> tuple[list[str], list[list[str]]]:
    """Head and rows of what each resolution buys: mean and standard deviation over seeds."""
    first = panel.cells[0].records[0]
    head = ["resolution", "seeds"]
    for run in runs:
        after = run_name(run, first)
        head += [f"{after}: accuracy", "macro F1", "calibration error", "updates", "validation"]
    rows = []
    for cell in panel.cells:
        row = [str(cell.resolution), str(len(cell.records))]
        for run in runs:
            figures = [cell.figure(run, name) for name in ("accuracy", "macro_f1", "ece", "updates")]
            row += [percent(found) for found in figures[:3]]
            row += ["" if figures[3] is None else f"{figures[3].mean:,.0f}", percent(cell.validation(run))]
        rows.append(row)
    return head, rows


def interpolation_rows(found: Sequence[Cell]) -> tuple[list[str], list[list[str]]]:
    head = ["interpolation", "seeds", "accuracy", "macro F1", "calibration error", "validation"]
    head += ["loader CPU-s / 1,000 (range)"]
    rows = [
        [
            cell.interpolation,
            str(len(cell.records)),
            *(percent(cell.figure(BY_EPOCHS, name)) for name in ("accuracy", "macro_f1", "ece")),
            percent(cell.validation(BY_EPOCHS)),
            spread(cell.spread("loader_cpu_seconds_per_thousand"), 4),
        ]
        for cell in found
    ]
    return head, rows


def recommendation(panel: Panel) -> list[str]:
    """Which resolution to take, why, and what the next one would cost; a paragraph for each kind of run."""
    return [text for run in RUNS if (choice := panel.choice(run)) is not None for text in _paragraphs(choice)]


def _paragraphs(choice: Choice) -> list[str]:
    chosen, best = choice.chosen, choice.best
    first = chosen.records[0]
    best_found, found = best.validation(choice.run), chosen.validation(choice.run)
    test = chosen.figure(choice.run, "accuracy")
    assert best_found and found and test and best_found.error is not None
    if chosen is best:
        why = (
            f"which has the best validation accuracy, {100 * found.mean:.2f} % (standard error "
            f"{100 * best_found.error:.2f} points)"
        )
    else:
        why = (
            f"the smallest resolution whose validation accuracy ({100 * found.mean:.2f} %) lies within one standard "
            f"error ({100 * best_found.error:.2f} points) of the best, {100 * best_found.mean:.2f} % at "
            f"{best.resolution}x{best.resolution}"
        )
    seeds = f"mean of {found.n} seeds" if found.n > 1 else "one seed, so the spread between seeds is not known"
    text = (
        f"After {run_name(choice.run, first)}: {chosen.resolution}x{chosen.resolution}, {why}. On the test part it "
        f"reaches {percent(test)} ({seeds}; standard error {100 * (test.error or 0):.2f} points)."
    )
    return [text, _next_step(choice)]


def _next_step(choice: Choice) -> str:
    chosen, larger = choice.chosen, choice.larger
    if larger is None:
        return "No larger resolution was measured, so what the next step up would cost is not known."
    loading = [cell.spread("loader_cpu_seconds_per_thousand").median for cell in (larger, chosen)]
    memory = [
        cell.largest("peak_device_memory_bytes") or cell.largest("peak_memory_bytes") for cell in (larger, chosen)
    ]
    cost = (
        f"The next step up, {larger.resolution}x{larger.resolution}, would cost "
        f"{chosen.throughput / larger.throughput:.2f} times the training time of an image, "
        f"{loading[0] / loading[1]:.2f} times the loader's processor time and {memory[0] / memory[1]:.2f} times the "
        "peak memory"
    )
    ours, theirs = chosen.figure(choice.run, "accuracy"), larger.figure(choice.run, "accuracy")
    if ours is None or theirs is None:
        return cost + "."
    gain = theirs.mean - ours.mean
    error = math.hypot(ours.error or 0, theirs.error or 0)
    if choice.run == BY_TIME:
        cost += " (so fewer images in the same time)"
    verb = "gain" if gain >= 0 else "lose"
    return f"{cost}, and {verb} {100 * abs(gain):.2f} points of test accuracy (standard error {100 * error:.2f})."


def growth_lines(panel: Panel) -> list[str]:
    lines = []
    for name, found in panel.growth().items():
        if found is not None:
            error = f" ± {found.error:.2f}" if found.error is not None else ""
            lines.append(f"{name} of an image grows with its pixels to the power of {found.exponent:.2f}{error}")
    return lines


def notes(findings: Findings) -> list[str]:
    """What the figures are, on what they were measured, and what could not be measured."""
    first = findings.first
    machine = first["environment"]
    device = "" if machine["device"] == "cpu" else f", {machine['device']}"
    samples = first["by_epochs"]["samples"]
    lines = [
        f"{first['dataset']}: {samples:,} test images; batches of {first['batch_size']} in {first['precision']}, "
        f"loader {first['loader_backend']}; {machine['cores']} cores of {machine['processor']}{device}",
        "shares: mean ± standard deviation over seeds; rates: median, with the range over all runs and seeds",
        "every training chooses its best epoch on the validation part and looks at the test part once, at its end; "
        "resolutions are chosen by the validation part, too",
    ]
    timed = [record for record in findings.records if (record.get("by_time") or {}).get("training_seconds")]
    if timed:
        took = [record["by_time"]["training_seconds"] for record in timed]
        lines.append(
            f"{run_name(BY_TIME, first)}: as many updates as fit by the measured throughput, so that the "
            f"schedule ends at its trough; they took {min(took):.1f} .. {max(took):.1f} s"
        )
    for record in findings.records:
        point = point_of(record)
        if "failed" in record:
            lines.append(f"{point}: FAILED, {record['failed']}")
        elif record["out_of_memory"]:
            lines.append(
                f"{point}: out of memory with {record['out_of_memory'][0]['batch_size']} images a batch, so "
                f"{record['batch_size']} and {record['accumulation']} batches an update"
            )
        elif "failed" in (record["by_time"] or {}):
            lines.append(f"{point}: {record['by_time']['failed']}")
    lines += [f"{words}: left out, it would not have fitted into the time" for words in findings.left_out]
    return lines


def markdown(findings: Findings) -> str:
    parts = []
    for panel in findings.panels:
        parts += [f"### {panel.title}", table(*cost_rows(panel)), table(*gain_rows(panel))]
        parts += recommendation(panel)
        if lines := growth_lines(panel):
            parts.append("\n".join(f"- {line}" for line in lines))
    if found := findings.interpolations():
        after = run_name(BY_EPOCHS, found[0].records[0])
        parts += [f"### Interpolation at {found[0].resolution}x{found[0].resolution}, {found[0].model}, {after}"]
        parts += [table(*interpolation_rows(found))]
    parts += ["### What was run", "\n".join(f"- {line}" for line in notes(findings))]
    return "\n\n".join(parts)
