"""Report of an ablation: means, standard errors, gains over the recipe, table and chart."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from benchmarks.common.charts import CARD, INK, MUTED, SERIES, Chart, set_row_labels
from benchmarks.common.text import format_machine, format_percent, markdown_table, tabulate
from shards.cli import plural

METRICS = {"accuracy": "accuracy", "macro_f1": "macro F1"}
_LABEL_WIDTH = 36  # characters per line of a row label


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error (0 for one seed)."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return statistics.mean(values), error


def gains(row: dict[str, Any], recipe: dict[str, Any], split: str, metric: str) -> list[float]:
    """Return how much better a variant is than the recipe with the same seed, for each seed.

    Runs of one seed share initial weights and validation split, so differences vary less than the metrics.
    """
    own, base = row["records"], recipe["records"]
    return [own[seed][split][metric] - base[seed][split][metric] for seed in own if seed in base]


def ablation_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Format a table of mean and standard error of each metric, and of the gains over the recipe in points."""
    recipe = rows[0]
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "variant": lambda row: row["name"],
        "seeds": lambda row: str(len(row["records"])),
    }
    for split in ("validation", "test"):
        for metric, title in METRICS.items():
            columns[f"{split} {title}"] = partial(_format_metric, split=split, metric=metric)
    for metric, title in METRICS.items():
        columns[f"test {title}, gain"] = partial(_format_gain, recipe=recipe, metric=metric)
    columns["training"] = lambda row: (
        f"{statistics.mean(record['training_seconds'] for record in row['records'].values()):.0f} s"
    )
    first = next(iter(recipe["records"].values()))
    seen = {record["images_seen"] for row in rows for record in row["records"].values()}
    equal = f"Each run sees {plural(first['images_seen'], 'image')}. " if len(seen) == 1 else ""
    errors = "Mean ± standard error over seeds. " if any(len(row["records"]) > 1 for row in rows) else ""
    notes = (
        f"{equal}{errors}Gains are in points, between runs of the same seed.\n{format_machine(first['environment'])}."
    )
    return f"{markdown_table(*tabulate(columns, rows))}\n\n{notes}"


def _format_metric(row: dict[str, Any], split: str, metric: str) -> str:
    return _format_percent([record[split][metric] for record in row["records"].values()])


def _format_gain(row: dict[str, Any], recipe: dict[str, Any], metric: str) -> str:
    return "" if row is recipe else _format_points(gains(row, recipe, "test", metric))


def _format_percent(fractions: Sequence[float]) -> str:
    mean, error = mean_and_error(fractions)
    return format_percent(mean, error if len(fractions) > 1 else None)


def _format_points(differences: Sequence[float]) -> str:
    mean, error = mean_and_error([100 * difference for difference in differences])
    return f"{mean:+.2f}" + (f" ± {error:.2f}" if len(differences) > 1 else "")


def plot_gains(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot the gain of each variant over the recipe: test (filled, with its standard error) and validation (hollow)."""
    recipe, others = rows[0], rows[1:]

    def draw(panels: Sequence[Axes]) -> None:
        for axes, metric in zip(panels, METRICS, strict=True):
            _draw_gains(axes, recipe, others, metric)
        set_row_labels(panels[0], [textwrap.fill(row["name"], _LABEL_WIDTH) for row in others])
        panels[1].tick_params(axis="y", length=0, labelleft=False)
        panels[1].spines["left"].set_visible(False)

    seeds = len(recipe["records"])
    filled = f"mean of {seeds} seeds with standard error" if seeds > 1 else "one seed"
    Chart(
        draw,
        size=(9.6, 1.7 + 0.42 * max(1, len(others))),
        panels=[list(METRICS)],
        share_y=True,
        title="Gain of each addition over the recipe",
        note=f"Filled: test split, {filled}. Hollow: validation split.",
    ).write_png(path)


def _draw_gains(axes: Axes, recipe: dict[str, Any], others: Sequence[dict[str, Any]], metric: str) -> None:
    axes.axvline(0, color=INK, linewidth=1)
    test = [mean_and_error([100 * gain for gain in gains(row, recipe, "test", metric)]) for row in others]
    outlier = find_outlier([mean for mean, _ in test])
    for index, (row, (mean, error)) in enumerate(zip(others, test, strict=True)):
        if index == outlier:  # written as a number, because it would compress all others
            label = f"◂ {mean:+.2f}" if mean < 0 else f"{mean:+.2f} ▸"
            axes.annotate(
                label,
                (float(mean > 0), index),
                xycoords=("axes fraction", "data"),
                ha="left" if mean < 0 else "right",
                va="center",
                color=MUTED,
                fontsize=9,
            )
            continue
        validation, _ = mean_and_error([100 * gain for gain in gains(row, recipe, "validation", metric)])
        axes.plot(validation, index + 0.17, "o", color=CARD, markeredgecolor=SERIES[0], markersize=4.5)
        axes.errorbar(mean, index - 0.1, xerr=error, fmt="o", color=SERIES[0], markersize=6.5, linewidth=1.6)
    baseline = _format_metric(recipe, "test", metric)
    axes.set_title(METRICS[metric])
    axes.set_xlabel(f"gain in points over {baseline} of the recipe")
    axes.margins(x=0.08)


def find_outlier(gains: Sequence[float]) -> int | None:
    """Return the index of a gain that is more than twice as far from 0 as any other, or None."""
    by_size = sorted(range(len(gains)), key=lambda index: abs(gains[index]), reverse=True)
    if len(gains) < 3 or abs(gains[by_size[0]]) <= 2 * abs(gains[by_size[1]]):
        return None
    return by_size[0]
