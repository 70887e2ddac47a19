"""Comparison of two result files of a resolution sweep: changes beyond the spread of both."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.common.harness import Spread
from benchmarks.common.text import bullets, format_bytes, format_percent, markdown_table
from benchmarks.sweep.plan import read_records
from benchmarks.sweep.stats import BY_EPOCHS, BY_TIME, SeedGroup, group_seeds
from shards.errors import UserError

_MEMORY_TOLERANCE = 0.05  # variation of peak memory between runs of the same code
BETTER, WORSE = "better", "REGRESSION"

_Key = tuple[str, str, float, int, str]


class Measure(NamedTuple):
    """A quantity of a group with its range, which is infinite if it was measured only once.

    Attributes:
        spread: Value and range.
        sign: 1 if higher is better, -1 if lower is better.
        format: Formats a value.
    """

    spread: Spread
    sign: int
    format: Callable[[float], str]


def measures(group: SeedGroup) -> dict[str, Measure]:
    """Return the quantities to compare by title."""
    found: dict[str, Measure] = {}
    for title, name, sign, form in (
        ("loader images/s", "loader_images_per_second", 1, "{:,.0f}".format),
        ("loader CPU-s / 1,000", "loader_cpu_seconds_per_thousand", -1, "{:.4f}".format),
        ("training images/s", "training_images_per_second", 1, "{:,.0f}".format),
    ):
        spread = group.spread(name)
        found[title] = Measure(spread if spread.n > 1 else _around(spread.median, math.inf), sign, form)
    for title, name in (("peak memory", "peak_memory_bytes"), ("peak GPU memory", "peak_device_memory_bytes")):
        if peak := group.largest(name):
            found[title] = Measure(_around(peak, _MEMORY_TOLERANCE * peak), -1, format_bytes)
    for run, after in ((BY_EPOCHS, "epochs"), (BY_TIME, "time")):
        for name, title, sign in (("accuracy", "accuracy", 1), ("macro_f1", "macro F1", 1), ("ece", "calibration", -1)):
            if estimate := group.metric(run, name):
                error = math.inf if estimate.std_error is None else estimate.std_error
                spread = _around(estimate.mean, max(estimate.std or 0.0, error))
                found[f"{title}, {after}"] = Measure(spread, sign, format_percent)
    return found


def _around(value: float, error: float) -> Spread:
    return Spread(value, value - error, value + error, 1)


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
        after_measures = measures(new[key])
        for title, measure in measures(old[key]).items():
            if title in after_measures:
                first, second = measure.spread, after_measures[title].spread
                verdict = _verdict(first, second, measure.sign)
                has_regression = has_regression or verdict == WORSE
                change = f"{second.median / first.median - 1:+.1%}" if first.median else ""
                values = [measure.format(first.median), measure.format(second.median)]
                rows.append([_describe(key), title, *values, change, verdict])
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
    return [record for record in records if all(record[name] == records[-1][name] for name in ("set", "settings"))]


def _key(record: dict[str, Any]) -> _Key:
    return (record["set"], record["model"], record["subset"], record["resolution"], record["interpolation"])


def _describe(key: _Key) -> str:
    _, model, subset, resolution, interpolation = key
    return f"{model}, {resolution}, {interpolation}" + (f", {100 * subset:.3g}% of the images" if subset != 1 else "")


def _verdict(before: Spread, after: Spread, sign: int) -> str:
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
