"""Stratified random subsets of labelled samples."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from pipeline.common.rng import PARTITION_STREAM, random_keys

_PIECE = 1 << 16  # samples at a time
_MARGIN = 8  # standard deviations


def stratified_mask(labels: NDArray[np.int64], fraction: float, seed: int) -> NDArray[np.bool_]:
    """Choose a fraction of the samples, with the classes in proportion. A pure function of its arguments.

    Every class contributes its fraction rounded down, and the classes with the largest remainders one sample more. No
    class contributes its last sample as long as others have some.

    Args:
        labels: int64 [N], any integers.
        fraction: 0 .. 1.
        seed: The seed of the choice.

    Returns:
        A mask bool [N] of round(fraction * N) chosen samples.
    """
    _, classes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    quotas = stratified_quotas(counts, fraction)
    pieces = iterate_stratified_mask(classes, counts, quotas, seed, PARTITION_STREAM)
    return np.concatenate([np.empty(0, bool), *pieces])


def iterate_stratified_mask(
    strata: NDArray[np.int64],
    sizes: NDArray[np.int64],
    quotas: NDArray[np.int64],
    seed: int,
    stream: int,
) -> Iterator[NDArray[np.bool_]]:
    """Choose samples at random, a given number of each stratum, in memory that hardly grows with their number.

    The samples with the smallest random words of their stratum are chosen. For uniform words, the largest of them is
    known up to a few standard deviations; only the words near it are sorted.

    Args:
        strata: The stratum of each sample, int64 [N], 0 .. S-1. It is read repeatedly, slice by slice, so it may be
            computed.
        sizes: The number of samples of each stratum, int64 [S].
        quotas: The number of samples to choose from each, int64 [S].
        seed: The seed of the choice.
        stream: The stream of the seed; choices of different streams are independent.

    Yields:
        The pieces of the mask in order, each except the last of a multiple of 64 values.
    """
    count = int(sizes.sum())
    pieces = [slice(first, min(first + _PIECE, count)) for first in range(0, count, _PIECE)]
    fraction = quotas / np.maximum(sizes, 1)
    spread = np.sqrt(fraction * (1 - fraction) / np.maximum(sizes, 1)) + 2 / np.maximum(sizes, 1)
    margin = _MARGIN * spread

    def words(piece: slice) -> tuple[NDArray[np.uint64], NDArray[np.floating]]:
        keys = random_keys(seed, stream, piece.stop - piece.start, piece.start)
        return keys, (keys >> np.uint64(11)) * 2.0**-53

    while True:
        low, high = fraction - margin, fraction + margin
        below = np.zeros(len(sizes), np.int64)
        near: list[tuple[NDArray, ...]] = [(np.empty(0, np.int64), np.empty(0, np.uint64), np.empty(0, np.int64))]
        for piece in pieces:
            own = strata[piece]
            keys, numbers = words(piece)
            is_below = numbers < low[own]
            below += np.bincount(own[is_below], minlength=len(sizes))
            inside = np.flatnonzero(~is_below & (numbers <= high[own]))
            near.append((own[inside], keys[inside], inside + piece.start))
        near_strata, near_keys, positions = map(np.concatenate, zip(*near, strict=True))
        found, rest = np.bincount(near_strata, minlength=len(sizes)), quotas - below
        if ((rest >= 0) & (rest <= found)).all():
            break
        margin *= 8
    # Sort by stratum, then at random within it. The rank of a sample is its position minus the start of the stratum.
    by_stratum = np.lexsort((near_keys, near_strata))
    rank = np.arange(len(by_stratum)) - (np.cumsum(found) - found)[near_strata[by_stratum]]
    chosen = np.sort(positions[by_stratum[rank < rest[near_strata[by_stratum]]]])
    for piece in pieces:
        mask = words(piece)[1] < low[strata[piece]]
        start, stop = np.searchsorted(chosen, (piece.start, piece.stop))
        mask[chosen[start:stop] - piece.start] = True
        yield mask


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
    order = np.lexsort((-remainders, quotas + 1 >= counts, counts == 0))
    quotas[order[: max(short, 0)]] += 1
    return quotas


def group_quotas(
    classes: NDArray[np.int64], within: NDArray, quotas: NDArray[np.int64], seed: int, stream: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Divide the samples of each class into groups, and the quotas in proportion.

    Args:
        classes: int64 [N], 0 .. classes-1.
        within: [N], the group of each sample.
        quotas: The number of samples to choose from each class, int64 [classes].
        seed: The seed of the choice.
        stream: The stream of the seed.

    Returns:
        The stratum of each sample, int64 [N]; and of each stratum its size and its quota.
    """
    _, groups = np.unique(within, return_inverse=True)
    width = int(groups.max(initial=0)) + 1
    pairs, strata, sizes = np.unique(classes * width + groups, return_inverse=True, return_counts=True)
    class_of = pairs // width  # class of each stratum, ascending
    shares, remainders = np.divmod(quotas[class_of] * sizes, np.bincount(classes, minlength=len(quotas))[class_of])
    short = quotas - np.bincount(class_of, shares, minlength=len(quotas)).astype(np.int64)
    # Ties are broken at random: with one sample per group, the first groups would always be chosen.
    order = np.lexsort((random_keys(seed, stream, len(sizes)), -remainders, class_of))
    groups_of = np.bincount(class_of, minlength=len(quotas))
    rank = np.arange(len(order)) - (np.cumsum(groups_of) - groups_of)[class_of[order]]
    shares[order[rank < short[class_of[order]]]] += 1
    return strata, sizes, shares
