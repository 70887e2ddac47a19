"""Comparison of two result files of a resolution sweep: changes beyond the spread of both."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common.text import bullets, format_bytes, format_percent, markdown_table
from benchmarks.sweep.plan import read_records
from benchmarks.sweep.stats import BY_EPOCHS, BY_TIME, SeedGroup, group_seeds
from shards.errors import UserError

_MEMORY_TOLERANCE = 0.05  # variation of peak memory between runs of the same code
BETTER, WORSE = "better", "REGRESSION"

_Key = tuple[str, str, float, int, str]


@dataclass(frozen=True)
class Range:
    """A value and its range; infinite if the value was measured only once."""

    value: float
    low: float = -math.inf
    high: float = math.inf


@dataclass(frozen=True)
class Measure:
    """A quantity to compare.

    Args:
        name: Title of its rows.
        read: Returns its value in a group, or None if the group has none.
        sign: 1 if higher is better, -1 if lower is better.
        format: Formats a value.
    """

    name: str
    read: Callable[[SeedGroup], Range | None]
    sign: int
    format: Callable[[float], str]


def _rate(name: str) -> Callable[[SeedGroup], Range | None]:
    def read(group: SeedGroup) -> Range:
        spread = group.spread(name)
        return Range(spread.median, spread.low, spread.high) if spread.n > 1 else Range(spread.median)

    return read


def _score(run: str, name: str) -> Callable[[SeedGroup], Range | None]:
    """Mean ± the standard deviation over seeds or the standard error, whichever is larger."""

    def read(group: SeedGroup) -> Range | None:
        estimate = group.metric(run, name)
        if estimate is None:
            return None
        if estimate.std_error is None:
            return Range(estimate.mean)
        width = max(estimate.std or 0.0, estimate.std_error)
        return Range(estimate.mean, estimate.mean - width, estimate.mean + width)

    return read


def _memory(name: str) -> Callable[[SeedGroup], Range | None]:
    def read(group: SeedGroup) -> Range | None:
        peak = group.largest(name)
        return None if peak is None else Range(peak, peak * (1 - _MEMORY_TOLERANCE), peak * (1 + _MEMORY_TOLERANCE))

    return read


MEASURES = (
    Measure("loader images/s", _rate("loader_images_per_second"), 1, "{:,.0f}".format),
    Measure("loader CPU-s / 1,000", _rate("loader_cpu_seconds_per_thousand"), -1, "{:.4f}".format),
    Measure("training images/s", _rate("training_images_per_second"), 1, "{:,.0f}".format),
    Measure("peak memory", _memory("peak_memory_bytes"), -1, format_bytes),
    Measure("peak GPU memory", _memory("peak_device_memory_bytes"), -1, format_bytes),
    *(
        Measure(f"{title}, {after}", _score(run, name), sign, format_percent)
        for run, after in ((BY_EPOCHS, "epochs"), (BY_TIME, "time"))
        for name, title, sign in (("accuracy", "accuracy", 1), ("macro_f1", "macro F1", 1), ("ece", "calibration", -1))
    ),
)


def compare(before: Path, after: Path) -> tuple[str, bool]:
    """Compare two result files.

    Returns:
        The changes in Markdown, and whether any of them is a regression.

    Raises:
        UserError: A file cannot be read, or the files have no point in common.
    """
    earlier, later = _read_last_sweep(before), _read_last_sweep(after)
    old = {_key(group.records[0]): group for group in group_seeds(earlier)}
    new = {_key(group.records[0]): group for group in group_seeds(later)}
    # A point that was measured before and fails now is a regression.
    lost = [key for key in old if key not in new and key in map(_key, later)]
    common = [key for key in old if key in new]
    if not common and not lost:
        raise UserError(
            found=f"no point that both {before} and {after} contain",
            expected="sweeps of one data set with resolutions, models and subsets in common",
            hint="measure again with the arguments of the other file",
        )
    rows, has_regression = [], bool(lost)
    for key in common:
        for measure in MEASURES:
            first, second = measure.read(old[key]), measure.read(new[key])
            if first is None or second is None:
                continue
            verdict = _verdict(first, second, measure.sign)
            has_regression = has_regression or verdict == WORSE
            change = f"{second.value / first.value - 1:+.1%}" if first.value else ""
            values = [measure.format(first.value), measure.format(second.value)]
            rows.append([_describe(key), measure.name, *values, change, verdict])
    lines = [f"{_describe(key)}: {WORSE}, measured in {before} and failed in {after}" for key in lost]
    lines += _differences(earlier, later, before, after)
    lines += [f"{_describe(key)}: only in {before}" for key in old if key not in new and key not in lost]
    lines += [f"{_describe(key)}: only in {after}" for key in new if key not in old]
    head = ["point", "measure", before.name, after.name, "change", "beyond the spread"]
    blocks = [markdown_table(head, rows) if rows else "", bullets(lines)]
    return "\n\n".join(filter(None, blocks)), has_regression


def _read_last_sweep(path: Path) -> list[dict[str, Any]]:
    """Read the records of a file; if it holds several sweeps, those of the last one."""
    records = list(read_records(path))
    if not records:
        raise UserError(found=f"{path} is empty", expected="the lines of a resolution sweep", hint="name another file")
    return [record for record in records if record["settings"] == records[-1]["settings"]]


def _key(record: dict[str, Any]) -> _Key:
    return (record["set"], record["model"], record["subset"], record["resolution"], record["interpolation"])


def _describe(key: _Key) -> str:
    _, model, subset, resolution, interpolation = key
    return f"{model}, {resolution}, {interpolation}" + (f", {subset:.3g} of the images" if subset != 1 else "")


def _verdict(before: Range, after: Range, sign: int) -> str:
    """Return whether the ranges are disjoint, and in which direction."""
    if after.low > before.high:
        return BETTER if sign > 0 else WORSE
    if after.high < before.low:
        return WORSE if sign > 0 else BETTER
    return ""


def _differences(earlier: list[dict[str, Any]], later: list[dict[str, Any]], before: Path, after: Path) -> list[str]:
    """Describe differences in hardware and settings that may explain a change."""
    lines = []
    for name, noun in (("processor", "processors"), ("device", "devices"), ("cores", "numbers of cores")):
        first, second = (
            ", ".join(sorted({str(one["environment"][name]) for one in side if "environment" in one}))
            for side in (earlier, later)
        )
        if first != second:
            lines.append(f"the {noun} differ: {first} in {before}, {second} in {after}")
    if earlier[-1]["settings"] != later[-1]["settings"]:
        lines.append("the settings of the sweeps differ (recipe, epochs, seconds or test images)")
    return lines
