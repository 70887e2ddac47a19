"""A sorted set of positions as a bitmap: any of them is found by its rank."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

_WORD = 64  # bits


class Bitmap:
    """The positions 0 .. N-1 at which a mask is true, in ascending order. It takes a quarter of a byte per value.

    `bitmap[k]`, for k int64 [n] in any order, are the positions of the k-th true values, int64 [n].

    Args:
        masks: bool arrays, the pieces of the mask in order, each except the last of a multiple of 8 values.
    """

    def __init__(self, masks: Iterable[NDArray[np.bool_]]) -> None:
        bits = np.concatenate([np.empty(0, np.uint8), *(np.packbits(mask, bitorder="little") for mask in masks)])
        padded = np.zeros(-(-len(bits) // 8) * 8, np.uint8)
        padded[: len(bits)] = bits
        self._words = padded.view("<u8")
        counts = np.bitwise_count(self._words)
        self._starts = np.cumsum(counts, dtype=np.int64)
        self._count = int(self._starts[-1]) if len(counts) else 0
        self._starts -= counts  # true values before each word

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, ranks: NDArray[np.int64]) -> NDArray[np.int64]:
        words = np.searchsorted(self._starts, ranks, side="right") - 1
        bits, rest = self._words[words], ranks - self._starts[words]
        positions = words * _WORD
        # Binary search: of the bits that are left, is the true value in the lower or in the upper half?
        for half in (32, 16, 8, 4, 2, 1):
            lower = bits & np.uint64((1 << half) - 1)
            count = np.bitwise_count(lower)
            is_upper = rest >= count
            rest -= count * is_upper
            positions += half * is_upper
            bits = np.where(is_upper, bits >> np.uint64(half), lower)
        return positions
