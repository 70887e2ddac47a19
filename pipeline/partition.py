"""Stratified parts of a labelled set, drawn by a seed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.order import PARTITION_STREAM, random_keys


def stratified(labels: NDArray[np.int64], fraction: float, seed: int) -> NDArray[np.bool_]:
    """Choose a fraction of the samples with the classes in proportion.

    labels: int64 [N]. fraction: 0 .. 1. Returns a mask bool [N] with round(fraction * N) samples chosen:
    every class gives its share rounded down, and the largest remainders one more each. A pure function of
    its arguments.
    """
    counts = np.bincount(labels)
    shares = counts * fraction
    quotas = np.floor(shares).astype(np.int64)
    short = round(fraction * len(labels)) - int(quotas.sum())
    for label in np.argsort(-(shares - quotas), kind="stable")[: max(short, 0)]:
        quotas[label] += 1
    # Sorted by class, then at random within it: a sample's rank in its class is its place minus the class's start.
    keys = random_keys(seed, PARTITION_STREAM, len(labels))
    by_class = np.lexsort((keys, labels))
    starts = np.cumsum(counts) - counts
    rank = np.arange(len(labels)) - starts[labels[by_class]]
    chosen = np.zeros(len(labels), bool)
    chosen[by_class] = rank < quotas[labels[by_class]]
    return chosen
