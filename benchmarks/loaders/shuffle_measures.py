"""Measures of the distance between an order and a uniformly random one.

An epoch is a sequence of batches, each the source indices of its samples, int64 [b], in 0 .. N-1.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Epoch = Sequence[NDArray[np.int64]]

_MAX_DISTANCE = 8  # between the indices of neighbours in the source


@dataclass(frozen=True)
class Quality:
    """Measures of an order. For a uniform one, the first three are 1 and the last two 0, except for chance.

    Args:
        neighbour_pairs: Frequency of two neighbours of the source in one batch, relative to any two samples.
        repeated_pairs: Frequency of two samples of one batch in one batch of the next epoch, relative to chance.
        class_unevenness: Chi-square of the classes in a batch, relative to its expectation.
        mean_class_run: Mean number of consecutive samples of one class.
        longest_class_run: Largest number of consecutive samples of one class.
        reach: Range of the middle 90% of the indices of the first batch, as a fraction of the source (0.9 if uniform).
        displacement: Correlation of position in the epoch and source index.
        same_order: Correlation of the positions in consecutive epochs.
    """

    neighbour_pairs: float
    repeated_pairs: float
    class_unevenness: float
    mean_class_run: float
    longest_class_run: float
    reach: float
    displacement: float
    same_order: float


def measure_quality(epochs: Sequence[Epoch], labels: NDArray[np.int64]) -> Quality:
    """Measure an order.

    Args:
        epochs: At least two epochs.
        labels: Class of each sample, int64 [N].
    """
    assert len(epochs) >= 2
    pairs = list(pairwise(epochs))
    runs = [class_runs(labels[np.concatenate(epoch)]) for epoch in epochs]
    return Quality(
        neighbour_pairs=_mean(neighbour_pairs(epoch, len(labels)) for epoch in epochs),
        repeated_pairs=_mean(repeated_pairs(*pair, len(labels)) for pair in pairs),
        class_unevenness=_mean(class_unevenness(epoch, labels) for epoch in epochs),
        mean_class_run=_mean(run.mean() for run in runs),
        longest_class_run=_mean(run.max() for run in runs),
        reach=float(np.subtract(*np.percentile(epochs[0][0], [95, 5]))) / len(labels),
        displacement=_mean(_correlation(np.arange(len(order)), order) for order in map(np.concatenate, epochs)),
        same_order=_mean(same_order(*pair, len(labels)) for pair in pairs),
    )


def batch_numbers(epoch: Epoch, samples: int) -> NDArray[np.int64]:
    """Return the batch number of each sample, int64 [samples]; -1 for samples that the epoch skips."""
    numbers = np.full(samples, -1)
    for number, indices in enumerate(epoch):
        numbers[indices] = number
    return numbers


def neighbour_pairs(epoch: Epoch, samples: int) -> float:
    """Compute `Quality.neighbour_pairs`."""
    numbers = batch_numbers(epoch, samples)
    together = pairs = 0
    for distance in range(1, _MAX_DISTANCE + 1):
        first, second = numbers[:-distance], numbers[distance:]
        is_used = (first >= 0) & (second >= 0)
        together += int(((first == second) & is_used).sum())
        pairs += int(is_used.sum())
    return together / pairs / _same_batch_probability(epoch)


def repeated_pairs(epoch: Epoch, following: Epoch, samples: int) -> float:
    """Compute `Quality.repeated_pairs` exactly, over all pairs of samples that both epochs contain."""
    first, second = batch_numbers(epoch, samples), batch_numbers(following, samples)
    is_used = (first >= 0) & (second >= 0)
    first, second = first[is_used], second[is_used]
    counts = np.zeros((len(epoch), len(following)), np.int64)
    np.add.at(counts, (first, second), 1)
    total = len(first)
    together = [_pairs(counts.sum(axis=1)), _pairs(counts.sum(axis=0))]
    return _pairs(counts) * (total * (total - 1)) / (together[0] * together[1])


def class_unevenness(epoch: Epoch, labels: NDArray[np.int64]) -> float:
    """Compute `Quality.class_unevenness`."""
    counts = np.bincount(labels)
    fractions = counts[counts > 0] / len(labels)
    total = freedom = 0.0
    for indices in epoch:
        observed = np.bincount(labels[indices], minlength=len(counts))[counts > 0]
        expected = fractions * len(indices)
        total += float(((observed - expected) ** 2 / expected).sum())
        # Finite-population correction: batches are drawn without replacement.
        freedom += (len(fractions) - 1) * (len(labels) - len(indices)) / (len(labels) - 1)
    return total / freedom if freedom else 1.0


def class_runs(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the lengths of the runs of equal labels."""
    ends = np.flatnonzero(np.r_[labels[1:] != labels[:-1], True])
    return np.diff(np.r_[-1, ends])


def same_order(epoch: Epoch, following: Epoch, samples: int) -> float:
    """Compute `Quality.same_order`."""
    positions = np.full((2, samples), -1)
    for row, order in zip(positions, (np.concatenate(epoch), np.concatenate(following)), strict=True):
        row[order] = np.arange(len(order))
    return _correlation(*positions[:, (positions >= 0).all(axis=0)])


def _same_batch_probability(epoch: Epoch) -> float:
    """Return the probability that two samples of a uniform epoch share a batch."""
    sizes = np.array([len(indices) for indices in epoch])
    return _pairs(sizes) / (sizes.sum() * (sizes.sum() - 1))


def _pairs(sizes: NDArray[np.int64]) -> int:
    """Return the number of ordered pairs within groups of these sizes."""
    return int((sizes * (sizes - 1)).sum())


def _correlation(first: NDArray, second: NDArray) -> float:
    return float(np.corrcoef(first, second)[0, 1])


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))
