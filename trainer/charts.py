"""Charts as SVG text, coloured by the page's style sheet: no scripts, no outside resources."""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray

_WIDTH, _HEIGHT = 320, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 12, 34


@dataclass(frozen=True)
class Line:
    """A named series over epochs 1, 2, ...; style is a class of the style sheet (`first`, `second`)."""

    name: str
    values: list[float]
    style: str


def line_chart(lines: list[Line], label: str, percent: bool = False) -> str:
    """Series over epochs. label: what is shown, for those who cannot see it. percent: values are shares."""
    values = [value for line in lines for value in line.values if math.isfinite(value)]
    ticks = _ticks(min(values), max(values))
    low, high = min(ticks[0], *values), max(ticks[-1], *values)
    epochs = max(len(line.values) for line in lines)

    def x(epoch: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * ((epoch - 1) / (epochs - 1) if epochs > 1 else 0.5)

    def y(value: float) -> float:
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * ((value - low) / (high - low))

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}">']
    for tick in ticks:
        text = f"{tick:.4%}".rstrip("0%").rstrip(".") + " %" if percent else f"{tick:.6g}"
        parts.append(f'<path class="grid" d="M{_LEFT} {y(tick):.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{text}</text>')
    for epoch in sorted({1, *(round(1 + (epochs - 1) * part / 4) for part in range(5))}):
        parts.append(f'<text class="tick" x="{x(epoch):.1f}" y="{_HEIGHT - 14}" text-anchor="middle">{epoch}</text>')
    for line in lines:
        points = [(x(epoch), y(value)) for epoch, value in enumerate(line.values, 1) if math.isfinite(value)]
        if len(points) > 1:
            path = "L".join(f"{px:.1f} {py:.1f}" for px, py in points)
            parts.append(f'<path class="line {line.style}" d="M{path}"/>')
        if len(points) <= 30:
            parts += [f'<circle class="dot {line.style}" cx="{px:.1f}" cy="{py:.1f}" r="2.6"/>' for px, py in points]
    parts.append("</svg>")
    return "".join(parts)


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers that span low .. high."""
    if high - low <= 1e-12 * max(abs(low), abs(high)):
        margin = abs(high) / 10 or 1.0
        low, high = low - margin, high + margin
    rough = (high - low) / 4
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


def confusion_chart(counts: NDArray[np.int64], classes: tuple[str, ...]) -> str:
    """The confusion matrix int64 [C, C], each row shaded by its shares; a cell's numbers appear on pointing at it.

    The diagonal is one hue, errors another, and small shares are lifted (square root) so that they can be seen.
    """
    size = len(classes)
    cell = max(10.0, min(34.0, 640 / size))
    longest = max(map(len, classes))
    # Room for the longest class name, at about 6.5 units a letter.
    margin = 26 + min(110, 7 * longest)
    side = cell * size
    total = margin + side + 4
    parts = [
        f'<svg viewBox="0 0 {total:.0f} {total:.0f}" style="max-width:{min(960, total * 1.1):.0f}px" role="img" '
        f'aria-label="Confusion matrix: true classes down, predicted classes across">',
        f'<rect class="field" x="{margin}" y="{margin}" width="{side:.1f}" height="{side:.1f}"/>',
        f'<text class="axis" x="{margin + side / 2:.1f}" y="11" text-anchor="middle">predicted</text>',
        f'<text class="axis" x="-{margin + side / 2:.1f}" y="11" text-anchor="middle" transform="rotate(-90)">'
        "true</text>",
    ]
    sums = np.maximum(counts.sum(axis=1), 1)
    font = min(12.0, cell * 0.85)
    for number, name in enumerate(classes):
        middle = margin + (number + 0.5) * cell
        text = escape(name)
        parts.append(
            f'<text class="name" font-size="{font:.1f}" x="{margin - 4}" y="{middle:.1f}" '
            f'text-anchor="end" dominant-baseline="central">{text}</text>'
        )
        turned = f'transform="rotate(-90 {middle:.1f} {margin - 4})" text-anchor="start"' if longest > 2 else ""
        anchor = turned or 'text-anchor="middle"'
        parts.append(
            f'<text class="name" font-size="{font:.1f}" x="{middle:.1f}" y="{margin - 4}" {anchor}>{text}</text>'
        )
    for true, predicted in zip(*np.nonzero(counts), strict=True):
        count = int(counts[true, predicted])
        share = count / sums[true]
        parts.append(
            f'<rect class="{"hit" if true == predicted else "miss"}" x="{margin + predicted * cell:.1f}" '
            f'y="{margin + true * cell:.1f}" width="{cell:.1f}" height="{cell:.1f}" '
            f'fill-opacity="{math.sqrt(share):.2f}"><title>{escape(classes[true])} taken for '
            f"{escape(classes[predicted])}: {count:,} of {sums[true]:,} ({share:.1%})</title></rect>"
        )
    parts.append("</svg>")
    return "".join(parts)
