"""Stratified subsets of the samples of a store: parts for validation, folds and fractions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.common.index_ranges import IndexRanges, Positions
from pipeline.common.rng import (
    BALANCE_STREAM,
    FOLD_STREAM,
    PARTITION_STREAM,
    IndexPermutation,
    permutation,
    random_keys,
)
from pipeline.common.stratified import stratified_folds, stratified_mask, stratified_quotas
from shards.errors import corrupt_shard
from shards.manifest import LABELS
from shards.stores.base import Store

_MAX_SORTED = 1 << 22  # samples of a store whose subsets are drawn by sorting random numbers
_CHUNK = 1 << 18  # labels that are read at once


@dataclass(frozen=True, eq=False)
class LabelledSamples:
    """Samples of a store with the number of samples of each class.

    The samples of a large store are in random order already, so a subset takes consecutive samples of each class from a
    random position on. It is described by few ranges, and only the labels of a part of the store are read.

    Attributes:
        labels: [N], class of every sample of the store, 0 .. C-1.
        samples: Positions in the store.
        counts: int64 [C], samples of each class.
        is_shuffled: Whether the samples of the store are in random order.
    """

    labels: NDArray[Any]
    samples: Positions
    counts: NDArray[np.int64]
    is_shuffled: bool

    @classmethod
    def of(cls, store: Store) -> LabelledSamples:
        """Return all samples of a store."""
        # `shards.index` keeps the order of existing shards of image files.
        is_shuffled = not store.manifest.encoded
        return cls(store.labels, IndexRanges.first(len(store)), np.array(store.manifest.counts), is_shuffled)

    def __len__(self) -> int:
        return len(self.samples)

    def split(self, fraction: float, seed: int) -> tuple[LabelledSamples, LabelledSamples]:
        """Choose a fraction of the samples with the classes in proportion, as `stratified_mask` does.

        Returns:
            The chosen samples and the others.
        """
        if not self._is_large:
            return self._divide(stratified_mask(self.labels[self.samples], fraction, seed))
        quotas = stratified_quotas(self.counts, fraction)
        if 2 * quotas.sum() <= len(self):
            return self._between(np.zeros_like(quotas), quotas, seed, PARTITION_STREAM)
        others, chosen = self._between(np.zeros_like(quotas), self.counts - quotas, seed, PARTITION_STREAM)
        return chosen, others

    def fold(self, number: int, folds: int, seed: int) -> tuple[LabelledSamples, LabelledSamples]:
        """Return part `number` (from 0) of a cross-validation, as by `stratified_folds`, and the other samples."""
        if not self._is_large:
            return self._divide(stratified_folds(self.labels[self.samples], folds, seed, FOLD_STREAM) == number)
        # The samples sorted by class are assigned to the parts in turn: count those of earlier parts in each class.
        ends = np.cumsum(self.counts)
        first, stop = (
            np.diff([end // folds * part + np.minimum(end % folds, part) for end in (ends - self.counts, ends)], axis=0)
            for part in (number, number + 1)
        )
        return self._between(first[0], stop[0], seed, FOLD_STREAM)

    @property
    def _is_large(self) -> bool:
        return self.is_shuffled and len(self.labels) > _MAX_SORTED

    def _divide(self, is_chosen: NDArray[np.bool_]) -> tuple[LabelledSamples, LabelledSamples]:
        chosen, others = (self.samples[np.flatnonzero(mask)] for mask in (is_chosen, ~is_chosen))
        counts = np.bincount(self.labels[chosen], minlength=len(self.counts))
        return replace(self, samples=chosen, counts=counts), replace(self, samples=others, counts=self.counts - counts)

    def _between(
        self, first: NDArray[np.int64], stop: NDArray[np.int64], seed: int, stream: int
    ) -> tuple[LabelledSamples, LabelledSamples]:
        """Choose samples first .. stop-1 of each class (int64 [C]), in a cyclic order from a random sample on."""
        assert isinstance(self.samples, IndexRanges)
        start, count = int(random_keys(seed, stream, 1)[0] % np.uint64(max(1, len(self)))), len(self)
        seen = np.zeros(len(self.counts), np.int64)  # samples of each class so far
        parts = [IndexRanges.first(0)]
        for begin, end in ((start, count), (0, start)):
            for chunk in range(begin, end, _CHUNK):
                if ((seen >= stop) | (first == stop)).all():
                    break
                positions = self.samples[chunk : min(chunk + _CHUNK, end)]
                labels = self.labels[positions]
                if labels.max(initial=0) >= len(seen):
                    raise corrupt_shard(LABELS, f"a label outside 0 .. {len(seen) - 1}")
                here = np.bincount(labels, minlength=len(seen))
                if ((seen < first) | (seen + here > stop))[here > 0].any():
                    number = np.empty(len(labels), np.int64)
                    number[np.argsort(labels, kind="stable")] = _consecutive(seen, here)
                    positions = positions[(first[labels] <= number) & (number < stop[labels])]
                parts.append(IndexRanges.of(positions))
                seen += here
        chosen, counts = IndexRanges.symmetric_difference(*parts), stop - first
        others = IndexRanges.symmetric_difference(self.samples, chosen)
        return replace(self, samples=chosen, counts=counts), replace(self, samples=others, counts=self.counts - counts)


class SamplesByClass:
    """Samples sorted by class, in a fixed random order within each.

    Args:
        samples: The samples.
        seed: Seed of the order.

    Attributes:
        samples: uint32 or int64 [N].
        counts: int64 [C], samples of each class.
    """

    def __init__(self, samples: LabelledSamples, seed: int) -> None:
        count, self.counts = len(samples), samples.counts
        sort = permutation if count <= _MAX_SORTED else IndexPermutation
        order = sort(count, seed, BALANCE_STREAM)
        is_short = len(samples.labels) < 1 << 32  # the sampler also converts the end, one past the last sample
        self.samples: NDArray[np.integer] = np.empty(count, np.uint32 if is_short else np.int64)
        place = np.cumsum(self.counts) - self.counts
        for start in range(0, count, _CHUNK):
            positions = samples.samples[order[np.arange(start, min(start + _CHUNK, count))]]
            labels = samples.labels[positions]
            here = np.bincount(labels, minlength=len(place))
            self.samples[_consecutive(place, here)] = positions[np.argsort(labels, kind="stable")]
            place += here

    def draw(self, drawn: NDArray[np.int64], epoch: int) -> NDArray[np.integer]:
        """Return the samples of an epoch, sorted, if each epoch takes `drawn` (int64 [C]) of each class in turn."""
        result = np.empty(drawn.sum(), self.samples.dtype)
        ends, result_ends = np.cumsum(self.counts), np.cumsum(drawn)
        for label in np.flatnonzero(drawn).tolist():
            number, count = int(drawn[label]), int(self.counts[label])
            own = self.samples[ends[label] - count : ends[label]]
            out = result[result_ends[label] - number : result_ends[label]]
            np.take(own, epoch * number % count + np.arange(number), mode="wrap", out=out)
        result.sort()
        return result


def _consecutive(starts: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return `counts` consecutive numbers from each of `starts` on."""
    return np.repeat(starts - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())
