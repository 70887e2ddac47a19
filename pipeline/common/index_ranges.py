"""Sets of positions whose memory is proportional to their number of ranges."""

from __future__ import annotations

from functools import cached_property
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shards.errors import UserError


class IndexRanges:
    """Increasing positions, stored as ranges. Replaces an increasing int64 array where that would be long.

    Args:
        bounds: int64 [2 R], strictly increasing: start and stop of each range.
    """

    def __init__(self, bounds: NDArray[np.int64]) -> None:
        self.bounds = bounds
        self._starts = bounds[::2]
        self._ends = np.cumsum(bounds[1::2] - bounds[::2])  # numbers of positions up to the end of each range

    @classmethod
    def first(cls, count: int) -> IndexRanges:
        """Return 0 .. count-1."""
        return cls(np.array([0, count] if count else [], np.int64))

    @classmethod
    def of(cls, positions: NDArray[np.int64]) -> IndexRanges:
        """Return the set of strictly increasing positions, int64 [n]."""
        is_start = np.diff(positions, prepend=-2) != 1
        is_last = np.append(is_start[1:], True)[: len(positions)]
        return cls(np.stack([positions[is_start], positions[is_last] + 1], axis=1).reshape(-1))

    @classmethod
    def symmetric_difference(cls, *sets: IndexRanges) -> IndexRanges:
        """Return the positions in an odd number of sets: the union of disjoint sets, the difference of a subset."""
        bounds, counts = np.unique(np.concatenate([each.bounds for each in sets]), return_counts=True)
        return cls(bounds[counts % 2 == 1])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, numbers: NDArray[np.int64] | slice) -> NDArray[np.int64]:
        """Return positions by number: the k-th in increasing order for each k of `numbers`, int64 [n]."""
        if isinstance(numbers, slice):
            numbers = np.arange(*numbers.indices(len(self)))
        if len(self._starts) == 1:
            return numbers + self._starts[0]
        return numbers + self._shifts[np.searchsorted(self._ends, numbers, side="right")]

    @cached_property
    def _shifts(self) -> NDArray[np.int64]:
        return self._starts - np.r_[0, self._ends[:-1]]

    def searchsorted(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Count the positions of the set below each of the given ones, int64 [n]."""
        bound = np.searchsorted(self.bounds, positions, side="right")
        before, inside = np.divmod(bound, 2)
        return np.r_[0, self._ends][before] + inside * (positions - np.r_[self.bounds, 0][bound - 1])

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> NDArray[np.int64]:
        return self[:] if dtype is None else self[:].astype(dtype)


Positions: TypeAlias = NDArray[np.int64] | IndexRanges
"""Increasing positions, which are indexed by their numbers."""


def as_positions(samples: Positions | ArrayLike) -> Positions:
    """Return the positions of samples [n], such as an array or a list, as int64.

    Raises:
        UserError: They are not integers, or not one-dimensional. A boolean mask would become the positions 0 and 1.
    """
    if isinstance(samples, IndexRanges):
        return samples
    array = np.asarray(samples)
    if (array.dtype.kind not in "iu" and array.size) or array.ndim != 1:
        raise UserError(
            found=f"samples of type {array.dtype} {list(array.shape)}",
            expected="the positions of samples, integers [n]",
            hint="for a mask: np.flatnonzero(mask)",
        )
    return array.astype(np.int64, copy=False)
