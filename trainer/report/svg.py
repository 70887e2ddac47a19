"""Charts as SVG, coloured by the style sheet of the page, without scripts or external resources."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from trainer.evaluate.calibration import Reliability
from trainer.report.html import percent, render

MAX_SERIES = 8  # series of a chart for which the style sheet has colours
_WIDTH, _HEIGHT = 320, 196
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 12, 40
_MIN_BIN = 20  # images; the accuracy of smaller bins is mostly chance
_NAME_LENGTH = 28  # characters of a class name; longer names end in an ellipsis
_MAX_BARS = 640
_MAX_NAMED_BARS = 80


@dataclass(frozen=True)
class Line:
    """A named series of values at epochs 1, 2, ..., drawn with a class of the style sheet (`series1` .. `series8`)."""

    name: str
    values: list[float]
    style: str


def line_chart(
    lines: list[Line],
    label: str,
    is_percent: bool = False,
    from_zero: bool = False,
    axis: str = "epoch",
    places: Sequence[float] = (),
) -> str:
    """Draw series over epochs or another quantity.

    Args:
        lines: The series.
        label: Accessible description.
        is_percent: Whether values are fractions, shown as percentages.
        from_zero: Start the axis at 0, for values whose small differences are meaningless.
        axis: Name of the horizontal axis.
        places: Increasing positions of the values on it; empty for 1, 2, ...
    """
    values = [value for line in lines for value in line.values if math.isfinite(value)] + [0.0] * from_zero
    low, high = min(values), max(values)
    margin = (abs(high) / 10 or 1.0) if math.isclose(low, high, rel_tol=1e-12) else 0.0
    ticks = list(map(float, MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(low - margin, high + margin)))
    if is_percent:  # a share is between 0 and 1
        ticks = [tick for tick in ticks if min(low, 0.0) <= tick <= max(high, 1.0)]
    count = max(len(line.values) for line in lines)
    places = places or range(1, count + 1)

    def x(place: float) -> float:
        fraction = (place - places[0]) / (places[-1] - places[0]) if count > 1 else 0.5
        return round(_LEFT + (_WIDTH - _LEFT - _RIGHT) * fraction, 1)

    def y(value: float) -> float:
        inner = _HEIGHT - _TOP - _BOTTOM
        return round(_HEIGHT - _BOTTOM - inner * (value - ticks[0]) / (ticks[-1] - ticks[0]), 1)

    return render(
        "line_chart.svg.j2",
        label=label,
        width=_WIDTH,
        height=_HEIGHT,
        left=_LEFT,
        right=_WIDTH - _RIGHT,
        series=[
            (line, [point for point in zip(places, line.values, strict=False) if math.isfinite(point[1])])
            for line in lines
        ],
        ticks=[(y(tick), _format_tick(tick, is_percent)) for tick in ticks],
        axis=axis,
        places=sorted({places[round(1 + (count - 1) * quarter / 4) - 1] for quarter in range(5)}),
        format=percent if is_percent else "{:.5g}".format,
        x=x,
        y=y,
    )


def _format_tick(tick: float, is_percent: bool) -> str:
    return f"{tick:.4%}".rstrip("0%").rstrip(".") + "%" if is_percent else f"{tick:,.6g}"


@dataclass(frozen=True)
class Bins:
    """A named series of a reliability diagram, drawn with a class of the style sheet."""

    name: str
    bins: Reliability
    style: str


def reliability_chart(series: list[Bins], label: str) -> str:
    """Draw a reliability diagram: accuracy over confidence in bins, and histograms of the confidence.

    A dot's area grows with the samples of its bin. The lines omit bins of fewer than 20 samples.

    Args:
        series: The bins, for instance before and after temperature scaling.
        label: Accessible description.
    """
    return render(
        "reliability_chart.svg.j2", series=series, label=label, left=_LEFT, top=_TOP, min_bin=_MIN_BIN, side=260
    )


def confusion_chart(counts: NDArray[np.int64], classes: tuple[str, ...]) -> str:
    """Draw a confusion matrix; a cell shows its numbers in a tooltip.

    Diagonal and errors have different hues. Opacity is the square root of the fraction of the row, so that rare errors
    are visible.

    Args:
        counts: int64 [C, C]; rows are true classes, columns predicted ones.
        classes: Class names.
    """
    names = list(map(_shorten, classes))
    longest = max(map(len, names))
    cell = max(10.0, min(34.0, 640 / len(classes)))
    return render(
        "confusion_chart.svg.j2",
        classes=classes,
        names=names,
        cell=cell,
        longest=longest,
        margin=26 + min(12.0, cell * 0.85) * 0.62 * longest,  # mean width of a letter: 0.62 of the font size
        cells=[(int(true), int(predicted), int(counts[true, predicted])) for true, predicted in np.argwhere(counts)],
        totals=counts.sum(axis=1).tolist(),
    )


def distribution_chart(counts: Sequence[int], classes: Sequence[str]) -> str:
    """Draw the number of training images of each class, the most frequent class first.

    Of more than 640 classes, evenly spaced ones are drawn.

    Args:
        counts: Training images of each class.
        classes: Class names.
    """
    order = sorted(range(len(counts)), key=lambda label: -counts[label])
    ranks = range(len(order)) if len(order) <= _MAX_BARS else np.linspace(0, len(order) - 1, _MAX_BARS).astype(int)
    drawn = [order[rank] for rank in ranks]
    total, most, least = sum(counts), order[0], order[-1]
    ticks = [float(tick) for tick in MaxNLocator(4, integer=True).tick_values(0, counts[most]) if tick >= 0]
    has_names = len(drawn) <= _MAX_NAMED_BARS
    longest = max(len(_shorten(classes[label])) for label in drawn)
    left, inner, step = 64, 150, max(1.0, min(34.0, 640 / len(drawn)))
    bars = [
        {
            "x": left + rank * step + step * 0.1,
            "width": step * 0.8,
            "height": inner * counts[label] / ticks[-1],
            "name": classes[label],
            "short": _shorten(classes[label]),
            "count": counts[label],
            "fraction": counts[label] / total,
        }
        for rank, label in enumerate(drawn)
    ]
    return render(
        "distribution_chart.svg.j2",
        label=f"Training images of each class, from {classes[most]} ({counts[most]:,}) to {classes[least]} "
        f"({counts[least]:,})",
        width=left + len(drawn) * step + 4,
        left=left,
        top=_TOP,
        inner=inner,
        margin=(20 if longest <= 2 else 12 + 6.8 * longest) if has_names else 8,
        ticks=[(_TOP + inner * (1 - tick / ticks[-1]), f"{tick:,.0f}") for tick in ticks],
        bars=bars,
        has_names=has_names,
        longest=longest,
    )


def _shorten(name: str) -> str:
    return name if len(name) <= _NAME_LENGTH else f"{name[: _NAME_LENGTH - 1]}…"
