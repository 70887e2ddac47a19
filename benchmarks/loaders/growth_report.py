"""Report of the growth benchmark: a table and a fitted exponent for each cost, and the chart."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from benchmarks.common.charts import CARD, INK, MUTED, SERIES, Chart, grid
from benchmarks.common.text import bullets, format_bytes, format_machine, markdown_table

Record = dict[str, Any]
_FITTED = 3  # the number of largest sizes to which the exponent is fitted


@dataclass(frozen=True)
class Cost:
    """Quantity of the report.

    Args:
        title: Title of its table and panel.
        phase: Phase in which it is measured.
        field: Field of the records.
        text: Formats a value.
        note: Explanation below the title.
        inverse: Whether the cost is the reciprocal of the field, which is a rate.
    """

    title: str
    phase: str
    field: str
    text: Callable[[float], str]
    note: str
    inverse: bool = False


def format_seconds(seconds: float) -> str:
    """Format a time as `1.23 ms` or `4.56 s`."""
    return f"{1000 * seconds:,.3g} ms" if seconds < 1 else f"{seconds:,.3g} s"


def format_rate(rate: float) -> str:
    """Format a rate as `1,234` or `1.23 M`."""
    return f"{rate / 1e6:,.3g} M" if rate >= 1e6 else f"{rate:,.0f}"


COSTS = (
    Cost("Opening", "open", "cpu_seconds", format_seconds, "CPU time to open the training images"),
    Cost("Start of a training", "prepare", "cpu_seconds", format_seconds, "CPU time, with subsets and statistics"),
    Cost("First batch of indices", "indices", "cpu_seconds", format_seconds, "CPU time, 512 indices of an epoch"),
    Cost("First step of an epoch", "step", "cpu_seconds", format_seconds, "CPU time to the first 512 images"),
    Cost("Memory", "memory", "memory_bytes", format_bytes, "peak of the process without code and mapped files"),
    Cost("Indices", "indices/s", "per_cpu_second", format_rate, "indices per CPU second after the first batch", True),
    Cost("Loader", "images/s", "per_cpu_second", format_rate, "images per CPU second at 28x28", True),
    Cost("Packing", "pack", "cpu_seconds", format_seconds, "CPU time of all processes"),
)  # fmt: skip


def key(record: Record) -> tuple[str, int, str]:
    """Return what identifies a measurement."""
    return record["name"], record["samples"], record["phase"]


def describe(record: Record) -> str:
    """Format a measurement as one line."""
    values = {name: value for name, value in record.items() if isinstance(value, float | int) and name != "samples"}
    text = ", ".join(f"{name} {value:,.4g}" for name, value in values.items())
    return f"{record['samples']:>13,} {record['name']} {record['phase']}: {record.get('failed', text)}"


def value_of(records: Sequence[Record], cost: Cost, name: str, samples: int) -> float | str | None:
    """Return the value of a loader at a size, the reason of its failure, or None if it was not measured."""
    for record in records:
        if key(record) == (name, samples, cost.phase):
            return record.get("failed", record.get(cost.field))
    return None


def exponent(sizes: Sequence[int], values: Sequence[float]) -> float | None:
    """Fit cost = c N^k by least squares in logarithms to the largest `_FITTED` sizes; return k.

    Args:
        sizes: N, in ascending order.
        values: Costs above 0.
    """
    if len(sizes) < 2:
        return None
    return float(np.polyfit(np.log(sizes[-_FITTED:]), np.log(values[-_FITTED:]), 1)[0])


def growth_markdown(records: Sequence[Record], notes: Sequence[str], environment: Record) -> str:
    """Format a table for each cost, with a column for each size and the exponent."""
    names = list(dict.fromkeys(record["name"] for record in records))
    sizes = sorted({record["samples"] for record in records})
    blocks = []
    for cost in COSTS:
        rows = [row for name in names if (row := _row(records, cost, name, sizes)) is not None]
        if rows:
            head = ["loader", *(f"{size:,}" for size in sizes), "grows as"]
            blocks += [f"### {cost.title}", f"{cost.note[0].upper()}{cost.note[1:]}.", markdown_table(head, rows)]
    blocks += ["### Conditions", bullets([*notes, *_conditions(records, environment)])]
    return "\n\n".join(blocks)


def _row(records: Sequence[Record], cost: Cost, name: str, sizes: Sequence[int]) -> list[str] | None:
    values = {size: value_of(records, cost, name, size) for size in sizes}
    if all(value is None for value in values.values()):
        return None
    cells = [value if isinstance(value, str) else cost.text(value) if value else "" for value in values.values()]
    fitted = _points(values)
    power = exponent([*fitted], [1 / value if cost.inverse else value for value in fitted.values()])
    return [name, *cells, "" if power is None else f"N^{power:.2f}"]


def _points(values: dict[int, float | str | None]) -> dict[int, float]:
    return {size: value for size, value in values.items() if isinstance(value, float | int) and value > 0}


def _conditions(records: Sequence[Record], environment: Record) -> list[str]:
    synthetic = [record["samples"] for record in records if record["data"] == "synthetic"]
    lines = [
        f"{format_machine(environment)}; one thread; other processes ran, so times are CPU times",
        f"exponents: fitted to the {_FITTED} largest sizes that were measured; those of rates are of the reciprocal",
        "real files: these images, repeated"
        + (f"; synthetic from {min(synthetic):,} images on for some loaders" if synthetic else ""),
        "synthetic: Inkstream's shards are one shard of real images under many names (hard links), the files of the "
        "other libraries hold these images once and are listed repeatedly in their index; all stay in the page cache",
        "images/s: measured after 2 seconds of CPU time up to 10^7 images, after 20 from 10^8 on",
    ]
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items())
    return [*lines, f"packages: {packages}"]


_STYLES: dict[str, dict[str, Any]] = {
    "inkstream": {"color": SERIES[0], "linewidth": 2.6, "marker": "o", "zorder": 5},
    "inkstream-windowed": {"color": SERIES[0], "linewidth": 1.6, "marker": "s", "zorder": 5},
    "inkstream-before": {"color": SERIES[0], "linestyle": "--", "marker": "o", "markerfacecolor": CARD},
    "inkstream-before-windowed": {"color": SERIES[0], "linestyle": ":", "marker": "s", "markerfacecolor": CARD},
    "torch": {"color": SERIES[1], "marker": "^"},
    "spdl": {"color": SERIES[3], "marker": "v"},
    "grain": {"color": SERIES[2], "marker": "D"},
    "litdata": {"color": MUTED, "marker": "P"},
    "mosaicml-streaming": {"color": INK, "marker": "X"},
}


def plot_growth(records: Sequence[Record], path: Path) -> None:
    """Plot a panel per cost, logarithmic on both axes; an x marks that a limit was exceeded at the next size."""
    sizes = sorted({record["samples"] for record in records})
    measured = {record["name"] for record in records}
    styles = {name: style for name, style in _STYLES.items() if name in measured}
    costs = [cost for cost in COSTS if any(_series(records, cost, name, sizes)[0] for name in _STYLES)]

    def draw(panels: Sequence[Axes]) -> None:
        *shown, legend = panels
        for axes, cost in zip(shown, costs, strict=True):
            for name, style in styles.items():
                points, failed = _series(records, cost, name, sizes)
                axes.plot([*points], [*points.values()], label=name, **({"linewidth": 1.4, "markersize": 5} | style))
                if failed is not None and points:
                    last = max(points)
                    axes.annotate(
                        "x",
                        (last, points[last]),
                        xytext=(7, 0),
                        textcoords="offset points",
                        color=style["color"],
                        va="center",
                        weight="bold",
                    )
            _set_axes(axes, cost, sizes)
        legend.axis("off")
        legend.legend(*shown[0].get_legend_handles_labels(), loc="center left", fontsize=11)

    count = len(costs) + 1
    Chart(
        draw,
        size=(14, 3.6 * -(-count // 3) + 0.6),
        panels=grid(count, 3),
        title="Costs by the number of images",
        note="both axes logarithmic; flat lines do not grow with the data set; x: exceeded a limit of memory or time "
        "at the next size",
    ).write_png(path)


def _set_axes(axes: Axes, cost: Cost, sizes: Sequence[int]) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if high < 20 * low:  # otherwise a negligible difference fills the panel
        middle = math.sqrt(low * high)
        axes.set_ylim(middle / 10, middle * 10)
    axes.set_title(cost.title)
    axes.set_xlabel(cost.note, fontsize=8.5)
    ticks = [size for size in sizes if math.log10(size).is_integer()] or sizes
    axes.set_xticks(ticks, [f"$10^{{{math.log10(size):.2g}}}$" for size in ticks])
    axes.xaxis.minorticks_off()
    axes.yaxis.set_major_formatter(lambda value, _: cost.text(value))
    axes.yaxis.set_minor_formatter(lambda value, _: "")


def _series(
    records: Sequence[Record], cost: Cost, name: str, sizes: Sequence[int]
) -> tuple[dict[int, float], int | None]:
    """Return the values by size, and the first size at which the loader failed."""
    values = {size: value_of(records, cost, name, size) for size in sizes}
    failed = [size for size, value in values.items() if isinstance(value, str)]
    return _points(values), min(failed, default=None)
