"""Two files of the resolution study side by side: what changed, and what got worse beyond the spread of both."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common.harness import size, table
from benchmarks.sweep.plan import read_lines
from benchmarks.sweep.stats import BY_EPOCHS, BY_TIME, Cell, Estimate, cells
from shards.errors import UserError

_MEMORY_VARIES = 0.05  # of the peak, between runs of the same code
BETTER, WORSE = "better", "REGRESSION"


@dataclass(frozen=True)
class Range:
    """A figure and the range that it was measured in."""

    value: float
    low: float
    high: float


def _unknown(value: float) -> Range:
    """Of a figure that was measured once: nothing can be said to lie outside of its range."""
    return Range(value, -math.inf, math.inf)


@dataclass(frozen=True)
class Measure:
    """A figure to compare. read: of a cell, None where it has none. sign: 1 where more is better, -1 where less is."""

    name: str
    read: Callable[[Cell], Range | None]
    sign: int
    show: Callable[[float], str]


def _rate(name: str) -> Callable[[Cell], Range | None]:
    def read(cell: Cell) -> Range:
        found = cell.spread(name)
        return Range(found.median, found.low, found.high) if found.n > 1 else _unknown(found.median)

    return read


def _share(run: str, name: str) -> Callable[[Cell], Range | None]:
    """Mean ± the standard deviation over seeds or the standard error, whichever is larger."""

    def read(cell: Cell) -> Range | None:
        found: Estimate | None = cell.figure(run, name)
        if found is None:
            return None
        if found.error is None:
            return _unknown(found.mean)
        width = max(found.deviation or 0.0, found.error)
        return Range(found.mean, found.mean - width, found.mean + width)

    return read


def _memory(name: str) -> Callable[[Cell], Range | None]:
    def read(cell: Cell) -> Range | None:
        found = cell.largest(name)
        return None if found is None else Range(found, found * (1 - _MEMORY_VARIES), found * (1 + _MEMORY_VARIES))

    return read


def _percent(value: float) -> str:
    return f"{100 * value:.2f} %"


def _whole(value: float) -> str:
    return f"{value:,.0f}"


MEASURES = (
    Measure("loader images/s", _rate("loader_images_per_second"), 1, _whole),
    Measure("loader CPU-s / 1,000", _rate("loader_cpu_seconds_per_thousand"), -1, lambda value: f"{value:.4f}"),
    Measure("training images/s", _rate("training_images_per_second"), 1, _whole),
    Measure("peak memory", _memory("peak_memory_bytes"), -1, size),
    Measure("peak memory, device", _memory("peak_device_memory_bytes"), -1, size),
    *(
        Measure(f"{shown}, {after}", _share(run, name), sign, _percent)
        for run, after in ((BY_EPOCHS, "epochs"), (BY_TIME, "time"))
        for name, shown, sign in (("accuracy", "accuracy", 1), ("macro_f1", "macro F1", 1), ("ece", "calibration", -1))
    ),
)


def compare(before: Path, after: Path) -> tuple[str, bool]:
    """The table of changes in Markdown, and whether a regression is among them. Raises `UserError`."""
    earlier, later = _study(before), _study(after)
    old = {_key(cell): cell for cell in cells(earlier)}
    new = {_key(cell): cell for cell in cells(later)}
    # Points that were measured before and have failed now are lost, however little there is to compare.
    lost = sorted({_words(key) for key in old if key not in new and key in {_record_key(record) for record in later}})
    common = [key for key in old if key in new]
    if not common and not lost:
        raise UserError(
            found=f"no point that both {before} and {after} hold",
            expected="studies of the same set with some resolutions, models and subsets in common",
            hint="measure again with the arguments of the other file",
        )
    rows = []
    worse = bool(lost)
    for key in common:
        for measure in MEASURES:
            first, second = measure.read(old[key]), measure.read(new[key])
            if first is None or second is None:
                continue
            verdict = _verdict(first, second, measure.sign)
            worse = worse or verdict == WORSE
            rows.append([_words(key), measure.name, measure.show(first.value), measure.show(second.value)])
            rows[-1] += [f"{second.value / first.value - 1:+.1%}" if first.value else "", verdict]
    parts = [table(["point", "measure", before.name, after.name, "change", "beyond the spread"], rows)] if rows else []
    lines = [f"{words}: {WORSE}, it was measured in {before} and has failed in {after}" for words in lost]
    lines += _differences(earlier, later, before, after)
    lines += [f"{_words(key)}: only in {before}" for key in old if key not in new and _words(key) not in lost]
    lines += [f"{_words(key)}: only in {after}" for key in new if key not in old]
    if lines:
        parts.append("\n".join(f"- {line}" for line in lines))
    return "\n\n".join(parts), worse


def _study(path: Path) -> list[dict[str, Any]]:
    """The points of a file; where several studies went into it those of the last one."""
    records = list(read_lines(path))
    if not records:
        raise UserError(found=f"{path}, which is empty", expected="lines of a study", hint="name another file")
    return [record for record in records if record["settings"] == records[-1]["settings"]]


def _key(cell: Cell) -> tuple[str, str, float, int, str]:
    return _record_key(cell.records[0])


def _record_key(record: dict[str, Any]) -> tuple[str, str, float, int, str]:
    return (record["set"], record["model"], record["subset"], record["resolution"], record["interpolation"])


def _words(key: tuple[str, str, float, int, str]) -> str:
    _, model, subset, resolution, interpolation = key
    return f"{model}, {resolution}, {interpolation}" + (f", {subset:.3g} of the images" if subset != 1 else "")


def _verdict(before: Range, after: Range, sign: int) -> str:
    """Whether the ranges lie apart, and on which side."""
    if sign * before.value < sign * after.value:
        apart = after.low > before.high if sign > 0 else after.high < before.low
        return BETTER if apart else ""
    apart = after.high < before.low if sign > 0 else after.low > before.high
    return WORSE if apart else ""


def _differences(earlier: list[dict[str, Any]], later: list[dict[str, Any]], before: Path, after: Path) -> list[str]:
    """What else differs between the files, so that nobody takes another machine for a regression."""
    lines = []
    for name, words in (("processor", "processors"), ("device", "devices"), ("cores", "numbers of cores")):
        values = [
            sorted({str(one["environment"][name]) for one in side if "environment" in one}) for side in (earlier, later)
        ]
        if values[0] != values[1]:
            lines.append(f"the {words} differ: {', '.join(values[0])} in {before}, {', '.join(values[1])} in {after}")
    settings = [{one["settings"] for one in side} for side in (earlier, later)]
    if settings[0] != settings[1]:
        lines.append("the settings of the studies differ (recipe, epochs, seconds or test images)")
    return lines
