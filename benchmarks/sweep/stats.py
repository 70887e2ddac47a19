"""What the lines of a resolution study say: means over seeds, growth with pixels, the Pareto front, the choice."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.common.harness import Spread

BY_EPOCHS, BY_TIME = "by_epochs", "by_time"


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds. deviation: the sample standard deviation, None for one seed. error: standard error or None."""

    mean: float
    deviation: float | None
    error: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float], samples: int | None = None) -> Estimate:
        """samples: of which each value is a share; then the error is at least what chance makes of so many.

        That is the binomial one at the share that Agresti and Coull take, (x + 2) / (n + 4), which is not 0 where all
        are right (1998, https://doi.org/10.1080/00031305.1998.10480550). It does not fall with the seeds: they are
        judged by the same images, or by ones that overlap.
        """
        mean = statistics.fmean(values)
        deviation = statistics.stdev(values) if len(values) > 1 else None
        error = deviation / math.sqrt(len(values)) if deviation is not None else None
        if samples:
            share = (mean * samples + 2) / (samples + 4)
            error = max(error or 0.0, math.sqrt(share * (1 - share) / (samples + 4)))
        return cls(mean, deviation, error, len(values))


@dataclass(frozen=True)
class Cell:
    """The points that differ in nothing but the seed."""

    model: str
    subset: float
    resolution: int
    interpolation: str
    records: tuple[dict[str, Any], ...]

    def figure(self, run: str, name: str) -> Estimate | None:
        """A figure of the test part (`accuracy`, `macro_f1`, `ece`) or `updates`; None if there is no such run."""
        runs = self._runs(run)
        samples = runs[0]["samples"] if runs and name == "accuracy" else None
        return Estimate.of([one[name] for one in runs], samples) if runs else None

    def validation(self, run: str) -> Estimate | None:
        """Accuracy on the validation part, by which resolutions are chosen."""
        judged = [one["validation"] for one in self._runs(run)]
        return Estimate.of([one["accuracy"] for one in judged], judged[0]["samples"]) if judged else None

    def _runs(self, run: str) -> list[dict[str, Any]]:
        found = [record[run] for record in self.records]
        return [one for one in found if one is not None and "failed" not in one]

    def spread(self, name: str) -> Spread:
        """The median of the seeds' medians, with the range of all."""
        found = [record[name] for record in self.records]
        return Spread(
            statistics.median(one["median"] for one in found),
            min(one["low"] for one in found),
            max(one["high"] for one in found),
            sum(one["n"] for one in found),
        )

    def all_reduce_max(self, name: str) -> float | None:
        values = [record[name] for record in self.records if record[name] is not None]
        return max(values, default=None)

    def median(self, name: str) -> float:
        return statistics.median(record[name] for record in self.records)

    @property
    def throughput(self) -> float:
        return self.spread("training_images_per_second").median

    @property
    def seconds_per_image(self) -> float:
        return 1 / self.throughput

    @property
    def batches(self) -> str:
        """The batch of each point, where it had to be smaller than asked for."""
        smaller = sorted({record["batch_size"] for record in self.records if record["out_of_memory"]})
        return ", ".join(map(str, smaller))


def cells(records: Sequence[dict[str, Any]]) -> list[Cell]:
    """The measured points by model, subset, resolution and interpolation, in this order."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for record in records:
        if "failed" not in record:
            key = (record["model"], record["subset"], record["resolution"], record["interpolation"])
            groups.setdefault(key, []).append(record)
    models = list(dict.fromkeys(key[0] for key in groups))
    order = sorted(groups, key=lambda key: (models.index(key[0]), *key[1:]))
    return [Cell(*key, tuple(groups[key])) for key in order]


@dataclass(frozen=True)
class Growth:
    """cost = factor * pixels ** exponent, by least squares of the logarithms. error: standard error of the exponent,
    None for two points, through which the line goes."""

    factor: float
    exponent: float
    error: float | None


def growth(pixels: Sequence[float], costs: Sequence[float]) -> Growth | None:
    """How a cost grows with the pixels of an image; None for fewer than two sizes."""
    if len(set(pixels)) < 2:
        return None
    x, y = [math.log(value) for value in pixels], [math.log(value) for value in costs]
    middle_x, middle_y = statistics.fmean(x), statistics.fmean(y)
    squares = sum((one - middle_x) ** 2 for one in x)
    slope = sum((one - middle_x) * (other - middle_y) for one, other in zip(x, y, strict=True)) / squares
    start = middle_y - slope * middle_x
    error = None
    if len(x) > 2:
        rest = sum((other - start - slope * one) ** 2 for one, other in zip(x, y, strict=True))
        error = math.sqrt(rest / (len(x) - 2) / squares)
    return Growth(math.exp(start), slope, error)


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which points no other one beats: at least as fast and as good, and better in one of both; the fastest first."""
    order = sorted(range(len(points)), key=lambda number: points[number], reverse=True)
    front: list[int] = []
    for number in order:
        if not front or points[number][1] > points[front[-1]][1]:
            front.append(number)
    return front


@dataclass(frozen=True)
class Choice:
    """The smallest resolution within one standard error of the best, by the accuracy on the validation part.

    That is the one-standard-error rule of Breiman et al., Classification and Regression Trees, 1984, section 3.4.3.
    larger: the next resolution that was measured, None for the largest.
    """

    run: str
    chosen: Cell
    best: Cell
    larger: Cell | None


def choose(cells: Sequence[Cell], run: str) -> Choice | None:
    """cells: of one model, subset and interpolation, by resolution. None if none of them has such a run."""
    judged = [(cell, found) for cell in cells if (found := cell.validation(run)) is not None]
    if not judged:
        return None
    # Of equals the smaller one.
    best, of_best = max(judged, key=lambda pair: (pair[1].mean, -pair[0].resolution))
    assert of_best.error is not None
    chosen = next(cell for cell, found in judged if found.mean >= of_best.mean - of_best.error)
    larger = [cell for cell in cells if cell.resolution > chosen.resolution]
    return Choice(run, chosen, best, larger[0] if larger else None)
