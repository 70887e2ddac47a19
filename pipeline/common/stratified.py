"""Stratified random subsets of labelled samples."""

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
    """Choose a fraction of the samples, with the classes in proportion. A pure function of its arguments.

    Every class contributes its fraction rounded down, and the classes with the largest remainders one sample more. No
    class contributes its last sample as long as others have some. The samples of a class are divided among its groups
    in the same way.

    Args:
        labels: int64 [N], any integers.
        fraction: 0 .. 1.
        seed: The seed of the choice.
        stream: The stream of the seed; choices of different streams are independent.
        within: int64 [N], groups that are chosen in proportion inside each class.

    Returns:
        A mask bool [N] of round(fraction * N) chosen samples.
    """
    _, classes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    keys = random_keys(seed, stream, len(labels))
    strata, quotas = classes, stratified_quotas(counts, fraction)
    if within is not None:
        _, groups = np.unique(within, return_inverse=True)
        width = int(groups.max(initial=0)) + 1
        pairs, strata, sizes = np.unique(classes * width + groups, return_inverse=True, return_counts=True)
        quotas = _quotas_of_groups(quotas, counts, pairs // width, sizes, keys)
        counts = sizes
    # Sort by stratum, then at random within it. The rank of a sample is its position minus the start of the stratum.
    by_stratum = np.lexsort((keys, strata))
    starts = np.cumsum(counts) - counts
    rank = np.arange(len(labels)) - starts[strata[by_stratum]]
    chosen = np.zeros(len(labels), bool)
    chosen[by_stratum] = rank < quotas[strata[by_stratum]]
    return chosen


def stratified_folds(labels: NDArray[np.int64], folds: int, seed: int, stream: int) -> NDArray[np.int64]:
    """Divide the samples into parts for cross-validation. A pure function of its arguments.

    The samples, sorted by class and in random order within each class, are assigned to the parts in turn. The sizes of
    the parts therefore differ by at most one, and so do their numbers of samples of each class.

    Args:
        labels: int64 [N], any integers.
        folds: Number of parts.
        seed: The seed of the choice.
        stream: The stream of the seed.

    Returns:
        The part of each sample, int64 [N], 0 .. folds-1.
    """
    part = np.empty(len(labels), np.int64)
    part[np.lexsort((random_keys(seed, stream, len(labels)), labels))] = np.arange(len(labels)) % folds
    return part


def stratified_quotas(counts: NDArray[np.int64], fraction: float) -> NDArray[np.int64]:
    """Return the number of samples of each class in a fraction of them, int64 [C].

    On equal remainders the first classes contribute more.

    Args:
        counts: int64 [C], samples of each class.
        fraction: 0 .. 1.
    """
    exact = counts * fraction
    quotas = np.floor(exact).astype(np.int64)
    remainders = exact - quotas
    short = round(fraction * int(counts.sum())) - int(quotas.sum())
    order = np.lexsort((-remainders, quotas + 1 >= counts))
    quotas[order[: max(short, 0)]] += 1
    return quotas


def _quotas_of_groups(
    quotas: NDArray[np.int64],
    counts: NDArray[np.int64],
    class_of: NDArray[np.int64],
    sizes: NDArray[np.int64],
    keys: NDArray[np.uint64],
) -> NDArray[np.int64]:
    """The number of samples from each group, random on equal remainders (groups may have one sample each).

    quotas, counts: of the classes. class_of, sizes: of the groups, sorted by class. keys: random numbers.
    """
    result, remainders = np.divmod(quotas[class_of] * sizes, counts[class_of])
    short = quotas - np.bincount(class_of, result, minlength=len(quotas)).astype(np.int64)
    order = np.lexsort((keys[: len(sizes)], -remainders, class_of))
    groups = np.bincount(class_of, minlength=len(quotas))
    rank = np.arange(len(order)) - (np.cumsum(groups) - groups)[class_of[order]]
    result[order[rank < short[class_of[order]]]] += 1
    return result
