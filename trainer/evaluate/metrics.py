"""Metrics of a classifier, all computed from its confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class ConfusionMatrix:
    """Number of samples by true and predicted class."""

    counts: NDArray[np.int64]
    """[C, C]; rows are true classes, columns predicted ones."""

    @classmethod
    def of(cls, labels: NDArray[np.int64], predictions: NDArray[np.int64], classes: int) -> ConfusionMatrix:
        """Count labels [N] and predictions [N], both 0 .. classes - 1."""
        pairs = np.bincount(labels * classes + predictions, minlength=classes * classes)
        return cls(pairs.reshape(classes, classes))

    @property
    def samples(self) -> int:
        return int(self.counts.sum())

    @property
    def accuracy(self) -> float:
        return float(np.trace(self.counts) / self.counts.sum())

    @property
    def support(self) -> NDArray[np.int64]:
        """[C], samples of each class."""
        return self.counts.sum(axis=1)

    @property
    def precision(self) -> NDArray[np.float64]:
        """[C]; 0 for a class that is never predicted."""
        return _divide(np.diag(self.counts), self.counts.sum(axis=0))

    @property
    def recall(self) -> NDArray[np.float64]:
        """[C]; 0 for a class without samples."""
        return _divide(np.diag(self.counts), self.support)

    @property
    def f1(self) -> NDArray[np.float64]:
        """[C], harmonic mean of precision and recall; 0 for a class without samples and predictions."""
        return _divide(2 * np.diag(self.counts), self.support + self.counts.sum(axis=0))

    @property
    def macro_f1(self) -> float:
        """Mean F1 over the classes that have samples or predictions."""
        present = (self.support + self.counts.sum(axis=0)) > 0
        return float(self.f1[present].mean())

    @property
    def weighted_f1(self) -> float:
        """Mean F1 weighted by the samples of the classes."""
        return float((self.f1 * self.support).sum() / self.support.sum())

    def summary(self) -> dict[str, float | int]:
        """Return the metrics as `summary.json` holds them."""
        return {name: getattr(self, name) for name in ("accuracy", "macro_f1", "weighted_f1", "samples")}

    def class_metrics(self, classes: Sequence[str]) -> list[dict[str, Any]]:
        """Return name, `samples`, `precision`, `recall` and `f1` of each class."""
        columns = {"samples": self.support, "precision": self.precision, "recall": self.recall, "f1": self.f1}
        return [
            {"name": name} | {column: values[label].item() for column, values in columns.items()}
            for label, name in enumerate(classes)
        ]

    def most_confused(self, pairs: int) -> list[tuple[int, int, int]]:
        """Return the largest entries off the diagonal: (true class, predicted class, count), most frequent first."""
        errors = self.counts.copy()
        np.fill_diagonal(errors, 0)
        order = np.argsort(-errors, axis=None, kind="stable")[:pairs]
        cells = zip(*np.unravel_index(order, errors.shape), strict=True)
        return [(int(true), int(guess), int(errors[true, guess])) for true, guess in cells if errors[true, guess]]


def _divide(numerator: NDArray, denominator: NDArray) -> NDArray[np.float64]:
    return numerator / np.maximum(denominator, 1)
