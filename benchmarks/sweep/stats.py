"""Statistics of a resolution sweep: means over seeds, growth with pixels, Pareto front, recommendation."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import linregress

from benchmarks.common.harness import Spread

BY_EPOCHS, BY_TIME = "by_epochs", "by_time"


@dataclass(frozen=True)
class Estimate:
    """Mean over n seeds, sample standard deviation and standard error (None for one seed)."""

    mean: float
    std: float | None
    std_error: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float], samples: int | None = None) -> Estimate:
        """Estimate a mean.

        Args:
            values: One value per seed.
            samples: If the values are fractions of this many samples, the standard error is at least the binomial one
                at the fraction (x + 2) / (n + 4) of Agresti and Coull (1998,
                https://doi.org/10.1080/00031305.1998.10480550), which is not 0 if all samples are correct. It does not
                decrease with the number of seeds, because all seeds are evaluated on the same images.
        """
        mean = statistics.fmean(values)
        std = statistics.stdev(values) if len(values) > 1 else None
        std_error = std / math.sqrt(len(values)) if std is not None else None
        if samples:
            fraction = (mean * samples + 2) / (samples + 4)
            std_error = max(std_error or 0.0, math.sqrt(fraction * (1 - fraction) / (samples + 4)))
        return cls(mean, std, std_error, len(values))


@dataclass(frozen=True)
class SeedGroup:
    """Records of points that differ only in the seed."""

    model: str
    subset: float
    resolution: int
    interpolation: str
    records: tuple[dict[str, Any], ...]

    def metric(self, run: str, name: str) -> Estimate | None:
        """Return a test metric (`accuracy`, `macro_f1`, `ece`) or `updates`; None without a successful run."""
        runs = self._runs(run)
        samples = runs[0]["samples"] if runs and name == "accuracy" else None
        return Estimate.of([one[name] for one in runs], samples) if runs else None

    def validation(self, run: str) -> Estimate | None:
        """Return the validation accuracy, which selects the resolution; None without a successful run."""
        scores = [one["validation"] for one in self._runs(run)]
        return Estimate.of([score["accuracy"] for score in scores], scores[0]["samples"]) if scores else None

    def _runs(self, run: str) -> list[dict[str, Any]]:
        return [record[run] for record in self.records if record[run] and "failed" not in record[run]]

    def spread(self, name: str) -> Spread:
        """Return the median over seeds of the medians, with the range of all measurements."""
        spreads = [record[name] for record in self.records]
        return Spread(
            statistics.median(one["median"] for one in spreads),
            min(one["low"] for one in spreads),
            max(one["high"] for one in spreads),
            sum(one["n"] for one in spreads),
        )

    def largest(self, name: str) -> float | None:
        return max((record[name] for record in self.records if record[name] is not None), default=None)

    def median(self, name: str) -> float:
        return statistics.median(record[name] for record in self.records)

    @property
    def throughput(self) -> float:
        """Training images/s."""
        return self.spread("training_images_per_second").median

    @property
    def train_ms(self) -> float:
        """Training time in ms/image."""
        return 1000 / self.throughput

    @property
    def loader_ms(self) -> float:
        """CPU time of the loader in ms/image, equal to seconds per 1,000 images."""
        return self.spread("loader_cpu_seconds_per_thousand").median


def group_seeds(records: Sequence[dict[str, Any]]) -> list[SeedGroup]:
    """Group the successful points by model, subset, resolution and interpolation, in this order."""
    groups: dict[tuple[str, float, int, str], list[dict[str, Any]]] = {}
    for record in records:
        if "failed" not in record:
            key = (record["model"], record["subset"], record["resolution"], record["interpolation"])
            groups.setdefault(key, []).append(record)
    models = list(dict.fromkeys(key[0] for key in groups))
    order = sorted(groups, key=lambda key: (models.index(key[0]), *key[1:]))
    return [SeedGroup(*key, tuple(groups[key])) for key in order]


@dataclass(frozen=True)
class PowerLaw:
    """Fit of cost = factor * pixels ** exponent. The standard error of the exponent is None for two points."""

    factor: float
    exponent: float
    std_error: float | None

    def __str__(self) -> str:
        return f"{self.exponent:.2f}" + (f" ± {self.std_error:.2f}" if self.std_error is not None else "")


def fit_power_law(pixels: Sequence[float], costs: Sequence[float]) -> PowerLaw | None:
    """Fit a power law by least squares of the logarithms; None for fewer than two sizes."""
    if len(set(pixels)) < 2:
        return None
    fit = linregress(np.log(pixels), np.log(costs))
    return PowerLaw(math.exp(fit.intercept), fit.slope, fit.stderr if len(pixels) > 2 else None)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the points that no other point dominates, sorted by decreasing first coordinate."""
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda index: points[index], reverse=True):
        if not front or points[index][1] > points[front[-1]][1]:
            front.append(index)
    return front


@dataclass(frozen=True)
class Recommendation:
    """Smallest resolution within one standard error of the best validation accuracy.

    This is the one-standard-error rule of Breiman et al., Classification and Regression Trees, 1984, section 3.4.3.
    `next_larger` is None if `chosen` is the largest measured resolution.
    """

    run: str
    chosen: SeedGroup
    best: SeedGroup
    next_larger: SeedGroup | None


def recommend(groups: Sequence[SeedGroup], run: str) -> Recommendation | None:
    """Recommend a resolution.

    Args:
        groups: Groups of one model, subset and interpolation, in order of resolution.
        run: `BY_EPOCHS` or `BY_TIME`.

    Returns:
        The recommendation, or None if no group has such a run.
    """
    scores = [(group, score) for group in groups if (score := group.validation(run)) is not None]
    if not scores:
        return None
    # On ties prefer the smaller resolution.
    best, best_score = max(scores, key=lambda pair: (pair[1].mean, -pair[0].resolution))
    assert best_score.std_error is not None
    chosen = next(group for group, score in scores if score.mean >= best_score.mean - best_score.std_error)
    larger = [group for group in groups if group.resolution > chosen.resolution]
    return Recommendation(run, chosen, best, larger[0] if larger else None)
