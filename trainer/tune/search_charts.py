"""Charts of a search as SVG text, coloured by the page's style sheet: no scripts, no outside resources."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from html import escape
from typing import Any

from trainer.report.svg import ticks_of
from trainer.tune.study import Result, label

_WIDTH, _HEIGHT = 480, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 14, 12, 38


class _Frame:
    """The axes of a chart: counts from left to right, shares from bottom to top."""

    def __init__(self, figures: list[float], first: float, last: float, title: str, label: str) -> None:
        ticks = [tick for tick in ticks_of(min(figures), max(figures)) if tick <= 1]
        self._low, self._high = min(ticks[0], *figures), max(ticks[-1], *figures)
        self._first, self._last = first, last
        self.parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}">']
        for tick in ticks:
            text = f"{100 * tick:.6g} %"
            self.parts.append(f'<path class="grid" d="M{_LEFT} {self.y(tick):.1f}H{_WIDTH - _RIGHT}"/>')
            self.parts.append(
                f'<text class="tick" x="{_LEFT - 8}" y="{self.y(tick) + 4:.1f}" text-anchor="end">{text}</text>'
            )
        for count in range(round(first), round(last) + 1, max(1, math.ceil((last - first) / 8))):
            self.parts.append(
                f'<text class="tick" x="{self.x(count):.1f}" y="{_HEIGHT - 20}" text-anchor="middle">{count}</text>'
            )
        self.parts.append(
            f'<text class="tick" x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 4}" text-anchor="middle">'
            f"{escape(title)}</text>"
        )

    def x(self, count: float) -> float:
        share = (count - self._first) / (self._last - self._first) if self._last > self._first else 0.5
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * share

    def y(self, figure: float) -> float:
        """Where a figure lies; those below the scale lie at its foot."""
        figure = max(figure, self._low)
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * (figure - self._low) / (self._high - self._low)

    def done(self) -> str:
        return "".join([*self.parts, "</svg>"])


def history_chart(results: list[Result], label: str) -> str:
    """The figure of each trial by its number: complete ones as dots with their deviation, those given up as hollow
    ones at their last figure; the best so far as a line. What is far behind lies at the foot of the chart."""
    placed = [(result, _last_figure(result)) for result in results]
    known = [(result, figure) for result, figure in placed if figure is not None]
    floor = _floor(results)
    reach = [
        max(floor, min(1.0, figure + sign * (result.std or 0)))
        for result, figure in known
        for sign in ((-1, 1) if result.mean is not None else (0,))
    ]
    frame = _Frame(reach, results[0].number, results[-1].number, "trial", label)
    best, path = -math.inf, ""
    for result, figure in known:
        if result.mean is not None and figure > best:
            x, y = frame.x(result.number), frame.y(figure)
            path += f"H{x:.1f}V{y:.1f}" if path else f"M{x:.1f} {y:.1f}"
            best = figure
    frame.parts.append(f'<path class="line second" d="{path}H{_WIDTH - _RIGHT}"/>')
    for result, figure in known:
        x, y = frame.x(result.number), frame.y(figure)
        title = f"<title>trial {result.number}, {result.state}: {100 * figure:.2f} %</title>"
        if result.mean is None:
            frame.parts.append(f'<circle class="hollow" cx="{x:.1f}" cy="{y:.1f}" r="3">{title}</circle>')
            continue
        if result.std:
            low, high = frame.y(figure - result.std), frame.y(min(1.0, figure + result.std))
            frame.parts.append(f'<path class="spread" d="M{x:.1f} {low:.1f}V{high:.1f}"/>')
        frame.parts.append(f'<circle class="dot first" cx="{x:.1f}" cy="{y:.1f}" r="3.4">{title}</circle>')
    return frame.done()


def curves_chart(results: list[Result], ranked: list[int], label: str) -> str:
    """Mean figure by epochs trained, a line for each trial; the best stands out, those given up are dashed."""
    drawn = [result for result in results if result.curve]
    if not drawn:
        return ""
    floor = min(
        [_floor(results), *(figure for result in drawn if result.number in ranked[:1] for _, figure in result.curve)]
    )
    figures = [max(floor, figure) for result in drawn for _, figure in result.curve]
    last = max(epoch for result in drawn for epoch, _ in result.curve)
    frame = _Frame(figures, 1, last, "epochs trained, over all repeats", label)
    best = ranked[0] if ranked else None
    for result in sorted(drawn, key=lambda result: result.number == best):
        kind = "best" if result.number == best else "given-up" if result.state == "pruned" else "other"
        points = [(frame.x(epoch), frame.y(figure)) for epoch, figure in result.curve]
        title = f"<title>trial {result.number}, {result.state}</title>"
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        frame.parts.append(f'<path class="curve {kind}" d="M{path}">{title}</path>')
        x, y = points[-1]
        frame.parts.append(f'<circle class="end {kind}" cx="{x:.1f}" cy="{y:.1f}" r="2.4">{title}</circle>')
    return frame.done()


def bar_chart(shares: dict[str, float], label: str) -> str:
    """Shares of one as bars, the largest first."""
    row, left, whole = 30, 12 + 7.6 * max(map(len, shares)), 1000
    width = whole - left - 60
    largest = max([*shares.values(), 1e-9])
    parts = [f'<svg viewBox="0 0 {whole} {row * len(shares) + 6}" role="img" aria-label="{escape(label)}">']
    for place, (name, share) in enumerate(shares.items()):
        y = place * row + 6
        length = max(width * share / largest, 1)
        parts.append(
            f'<text class="setting" x="{left - 10:.0f}" y="{y + 15}" text-anchor="end">{escape(name)}</text>'
            f'<rect class="bar" x="{left:.0f}" y="{y + 2}" width="{length:.1f}" height="17" rx="3"/>'
            f'<text class="setting" x="{left + length + 8:.1f}" y="{y + 15}">{100 * share:.0f} %</text>'
        )
    return "".join([*parts, "</svg>"])


def parallel_chart(ranked: list[Result], table: dict[str, list[Any]], logarithmic: frozenset[str], figure: str) -> str:
    """Parallel coordinates: an axis for each setting and one for the figure, a line for each complete trial; the
    better the trial, the stronger its line.

    table: the value of each setting in each of the ranked trials. logarithmic: settings to be laid out by ratios.
    """
    floor = _floor(ranked)
    axes: dict[str, list[Any]] = {**table, figure: [max(floor, result.mean or 0.0) for result in ranked]}
    # A name takes two lines, section and setting, at about 7 units a letter.
    room = max(7.4 * max(len(name.split(".")[-1]) for name in axes), 76.0)
    width, height, top, bottom = max(1000.0, (len(axes) + 0.5) * room), 400, 64, 30
    first = next(iter(axes.values()))
    side = max(room / 2, 14 + 6.4 * max(len(_plain(value, False)) for value in first))  # and marks beside an axis
    parts = [
        f'<svg viewBox="0 0 {width:.0f} {height}" role="img" aria-label="Parallel coordinates: '
        f'{escape(", ".join(axes))} of {len(ranked)} complete trials">'
    ]
    places, heights = [], []
    for number, (name, column) in enumerate(axes.items()):
        x = side + (width - side - 76) * number / max(len(axes) - 1, 1)
        spread, marks = _axis(column, name in logarithmic, percent=name == figure)
        if name == figure and (ranked[-1].mean or 0.0) < floor:
            marks[0] = (marks[0][0], f"≤ {marks[0][1]}")
        places.append(x)
        heights.append([height - bottom - (height - top - bottom) * spread(value) for value in column])
        parts.append(f'<path class="axis-line" d="M{x:.1f} {top}V{height - bottom}"/>')
        section, dot, setting = name.rpartition(".")
        for y, text in ((20, section + dot), (36, setting)):
            parts.append(f'<text class="setting" x="{x:.1f}" y="{y}" text-anchor="middle">{escape(text)}</text>')
        last = number == len(axes) - 1
        for share, text in marks:
            y = height - bottom - (height - top - bottom) * share
            anchor, offset = ("start", 9) if last else ("end", -9)
            parts.append(
                f'<text class="tick halo" x="{x + offset:.1f}" y="{y + 4:.1f}" text-anchor="{anchor}">'
                f"{escape(text)}</text>"
            )
    lines = []
    for place in reversed(range(len(ranked))):
        rank = place / max(len(ranked) - 1, 1)
        points = list(zip(places, (column[place] for column in heights), strict=True))
        middle = [
            f"C{(x0 + x1) / 2:.1f} {y0:.1f} {(x0 + x1) / 2:.1f} {y1:.1f} {x1:.1f} {y1:.1f}"
            for (x0, y0), (x1, y1) in itertools.pairwise(points)
        ]
        kind = "way best" if place == 0 else "way"
        opacity = 1 if place == 0 else 0.7 - 0.58 * rank
        said = [f"{name} {_plain(column[place], False)}" for name, column in table.items()]
        title = f"trial {ranked[place].number}: {', '.join(said)}, {figure} {_plain(ranked[place].mean, True)}"
        lines.append(
            f'<path class="{kind}" stroke-opacity="{opacity:.2f}" d="M{points[0][0]:.1f} {points[0][1]:.1f}'
            f'{"".join(middle)}"><title>{escape(title)}</title></path>'
        )
    return "".join([parts[0], *lines, *parts[1:], "</svg>"])


def _axis(
    column: list[Any], logarithmic: bool, percent: bool
) -> tuple[Callable[[Any], float], list[tuple[float, str]]]:
    """Where a value lies on its axis, 0 .. 1, and the marks beside it."""
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in column):
        low, high = min(column), max(column)
        if low == high:
            return lambda value: 0.5, [(0.5, _plain(low, percent))]
        place = (lambda value: math.log(value)) if logarithmic and low > 0 else float

        def share_of(value: float) -> float:
            return (place(value) - place(low)) / (place(high) - place(low))

        marked = [low]
        for value in _between(column, logarithmic and low > 0):
            if share_of(value) - share_of(marked[-1]) > 0.08 and share_of(value) < 0.92:
                marked.append(value)
        return share_of, [(share_of(value), _plain(value, percent)) for value in (*marked, high)]
    order = sorted(dict.fromkeys(map(label, column)), key=str)
    share = {value: (place + 0.5) / len(order) for place, value in enumerate(order)}
    return lambda value: share[label(value)], [(place, _plain(value, False)) for value, place in share.items()]


def _between(column: list[Any], logarithmic: bool) -> list[float]:
    """What may be marked between the ends of an axis: whole numbers if they are few, powers of ten, else the middle."""
    low, high = min(column), max(column)
    if all(isinstance(value, int) for value in column) and len(set(column)) <= 6:
        return sorted(set(column))[1:-1]
    if not logarithmic:
        return [(low + high) / 2]
    powers = [10.0**power for power in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)]
    return [power for power in powers if low < power < high] or [math.sqrt(low * high)]


def _plain(value: Any, percent: bool) -> str:
    if percent:
        return f"{100 * value:.2f} %"
    return "null" if value is None else f"{value:.2g}" if isinstance(value, float) else str(value)


def _floor(results: list[Result]) -> float:
    """The figure below which trials are too far behind to be told apart, lest they flatten all others."""
    last = sorted(figure for result in results if (figure := _last_figure(result)) is not None)
    return min(last[len(last) // 4], last[-1] - 0.02) if last else 0.0


def _last_figure(result: Result) -> float | None:
    if result.mean is not None:
        return result.mean
    return result.curve[-1][1] if result.curve else None
