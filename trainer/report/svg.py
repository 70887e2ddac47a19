"""Charts as SVG text, coloured by the page's style sheet: no scripts, no outside resources."""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray

from trainer.evaluate.calibration import Reliability

_WIDTH, _HEIGHT = 320, 196
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 12, 40
_MOST_DOTS = 30  # of a line
_FEW = 20  # images in a bin of confidence, whose accuracy is mostly chance


@dataclass(frozen=True)
class Line:
    """A named series over epochs 1, 2, ...; style is a class of the style sheet (`series1` .. `series8`)."""

    name: str
    values: list[float]
    style: str


def line_chart(lines: list[Line], label: str, percent: bool = False, from_zero: bool = False) -> str:
    """Series over epochs. label: what is shown, for those who cannot see it. percent: values are shares. from_zero:
    the scale begins at 0, where small differences mean nothing."""
    values = [value for line in lines for value in line.values if math.isfinite(value)]
    values += [0.0] if from_zero else []
    ticks = ticks_of(min(values), max(values))
    low, high = min(ticks[0], *values), max(ticks[-1], *values)
    epochs = max(len(line.values) for line in lines)

    def x(epoch: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * ((epoch - 1) / (epochs - 1) if epochs > 1 else 0.5)

    def y(value: float) -> float:
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * ((value - low) / (high - low))

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}">']
    for tick in ticks:
        text = f"{tick:.4%}".rstrip("0%").rstrip(".") + " %" if percent else f"{tick:,.6g}"
        parts.append(f'<path class="grid" d="M{_LEFT} {y(tick):.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{text}</text>')
    for epoch in sorted({1, *(round(1 + (epochs - 1) * part / 4) for part in range(5))}):
        parts.append(f'<text class="tick" x="{x(epoch):.1f}" y="{_HEIGHT - 20}" text-anchor="middle">{epoch}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text class="tick" x="{middle}" y="{_HEIGHT - 4}" text-anchor="middle">epoch</text>')
    for line in lines:
        points = [(x(epoch), y(value)) for epoch, value in enumerate(line.values, 1) if math.isfinite(value)]
        if len(points) > 1:
            path = "L".join(f"{px:.1f} {py:.1f}" for px, py in points)
            parts.append(f'<path class="line {line.style}" d="M{path}"/>')
        for epoch, value in enumerate(line.values, 1):
            if math.isfinite(value):
                # Of many epochs the dots are not drawn, but still answer to pointing.
                style = line.style if len(points) <= _MOST_DOTS else "unseen"
                words = f"{escape(line.name)}, epoch {epoch}: {_share(value) if percent else f'{value:.5g}'}"
                parts.append(_dot(style, x(epoch), y(value), 2.6, words))
    parts.append("</svg>")
    return "".join(parts)


def _dot(style: str, x: float, y: float, radius: float, words: str) -> str:
    circle = f'<circle class="dot {style}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}">'
    return f"{circle}<title>{words}</title></circle>"


def _share(value: float) -> str:
    return f"{100 * value:.2f} %"


@dataclass(frozen=True)
class Bins:
    """A named series of a reliability diagram; style as of a `Line`."""

    name: str
    bins: Reliability
    style: str


def reliability_chart(series: list[Bins], label: str) -> str:
    """Accuracy over confidence, by bins of confidence; below, how the samples of each are shared out over the bins.

    On the diagonal confidence says what accuracy is. The larger a dot, the more samples it stands for; lines leave out
    bins of fewer than 20.
    """
    side, strip, gap, right = 260, 44, 30, 24
    bottom = _TOP + side
    width, height = _LEFT + side + right, bottom + gap + strip * len(series) + 22
    parts = [
        f'<svg viewBox="0 0 {width} {height}" style="max-width:{width * 1.3:.0f}px" role="img" '
        f'aria-label="{escape(label)}">',
        f'<path class="grid ideal" d="M{_LEFT} {bottom}L{_LEFT + side} {_TOP}"/>',
    ]
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        x, y = _LEFT + side * tick, bottom - side * tick
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{_LEFT + side}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:.0%}</text>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{tick:.0%}</text>')
    for number, each in enumerate(series):
        bins, full = each.bins, np.flatnonzero(each.bins.samples)
        shares = bins.samples / bins.samples.sum()
        points = [(_LEFT + side * bins.confidence[at], bottom - side * bins.accuracy[at]) for at in full]
        known = [point for at, point in zip(full, points, strict=True) if bins.samples[at] >= _FEW]
        if known:
            path = "L".join(f"{x:.1f} {y:.1f}" for x, y in known)
            parts.append(f'<path class="line {each.style}" d="M{path}"/>')
        base = bottom + gap + strip * (number + 1) - 4
        for at, (x, y) in zip(full, points, strict=True):
            words = (
                f"{escape(each.name)}: {int(bins.samples[at]):,} images, confidence {_share(bins.confidence[at])}, "
                f"accuracy {_share(bins.accuracy[at])}"
            )
            parts.append(_dot(each.style, x, y, 2 + 5 * math.sqrt(shares[at]), words))
            tall = max(0.6, (strip - 14) * shares[at] / shares.max())
            left, wide = _LEFT + side * at / len(shares), side / len(shares)
            parts.append(
                f'<rect class="bar {each.style}" x="{left + 0.5:.1f}" y="{base - tall:.1f}" width="{wide - 1:.1f}" '
                f'height="{tall:.1f}"><title>{words}</title></rect>'
            )
        parts.append(f'<path class="grid" d="M{_LEFT} {base}H{_LEFT + side}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 8}" y="{base}" text-anchor="end">images</text>')
    parts.append(f'<text class="axis" x="{_LEFT + side / 2}" y="{height - 6}" text-anchor="middle">confidence</text>')
    middle = _TOP + side / 2
    parts.append(
        f'<text class="axis" x="-{middle}" y="12" text-anchor="middle" transform="rotate(-90)">accuracy</text></svg>'
    )
    return "".join(parts)


def ticks_of(low: float, high: float) -> list[float]:
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
        f'<svg viewBox="0 0 {total:.0f} {total:.0f}" style="min-width:{min(600, total):.0f}px;'
        f'max-width:{min(960, total * 1.1):.0f}px" role="img" '
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
            f'fill-opacity="{0.1 + 0.9 * math.sqrt(share):.2f}" data-true="{true}" data-said="{predicted}"><title>'
            f"{escape(classes[true])} taken for {escape(classes[predicted])}: {count:,} of {sums[true]:,} "
            f"({share:.1%})</title></rect>"
        )
    parts.append("</svg>")
    return "".join(parts)
