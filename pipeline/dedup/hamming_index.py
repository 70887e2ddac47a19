"""Search for hashes that differ in few bits.

Hashes that differ in few bits agree in a band of them, so only hashes that share a band are compared (Manku, Jain and
Das Sarma 2007, https://doi.org/10.1145/1242572.1242592).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

# Bits that may differ in the first and the second word. All pairs that differ in up to four bits of the first word
# agree in one of five bands of it, and most of those that differ in six.
MAX_DISTANCE = (6, 16)
_BANDS = ((0, 13), (13, 13), (26, 13), (39, 13), (52, 12))  # first bit and number of bits
_CHUNK = 1 << 16  # comparisons at a time: their arrays fit into a core's cache


class HammingIndex:
    """Hashes uint64 [n, 2] to search in."""

    def __init__(self, hashes: NDArray[np.uint64]) -> None:
        self._hashes = hashes
        self._bands = []
        for band in _BANDS:
            keys = _keys(hashes, band)
            starts = np.concatenate([[0], np.bincount(keys, minlength=1 << band[1]).cumsum()])
            self._bands.append((np.argsort(keys, kind="stable"), starts))

    def search(self, queries: NDArray[np.uint64]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Find the pairs of an indexed hash and a query that differ in few bits.

        All pairs that differ in 0 .. 4 and 0 .. 16 bits of their words are found, and most of those that differ in 5
        or 6 bits of the first.

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
            # Candidate k is the one at `k - before` in the bucket of its query.
            first = starts[keys] - (ends - counts)
            for start in range(0, total, _CHUNK):
                candidates = np.arange(start, min(start + _CHUNK, total))
                low, high = np.searchsorted(ends, candidates[[0, -1]], "right")
                inside = np.minimum(ends[low : high + 1], candidates[-1] + 1) - start
                queried = np.repeat(np.arange(low, high + 1), np.diff(inside, prepend=0))
                indexed = order[candidates + first[queried]]
                differing = self._hashes[indexed, 0] ^ queries[queried, 0]
                close = np.flatnonzero(np.bitwise_count(differing) <= MAX_DISTANCE[0])
                indexed, queried, differing = indexed[close], queried[close], differing[close]
                close = np.bitwise_count(self._hashes[indexed, 1] ^ queries[queried, 1]) <= MAX_DISTANCE[1]
                for bit, bits in _BANDS[:number]:  # pairs that share an earlier band have been found there
                    close &= differing & np.uint64(((1 << bits) - 1) << bit) != 0
                yield indexed[close], queried[close]


def _keys(hashes: NDArray[np.uint64], band: tuple[int, int]) -> NDArray[np.int64]:
    """The bits of a band of the first word, int64 [n]."""
    first, bits = band
    return (hashes[:, 0] >> np.uint64(first) & np.uint64((1 << bits) - 1)).astype(np.int64)
