"""Which of many hashes differ in few bits.

To differ in few bits is to agree in a band of them, so only hashes that share a band are compared (Manku, Jain and
Das Sarma 2007, https://doi.org/10.1145/1242572.1242592).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# Bits that may differ in the first and the second word. All pairs that differ in up to four bits of the first word
# agree in one of five bands of it, and most of those that differ in six.
MOST_BITS = (6, 16)
_BANDS = ((0, 13), (13, 13), (26, 13), (39, 13), (52, 12))  # first bit and bits
_MASKS = tuple(np.uint64(((1 << bits) - 1) << first) for first, bits in _BANDS)
_TOGETHER = 1 << 18  # comparisons
_PAIRS = 1 << 21  # given at a time, about
# As many pairs of an indexed hash are given for a band: thousands of equal hashes on both sides would make millions.
_CROWD = 128


class Near(NamedTuple):
    """Pairs of hashes that differ in few bits, each once: places in the index, and in what was asked for.

    crowded: places in the index that have more pairs, which are left out.
    """

    indexed: NDArray[np.int32]
    asked: NDArray[np.int32]
    crowded: NDArray[np.int32]


class HashIndex:
    """Hashes uint64 [n, 2] to search in."""

    def __init__(self, words: NDArray[np.uint64]) -> None:
        self._bands = [_Band.of(words, number) for number in range(len(_BANDS))]

    def near(self, words: NDArray[np.uint64]) -> Iterator[Near]:
        """Pairs of the index and of these hashes uint64 [m, 2]: all that differ in 0 .. 4 and 0 .. 16 bits of their
        words, and others that differ in 5 or 6 and 0 .. 16. Portion by portion, as they may be many."""
        found, count = [], 0
        for number, band in enumerate(self._bands):
            asking = _Band.of(words, number)
            for value in np.flatnonzero((np.diff(band.starts) > 0) & (np.diff(asking.starts) > 0)):
                here, there = band.bucket(value), asking.bucket(value)
                indexed, asked, crowded = _compare(band.words[here], asking.words[there], number)
                if len(indexed):
                    found.append(Near(band.order[here][indexed], asking.order[there][asked], band.order[here][crowded]))
                    count += len(indexed)
                if count >= _PAIRS:
                    yield _join(found)
                    found, count = [], 0
        if found:
            yield _join(found)


def _join(portions: list[Near]) -> Near:
    return Near(*(np.concatenate(places) for places in zip(*portions, strict=True)))


class _Band(NamedTuple):
    """Hashes sorted by one band of their first word: their order, and where each value of the band starts."""

    order: NDArray[np.int32]
    words: NDArray[np.uint64]
    starts: NDArray[np.int64]

    @classmethod
    def of(cls, words: NDArray[np.uint64], number: int) -> _Band:
        first, bits = _BANDS[number]
        values = ((words[:, 0] & _MASKS[number]) >> np.uint64(first)).astype(np.int64)
        order = np.argsort(values, kind="stable").astype(np.int32)
        starts = np.concatenate([[0], np.bincount(values, minlength=1 << bits).cumsum()])
        return cls(order, words[order], starts)

    def bucket(self, value: int) -> slice:
        return slice(self.starts[value], self.starts[value + 1])


def _compare(indexed: NDArray[np.uint64], asked: NDArray[np.uint64], band: int) -> Near:
    """Pairs of hashes that share a band and none before it, and differ in few bits."""
    room = np.full(len(indexed), _CROWD)
    full = np.zeros(len(indexed), bool)
    nothing = np.empty(0, np.int32)
    found = [(nothing, nothing)]
    rows = max(1, _TOGETHER // len(indexed))
    for start in range(0, len(asked), rows):
        part = asked[start : start + rows]
        differing = part[:, None, 0] ^ indexed[:, 0]
        row, column = np.nonzero(np.bitwise_count(differing) <= MOST_BITS[0])
        if not len(row):
            continue
        bits = differing[row, column]
        keep = np.bitwise_count(part[row, 1] ^ indexed[column, 1]) <= MOST_BITS[1]
        for mask in _MASKS[:band]:
            keep &= (bits & mask) != 0
        row, column = row[keep], column[keep]
        counts = np.bincount(column, minlength=len(indexed))
        if (counts > room).any():
            full |= counts > room
            order = np.argsort(column, kind="stable")
            before = counts.cumsum() - counts
            order = order[np.arange(len(order)) - before[column[order]] < room[column[order]]]
            row, column = row[order], column[order]
            counts = np.minimum(counts, room)
        room -= counts
        found.append((column, row + start))
        if not room.any():
            full |= start + rows < len(asked)
            break
    column, row = (np.concatenate(places) for places in zip(*found, strict=True))
    return Near(column, row, np.flatnonzero(full))
