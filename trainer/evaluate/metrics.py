"""Metrics of a classifier, computed from counts by class: memory grows with classes and samples, not with C * C."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

MAX_MATRIX_CLASSES = 256  # classes of a confusion matrix in a report; its memory and area grow with their square


@dataclass(frozen=True)
class ClassificationMetrics:
    """The sums of a confusion matrix [C, C] from which precision, recall and F1 are computed; each int64 [C]."""

    support: NDArray[np.int64]
    """Samples of each class."""
    predicted: NDArray[np.int64]
    """Predictions of each class."""
    correct: NDArray[np.int64]
    """Correct predictions of each class."""

    @classmethod
    def of(cls, labels: NDArray[np.int64], predictions: NDArray[np.int64], classes: int) -> ClassificationMetrics:
        """Count labels [N] and predictions [N], both 0 .. classes - 1."""
        columns = labels, predictions, labels[labels == predictions]
        return cls(*(np.bincount(column, minlength=classes) for column in columns))

    @property
    def samples(self) -> int:
        return int(self.support.sum())

    @property
    def accuracy(self) -> float:
        return float(self.correct.sum() / self.support.sum())

    @property
    def precision(self) -> NDArray[np.float64]:
        """[C]; 0 for a class that is never predicted."""
        return _divide(self.correct, self.predicted)

    @property
    def recall(self) -> NDArray[np.float64]:
        """[C]; 0 for a class without samples."""
        return _divide(self.correct, self.support)

    @property
    def f1(self) -> NDArray[np.float64]:
        """[C], harmonic mean of precision and recall; 0 for a class without samples and predictions."""
        return _divide(2 * self.correct, self.support + self.predicted)

    @property
    def balanced_accuracy(self) -> float:
        """Mean recall of the classes that have samples."""
        return float(self.recall[self.support > 0].mean())

    @property
    def macro_f1(self) -> float:
        """Mean F1 over the classes that have samples or predictions."""
        return float(self.f1[(self.support + self.predicted) > 0].mean())

    @property
    def weighted_f1(self) -> float:
        """Mean F1 weighted by the samples of the classes."""
        return float((self.f1 * self.support).sum() / self.support.sum())

    def summary(self) -> dict[str, float | int]:
        """Return the metrics as `summary.json` holds them."""
        names = ("accuracy", "balanced_accuracy", "macro_f1", "weighted_f1", "samples")
        return {name: getattr(self, name) for name in names}

    def class_metrics(self, classes: Sequence[str]) -> list[dict[str, Any]]:
        """Return name, `samples`, `precision`, `recall` and `f1` of each class."""
        columns = {"samples": self.support, "precision": self.precision, "recall": self.recall, "f1": self.f1}
        return [
            {"name": name} | {column: values[label].item() for column, values in columns.items()}
            for label, name in enumerate(classes)
        ]


def count_classes_(counts: torch.Tensor, labels: torch.Tensor, logits: torch.Tensor) -> None:
    """Add a batch to the fields of `ClassificationMetrics`, in place and without a synchronization with the device.

    Args:
        counts: int64 [3, C], rows `support`, `predicted` and `correct`; changed.
        labels: int64 [n].
        logits: [n, C].
    """
    predicted = logits.argmax(dim=1)
    is_correct = (predicted == labels).long()
    one = torch.ones_like(labels)
    counts.scatter_add_(1, torch.stack([labels, predicted, labels]), torch.stack([one, one, is_correct]))


def classification_report(labels: NDArray[np.int64], predictions: NDArray[np.int64], classes: Sequence[str]) -> str:
    """Format precision, recall, F1 and support of each class that has samples or predictions, and their means."""
    from sklearn.metrics import classification_report as format_report

    found = np.union1d(labels, predictions)
    names = [classes[label] for label in found]
    return format_report(labels, predictions, labels=found, target_names=names, digits=4, zero_division=0)


def confusion_matrix(labels: NDArray[np.int64], predictions: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    """Count samples by true class (row) and predicted class (column), int64 [C, C]; for few classes only."""
    return np.bincount(labels * classes + predictions, minlength=classes * classes).reshape(classes, classes)


def most_confused(labels: NDArray[np.int64], predictions: NDArray[np.int64], pairs: int) -> list[tuple[int, int, int]]:
    """Return the most frequent errors: (true class, predicted class, count), most frequent first."""
    wrong = labels != predictions
    errors, counts = np.unique(np.stack([labels[wrong], predictions[wrong]], axis=1), axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:pairs]
    return [(*map(int, errors[index]), int(counts[index])) for index in order]  # type: ignore[misc]


def _divide(numerator: NDArray, denominator: NDArray) -> NDArray[np.float64]:
    return numerator / np.maximum(denominator, 1)
