"""How far is an order from a uniformly random one? Numbers that are known for a uniform one.

An epoch is a sequence of batches, each the source rows of its samples, int64 [b]; the rows are 0 .. N-1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Epoch = Sequence[NDArray[np.int64]]

_NEAR = 8  # rows that are so far apart, or less, are neighbours in the source


@dataclass(frozen=True)
class Quality:
    """What is measured of an order. For a uniform one the first three are 1 and the last two 0, but for chance.

    neighbour_pairs: how often two neighbours in the source share a batch, as a multiple of how often two samples do.
    repeated_pairs: how often two that shared a batch share one in the next epoch again, as such a multiple.
    class_unevenness: chi-square of the classes in a batch, as a multiple of what drawing at random gives.
    mean_class_run, longest_class_run: of samples of one class in a row.
    reach: of the first batch, the range that holds the middle 90 % of its rows, as a share of all (0.9 if uniform).
    displacement: correlation of a sample's place in the epoch with its row.
    same_order: correlation of its places in one epoch and the next.
    """

    neighbour_pairs: float
    repeated_pairs: float
    class_unevenness: float
    mean_class_run: float
    longest_class_run: float
    reach: float
    displacement: float
    same_order: float

    def to_json(self) -> dict[str, float]:
        return asdict(self)


def quality(epochs: Sequence[Epoch], labels: NDArray[np.int64]) -> Quality:
    """Measure an order by two epochs of it or more. labels: int64 [N], the class of each row."""
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
        displacement=_mean(_correlation(np.arange(len(rows)), rows) for rows in map(np.concatenate, epochs)),
        same_order=_mean(same_order(*pair, len(labels)) for pair in pairs),
    )


def batch_of_rows(epoch: Epoch, samples: int) -> NDArray[np.int64]:
    """int64 [samples]: the number of the batch that each row is in, -1 for rows that the epoch left out."""
    batches = np.full(samples, -1)
    for number, rows in enumerate(epoch):
        batches[rows] = number
    return batches


def neighbour_pairs(epoch: Epoch, samples: int) -> float:
    """See `Quality`."""
    batches = batch_of_rows(epoch, samples)
    together = pairs = 0
    for distance in range(1, _NEAR + 1):
        first, second = batches[:-distance], batches[distance:]
        given = (first >= 0) & (second >= 0)
        together += int(((first == second) & given).sum())
        pairs += int(given.sum())
    return together / pairs / _share_a_batch(epoch)


def repeated_pairs(epoch: Epoch, following: Epoch, samples: int) -> float:
    """See `Quality`; exact, over all pairs that both epochs gave."""
    first, second = batch_of_rows(epoch, samples), batch_of_rows(following, samples)
    given = (first >= 0) & (second >= 0)
    first, second = first[given], second[given]
    table = np.zeros((len(epoch), len(following)), np.int64)
    np.add.at(table, (first, second), 1)
    count = len(first)
    together = [_pairs(table.sum(axis=1)), _pairs(table.sum(axis=0))]
    return _pairs(table) * (count * (count - 1)) / (together[0] * together[1])


def class_unevenness(epoch: Epoch, labels: NDArray[np.int64]) -> float:
    """See `Quality`."""
    counts = np.bincount(labels)
    shares = counts[counts > 0] / len(labels)
    total = freedom = 0.0
    for rows in epoch:
        found = np.bincount(labels[rows], minlength=len(counts))[counts > 0]
        expected = shares * len(rows)
        total += float(((found - expected) ** 2 / expected).sum())
        # Without replacement: a batch that is a large part of the set is more even than one drawn from an endless one.
        freedom += (len(shares) - 1) * (len(labels) - len(rows)) / (len(labels) - 1)
    return total / freedom if freedom else 1.0


def class_runs(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Lengths of the runs of one class in a sequence of classes."""
    ends = np.flatnonzero(np.r_[labels[1:] != labels[:-1], True])
    return np.diff(np.r_[-1, ends])


def same_order(epoch: Epoch, following: Epoch, samples: int) -> float:
    """See `Quality`."""
    places = []
    for one in (epoch, following):
        place = np.full(samples, -1)
        rows = np.concatenate(one)
        place[rows] = np.arange(len(rows))
        places.append(place)
    given = (places[0] >= 0) & (places[1] >= 0)
    return _correlation(places[0][given], places[1][given])


def _share_a_batch(epoch: Epoch) -> float:
    """The probability that two samples of an epoch share a batch, if it is uniform."""
    sizes = np.array([len(rows) for rows in epoch])
    return _pairs(sizes) / (sizes.sum() * (sizes.sum() - 1))


def _pairs(sizes: NDArray[np.int64]) -> int:
    """Ordered pairs within groups of these sizes."""
    return int((sizes * (sizes - 1)).sum())


def _correlation(first: NDArray, second: NDArray) -> float:
    return float(np.corrcoef(first, second)[0, 1])


def _mean(values: object) -> float:
    return float(np.mean(list(values)))
