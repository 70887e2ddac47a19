"""The figures of an ablation: means, standard errors, gains over the recipe by seed, a table and a plot."""

from __future__ import annotations

import statistics
import textwrap
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.common.harness import table

FIGURES = {"accuracy": "accuracy", "macro_f1": "macro F1"}
_ACCENT, _GRAY = "#1d4ed8", "#57534e"
_LABEL_WIDTH = 36  # letters of a name beside the plot, in a line


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """The mean, and its standard error: the deviation between seeds by the root of their number (0 for one seed)."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return statistics.mean(values), error


def gains(row: dict[str, Any], recipe: dict[str, Any], part: str, figure: str) -> list[float]:
    """How much better than the recipe a variant is, seed by seed, with the same seed's recipe.

    Runs of one seed share first weights and validation part, so that differences vary less than figures.
    """
    own, base = row["records"], recipe["records"]
    return [own[seed][part][figure] - base[seed][part][figure] for seed in own if seed in base]


def markdown(rows: list[dict[str, Any]]) -> str:
    """A table with mean and standard error of every figure, in percent, and of the gains over the recipe, in points."""
    head = ["variant", "seeds"]
    head += [f"{part} {figure}" for part in ("validation", "test") for figure in FIGURES.values()]
    head += [f"test {figure}, gain" for figure in FIGURES.values()] + ["training"]
    recipe = rows[0]
    lines = []
    for row in rows:
        records = list(row["records"].values())
        cells = [row["name"], str(len(records))]
        for part in ("validation", "test"):
            cells += [_shown([one[part][figure] for one in records]) for figure in FIGURES]
        cells += ["" if row is recipe else _shown(gains(row, recipe, "test", figure), "+") for figure in FIGURES]
        cells.append(f"{statistics.mean(one['training_seconds'] for one in records):.0f} s")
        lines.append(cells)
    first = next(iter(recipe["records"].values()))
    notes = (
        f"{first['images_seen']:,} images seen in each run, mean and standard error over seeds, in percent; gains in "
        "points, between runs of the same seed.\n"
        f"{first['environment']['cores']} cores of {first['environment']['processor']}, "
        f"{first['environment']['device']}."
    )
    return f"{table(head, lines)}\n\n{notes}"


def _shown(values: list[float], sign: str = "") -> str:
    mean, error = mean_and_error([100 * value for value in values])
    return f"{mean:{sign}.2f}" + (f" ± {error:.2f}" if len(values) > 1 else "")


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """The gain of each variant over the recipe: on test with its standard error, on validation hollow; one that is far
    from all others as a number at the edge."""
    recipe, others = rows[0], rows[1:]
    figure, panels = plt.subplots(
        1, 2, figsize=(9.6, 1.7 + 0.42 * max(1, len(others))), dpi=160, layout="constrained", sharey=True
    )
    places = list(range(len(others)))
    for axes, (name, label) in zip(panels, FIGURES.items(), strict=True):
        axes.axvline(0, color="#1c1917", linewidth=1)
        found = [mean_and_error([100 * gain for gain in gains(row, recipe, "test", name)]) for row in others]
        far = far_off([mean for mean, _ in found])
        for place, row, (mean, error) in zip(places, others, found, strict=True):
            if place == far:  # it would squeeze all others
                side = "left" if mean < 0 else "right"
                axes.annotate(
                    f"◂ {mean:+.2f}" if mean < 0 else f"{mean:+.2f} ▸",
                    (0.0 if mean < 0 else 1.0, place),
                    xycoords=("axes fraction", "data"),
                    ha=side,
                    va="center",
                    color=_GRAY,
                    fontsize=9,
                )
                continue
            judged, _ = mean_and_error([100 * gain for gain in gains(row, recipe, "validation", name)])
            axes.plot(judged, place + 0.17, "o", color="white", markeredgecolor=_ACCENT, markersize=4.5)
            axes.errorbar(
                mean, place - 0.1, xerr=error, fmt="o", color=_ACCENT, markersize=6.5, capsize=3, linewidth=1.6
            )
        shown = [one["test"][name] for one in recipe["records"].values()]
        axes.set_title(label, loc="left", fontsize=10.5, weight="bold")
        axes.set_xlabel(f"gain over the recipe's {_shown(shown)} %, points")
        axes.margins(x=0.08)
        axes.grid(axis="x", color="#e7e5e4")
        axes.grid(axis="y", color="#f5f5f4", linewidth=20)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    panels[0].set_yticks(places, [textwrap.fill(row["name"], _LABEL_WIDTH) for row in others])
    panels[0].set_ylim(len(others) - 0.5, -0.5)
    seeds = len(recipe["records"])
    figure.suptitle(
        "What each addition brings over the recipe, with as many images seen",
        x=0.01,
        ha="left",
        fontsize=13,
        weight="bold",
    )
    figure.supxlabel(
        f"Full dot: test part, mean of {seeds} {'seed' if seeds == 1 else 'seeds'} and its standard error; hollow: "
        "validation part",
        fontsize=8.5,
        color=_GRAY,
    )
    with path.open("wb") as file:
        figure.savefig(file, format="png")
    plt.close(figure)


def far_off(gains: list[float]) -> int | None:
    """The place of a gain that is more than twice as far from 0 as any other, if there is one."""
    by_size = sorted(range(len(gains)), key=lambda place: abs(gains[place]), reverse=True)
    if len(gains) < 3 or abs(gains[by_size[0]]) <= 2 * abs(gains[by_size[1]]):
        return None
    return by_size[0]
