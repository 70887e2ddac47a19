"""A sorted set of positions as a bitmap: any of them is found by its rank."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

_WORD = 64  # bits
# The number of the k-th set bit of a byte, uint8 [256, 8].
_SELECT = np.array([([bit for bit in range(8) if byte >> bit & 1] + [0] * 8)[:8] for byte in range(256)], np.uint8)


class Bitmap:
    """The positions 0 .. N-1 at which a mask is true, in ascending order. It takes a quarter of a byte per value.

    `bitmap[k]`, for k int64 [n] in any order, are the positions of the k-th true values, int64 [n].

    Args:
        masks: bool arrays, the pieces of the mask in order, each except the last of a multiple of 8 values.
    """

    def __init__(self, masks: Iterable[NDArray[np.bool_]]) -> None:
        bits = np.concatenate([np.empty(0, np.uint8), *(np.packbits(mask, bitorder="little") for mask in masks)])
        words = np.zeros(-(-len(bits) // 8) * 8, np.uint8)
        words[: len(bits)] = bits
        self._words = words.reshape(-1, _WORD // 8)
        counts = np.bitwise_count(self._words.view(np.uint64)[:, 0])
        self._starts = np.cumsum(counts, dtype=np.int64)
        self._starts -= counts  # true values before each word

    def __len__(self) -> int:
        return int(self._starts[-1]) + int(np.bitwise_count(self._words[-1]).sum()) if len(self._words) else 0

    def __getitem__(self, ranks: NDArray[np.int64]) -> NDArray[np.int64]:
        words = np.searchsorted(self._starts, ranks, side="right") - 1
        octets = self._words[words]
        rest = ranks - self._starts[words]
        counts = np.cumsum(np.bitwise_count(octets), axis=1, dtype=np.uint8)
        octet = (counts <= rest[:, None]).sum(axis=1)
        each = np.arange(len(ranks))
        rest -= np.where(octet > 0, counts[each, octet - 1], 0)
        return words * _WORD + octet * 8 + _SELECT[octets[each, octet], rest]
