"""Index for the search of hashes that differ in few bits.

Hashes that differ in few bits are equal in at least one band of bits, so only hashes that share a band are compared
(Manku, Jain and Das Sarma 2007, https://doi.org/10.1145/1242572.1242592).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

# Maximum number of different bits in the first and the second word. All pairs with up to four different bits in the
# first word, and most pairs with six, share one of its five bands.
MAX_DISTANCE = (6, 16)
_BANDS = ((0, 13), (13, 13), (26, 13), (39, 13), (52, 12))  # first bit and number of bits
_CHUNK = 1 << 16  # comparisons at a time; their arrays fit into the cache of a core


class HammingIndex:
    """Index of hashes, uint64 [n, 2]."""

    def __init__(self, hashes: NDArray[np.uint64]) -> None:
        self._hashes = hashes
        self._bands = []
        for band in _BANDS:
            keys = _keys(hashes, band)
            starts = np.concatenate([[0], np.bincount(keys, minlength=1 << band[1]).cumsum()])
            self._bands.append((np.argsort(keys, kind="stable"), starts))

    def search(self, queries: NDArray[np.uint64]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Find the pairs of an indexed hash and a query that differ in few bits.

        All pairs that differ in at most 4 and 16 bits of their words are found, and most pairs that differ in 5 or 6
        bits of the first word.

        Args:
            queries: uint64 [m, 2].

        Yields:
            Positions int64 [k] in the index and in the queries, in chunks; each pair once.
        """
        for number, (order, starts) in enumerate(self._bands):
            keys = _keys(queries, _BANDS[number])
            counts = np.diff(starts)[keys]
            ends = counts.cumsum()
            total = int(ends[-1]) if len(ends) else 0
            # Offset of candidate 0 of each query in `order`, minus the number of candidates of all earlier queries.
            first = starts[keys] - (ends - counts)
            for start in range(0, total, _CHUNK):
                candidates = np.arange(start, min(start + _CHUNK, total))
                low, high = np.searchsorted(ends, candidates[[0, -1]], "right")
                inside = np.minimum(ends[low : high + 1], candidates[-1] + 1) - start
                queried = np.repeat(np.arange(low, high + 1), np.diff(inside, prepend=0))
                indexed = order[candidates + first[queried]]
                differing = self._hashes[indexed, 0] ^ queries[queried, 0]
                is_close = np.flatnonzero(np.bitwise_count(differing) <= MAX_DISTANCE[0])
                indexed, queried, differing = indexed[is_close], queried[is_close], differing[is_close]
                is_close = np.bitwise_count(self._hashes[indexed, 1] ^ queries[queried, 1]) <= MAX_DISTANCE[1]
                for bit, bits in _BANDS[:number]:  # skip pairs that an earlier band has returned
                    is_close &= differing & np.uint64(((1 << bits) - 1) << bit) != 0
                yield indexed[is_close], queried[is_close]


def _keys(hashes: NDArray[np.uint64], band: tuple[int, int]) -> NDArray[np.int64]:
    """Bits of a band of the first word, int64 [n]."""
    first, bits = band
    return (hashes[:, 0] >> np.uint64(first) & np.uint64((1 << bits) - 1)).astype(np.int64)
