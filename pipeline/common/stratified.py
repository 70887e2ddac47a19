"""Stratified parts of a labelled set, drawn by a seed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.common.rng import PARTITION_STREAM, random_keys


def stratified_mask(
    labels: NDArray[np.int64],
    fraction: float,
    seed: int,
    stream: int = PARTITION_STREAM,
    within: NDArray[np.int64] | None = None,
) -> NDArray[np.bool_]:
    """Choose a fraction of the samples with the classes in proportion.

    labels: int64 [N], any integers. fraction: 0 .. 1. stream: of the seed; different ones choose independently.
    within: int64 [N], groups to have in proportion inside each class.
    Returns a mask bool [N] with round(fraction * N) samples chosen: every class gives its share rounded down, and the
    largest remainders one more each; no class gives its last sample as long as others have some. What a class gives is
    shared out among its groups in the same way. A pure function of its arguments.
    """
    _, classes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    keys = random_keys(seed, stream, len(labels))
    strata, quotas = classes, _quotas(counts, fraction)
    if within is not None:
        _, groups = np.unique(within, return_inverse=True)
        width = int(groups.max(initial=0)) + 1
        pairs, strata, sizes = np.unique(classes * width + groups, return_inverse=True, return_counts=True)
        quotas = _shared_out(quotas, counts, pairs // width, sizes, keys)
        counts = sizes
    # Sorted by stratum, then at random within it: a sample's rank there is its place minus the stratum's start.
    by_stratum = np.lexsort((keys, strata))
    starts = np.cumsum(counts) - counts
    rank = np.arange(len(labels)) - starts[strata[by_stratum]]
    chosen = np.zeros(len(labels), bool)
    chosen[by_stratum] = rank < quotas[strata[by_stratum]]
    return chosen


def _quotas(counts: NDArray[np.int64], fraction: float) -> NDArray[np.int64]:
    """How many samples each class gives, of as many as it has; of equal remainders the first classes' count."""
    shares = counts * fraction
    quotas = np.floor(shares).astype(np.int64)
    remainders = shares - quotas
    short = round(fraction * int(counts.sum())) - int(quotas.sum())
    order = np.lexsort((-remainders, quotas + 1 >= counts))
    quotas[order[: max(short, 0)]] += 1
    return quotas


def _shared_out(
    quotas: NDArray[np.int64],
    counts: NDArray[np.int64],
    class_of: NDArray[np.int64],
    sizes: NDArray[np.int64],
    keys: NDArray[np.uint64],
) -> NDArray[np.int64]:
    """How many samples each group gives, at random where remainders are equal (groups may be of one sample each).

    quotas, counts: of the classes. class_of, sizes: of the groups, by class. keys: random ones.
    """
    given, remainders = np.divmod(quotas[class_of] * sizes, counts[class_of])
    short = quotas - np.bincount(class_of, given, minlength=len(quotas)).astype(np.int64)
    order = np.lexsort((keys[: len(sizes)], -remainders, class_of))
    groups = np.bincount(class_of, minlength=len(quotas))
    rank = np.arange(len(order)) - (np.cumsum(groups) - groups)[class_of[order]]
    given[order[rank < short[class_of[order]]]] += 1
    return given
