"""Report of a plan whose variants train for different times: each metric over the CPU time of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from benchmarks.common.charts import INK, MUTED, SERIES, Chart, plain_numbers
from benchmarks.training.ablation_report import METRICS, mean_and_error


def shortest_minutes(row: dict[str, Any]) -> float:
    """Return the CPU time of a variant's fastest run, from opening the data to the test, in minutes of one core.

    Other processes lengthen the duration of a run, but hardly its CPU time.
    """
    return min(record["cpu_seconds"] for record in row["records"].values()) / 60


def plot_frontier(rows: Sequence[dict[str, Any]], published: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot accuracy and macro F1 of the test split over the CPU time of a run.

    Args:
        rows: Name and records by seed of each variant.
        published: Results of others: `name`, the fractions `accuracy` and `macro_f1` if they are known, and `minutes`
            of CPU time of their training. A result without `minutes` is drawn as a horizontal line.
        path: The PNG file.
    """
    ordered = sorted(rows, key=shortest_minutes)
    minutes = [shortest_minutes(row) for row in ordered]

    def draw(panels: Sequence[Axes]) -> None:
        for axes, metric in zip(panels, METRICS, strict=True):
            tested = [[100 * record["test"][metric] for record in row["records"].values()] for row in ordered]
            means, errors = zip(*map(mean_and_error, tested), strict=True)
            axes.errorbar(minutes, means, yerr=errors, fmt="o-", color=SERIES[0], markersize=5, linewidth=1.6)
            for one in published:
                if metric in one:
                    _mark(axes, one["name"], 100 * one[metric], one.get("minutes"))
            axes.set_xscale("log")
            plain_numbers(axes.xaxis)
            axes.set_title(f"{METRICS[metric]} in percent")
            axes.set_xlabel("minutes of one core")

    Chart(
        draw,
        size=(9.6, 4.2),
        panels=[list(METRICS)],
        title="Accuracy over the CPU time of a run",
        note="Test split, mean over seeds with standard error; CPU time of the fastest, with validation and test.",
    ).write_png(path)


def _mark(axes: Axes, name: str, percent: float, minutes: float | None) -> None:
    if minutes is None:
        axes.axhline(percent, color=MUTED, linewidth=1, linestyle="--")
        axes.annotate(name, (0.01, percent), xycoords=("axes fraction", "data"), va="bottom", color=MUTED, fontsize=8.5)
    else:
        axes.plot(minutes, percent, "D", color=INK, markersize=5)
        axes.annotate(
            name, (minutes, percent), xytext=(0, -12), textcoords="offset points", ha="center", color=INK, fontsize=8.5
        )
