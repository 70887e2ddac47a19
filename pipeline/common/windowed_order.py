"""The order of an epoch of a data set larger than memory: lanes, each with a window that slides over its units.

Any step is computed alone. Its time and memory grow with its batch, the number of units and the square root of the
window, and do not depend on the number of samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from pipeline.common.rng import BLOCK_STREAM, DELAY_STREAM, ORDER_STREAM, TABLE_STREAM, permutation, random_keys

# Allowed numbers of lanes. A number of ranks or hosts that divides the number of lanes reads whole lanes.
LANES = (48, 24, 12, 6, 4, 3, 2, 1)


class WindowedOrder:
    """The order of the M samples of an epoch, which are numbered 0 .. M-1 unit by unit.

    A batch has b positions. Lane l of L fills the positions b l // L .. b (l+1) // L - 1. It has the same share of
    the samples in every epoch. In each epoch, a lane reads its units in a new random order, and draws its samples from
    a window that slides over them (`_Interleaver`).

    Args:
        bounds: int64 [U + 1], samples of the epoch before each of U units, and M = steps * batch_size.
        steps: Number of batches.
        batch_size: Samples of a batch, b.
        window: Number of samples from which those of a batch are drawn.
        lanes: Number of lanes, L, at most b and 48.
        seed: Seed of the order.
        epoch: Number of the epoch.
    """

    def __init__(
        self,
        bounds: NDArray[np.int64],
        *,
        steps: int,
        batch_size: int,
        window: int,
        lanes: int,
        seed: int,
        epoch: int,
    ) -> None:
        self._bounds = bounds
        self._steps = steps
        self._lanes = lanes
        self._seed = seed
        self._epoch = epoch
        self._first_position = batch_size * np.arange(lanes + 1) // lanes  # of each lane
        self._share = np.diff(self._first_position)  # of a batch, of each lane: two numbers at most
        self._interleavers = {
            share: _Interleaver(steps * share, window * share // batch_size, seed, epoch)
            for share in np.unique(self._share).tolist()
        }

    def numbers(self, steps: range, positions: NDArray[np.int64], repeats: int = 1) -> NDArray[np.int64]:
        """Return samples of consecutive batches.

        Args:
            steps: n steps.
            positions: int64 [m], positions in a batch.
            repeats: Consecutive positions of a lane that have the same sample.

        Returns:
            int64 [n, m].
        """
        lane = np.searchsorted(self._first_position, positions, side="right") - 1
        result = np.empty((len(steps), len(positions)), np.int64)
        for share, interleaver in self._interleavers.items():
            columns = np.flatnonzero(self._share[lane] == share)
            if len(columns):
                lanes, row = np.unique(lane[columns], return_inverse=True)
                within = positions[columns] - self._first_position[lane[columns]]
                places = (np.array(steps)[:, None] * share + within) // repeats
                first, stop = steps.start * share // repeats, places.max() + 1
                result[:, columns] = interleaver.numbers(first, stop, lanes)[row, places - first]
        result += (self._first_position * self._steps)[lane]
        offsets, shifts, *_ = self._segments
        return result + shifts[np.searchsorted(offsets, result, side="right") - 1]

    def unit_uses(self, positions: slice, first: int = 0, repeats: int = 1) -> Iterator[tuple[int, int, int]]:
        """Iterate over the units that are read from step `first` on, by their first step.

        Args:
            positions: The positions of a rank in a batch. All units of a lane that ranks share are returned.
            first: The first step.
            repeats: As in `numbers`.

        Yields:
            Number of the unit, and the first and the last step that may read it.
        """
        offsets, _, lengths, lane, unit = self._segments
        lanes = np.searchsorted(self._first_position, [positions.start, positions.stop - 1], side="right") - 1
        is_chosen = (lanes[0] <= lane) & (lane <= lanes[1])
        starts, ends = np.empty_like(offsets), np.empty_like(offsets)
        for share, interleaver in self._interleavers.items():
            mine = np.flatnonzero(is_chosen & (self._share[lane] == share))
            begin = offsets[mine] - self._first_position[lane[mine]] * self._steps
            start, end = interleaver.places(begin, begin + lengths[mine] - 1)
            starts[mine], ends[mine] = start * repeats // share, -(-end * repeats // share)
        # Two lanes share a unit in which one ends and the next begins.
        chosen = np.flatnonzero(is_chosen)
        chosen = chosen[np.argsort(unit[chosen], kind="stable")]
        each = np.flatnonzero(np.diff(unit[chosen], prepend=-1))
        starts = np.maximum(np.minimum.reduceat(starts[chosen], each), first)
        ends = np.minimum(np.maximum.reduceat(ends[chosen], each), self._steps)
        for number in np.argsort(starts, kind="stable").tolist():
            if starts[number] < ends[number]:
                yield int(unit[chosen][each[number]]), int(starts[number]), int(ends[number]) - 1

    @cached_property
    def _segments(self) -> tuple[NDArray[np.int64], ...]:
        """Parts of units in lanes, in the order of the epoch: offset, number - offset, length, lane and unit."""
        lane_bounds = self._first_position * self._steps
        cuts = np.sort(np.concatenate([self._bounds, lane_bounds]), kind="stable")
        lengths = np.diff(cuts)
        begins, lengths = cuts[:-1][lengths > 0], lengths[lengths > 0]
        unit = np.searchsorted(self._bounds, begins, side="right") - 1
        lane = np.searchsorted(lane_bounds, begins, side="right") - 1
        keys = random_keys(self._seed, BLOCK_STREAM + self._epoch, len(self._bounds))[unit]
        order = np.argsort((lane.astype(np.uint64) << np.uint64(58)) | (keys >> np.uint64(6)))
        offsets = np.cumsum(lengths[order]) - lengths[order]
        return offsets, begins[order] - offsets, lengths[order], lane[order], unit[order]


class _Interleaver:
    """A permutation of 0 .. count-1 that moves each number by less than a window.

    The numbers are divided into frames of k. Each frame is divided at random into D groups; group x has
    k (x+1) // D - k x // D numbers and is delayed by x periods. The numbers of a period are permuted (a convolutional
    interleaver, Forney 1971, https://doi.org/10.1109/TCOM.1971.1090719). Periods have k numbers, and fewer at both
    ends. The last frame may be shorter.

    Args:
        count: How many numbers there are.
        window: Upper bound of D k.
        seed: Seed of the permutations.
        epoch: Number of the epoch.
    """

    def __init__(self, count: int, window: int, seed: int, epoch: int) -> None:
        self._seed = seed
        self._epoch = epoch
        window = max(1, min(window, count))
        self._delay_count = math.isqrt(window)
        self._size = window // self._delay_count  # of a frame
        self._frames, self._rest = divmod(count, self._size)

    def places(self, first: NDArray[np.int64], last: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return start and stop of the places at which numbers first .. last may be."""
        return self._starts(first // self._size), self._starts(last // self._size + self._delay_count)

    def numbers(self, first: int, stop: int, lanes: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return int64 [lanes, places], the numbers at places first .. stop-1. Each lane has its own permutation."""
        delays = self._delay_count
        place = np.arange(first, stop)
        # Place p is in one of the periods p // k .. p // k + D, so no other period has to be computed.
        oldest = first // self._size
        starts = self._starts(np.arange(oldest, (stop - 1) // self._size + delays + 2))
        at = np.searchsorted(starts, place, side="right") - 1
        period = at + oldest
        lengths, which = np.unique(np.diff(starts[at[0] : at[-1] + 2]), return_inverse=True)
        words = self._words(ORDER_STREAM, lanes, period[0], period[-1])[:, period - period[0]]
        slot = self._permute(place - starts[at], words, lengths, which[at - at[0]])
        # The slots of a period hold the group of the last frame, then those of whole frames by their delay.
        past = period - self._frames
        earlier, of_last = self._before(past, self._rest), self._before(past + 1, self._rest)
        is_last = slot < of_last - earlier
        number = slot + np.where(is_last, earlier, self._before(past + 1, self._size) - of_last + earlier)
        delay = np.where(is_last, past, ((number + 1) * delays - 1) // self._size)
        oldest = max(0, period[0] - delays + 1)
        frame = period - delay
        words = self._words(DELAY_STREAM, lanes, oldest, period[-1])
        words = words[np.arange(len(lanes))[:, None], frame - oldest]
        result = self._permute(number, words, np.array([self._size]))
        if is_last.any():
            result[is_last] = self._permute(number[is_last], words[is_last], np.array([self._rest]))
        return frame * self._size + result

    def _starts(self, periods: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the number of places before each of these periods, for any number from 0 on."""
        past = np.maximum(periods - self._frames, 0)
        return self._endless_starts(periods) - self._endless_starts(past) + self._before(past, self._rest)

    def _endless_starts(self, periods: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the number of places before periods of an endless sequence of frames."""
        full = np.maximum(periods - self._delay_count, 0)
        return self._first_starts[np.minimum(periods, self._delay_count)] + full * self._size

    @cached_property
    def _first_starts(self) -> NDArray[np.int64]:
        """Number of places before each of the periods 0 .. D."""
        return np.cumsum(self._before(np.arange(self._delay_count + 1), self._size))

    def _before(self, delays: NDArray[np.int64], size: int) -> NDArray[np.int64]:
        """Return how many numbers of a frame of `size` numbers have smaller delays."""
        return np.clip(delays, 0, self._delay_count) * size // self._delay_count

    def _words(self, stream: int, lanes: NDArray[np.int64], first: int, last: int) -> NDArray[np.uint64]:
        """Return a random word for each lane and each period or frame first .. last, uint64 [lanes, n]."""
        width = -(-LANES[0] // 4) * 4
        words = random_keys(self._seed, stream + self._epoch, (last - first + 1) * width, first * width)
        return words.reshape(-1, width).T[lanes]

    def _permute(
        self,
        numbers: NDArray[np.int64],
        words: NDArray[np.uint64],
        counts: NDArray[np.int64],
        which: NDArray[np.int64] | int = 0,
    ) -> NDArray[np.int64]:
        """Permute numbers 0 .. count-1, each by the permutation of its word: two rotations of two random tables.

        Args:
            numbers: int64 [n] or [lanes, n].
            words: uint64 [n] or [lanes, n].
            counts: int64 [c].
            which: int64 [n], the position in `counts` of the count of each number.
        """
        tables = zip(*(_tables(count, self._size, self._seed, self._epoch) for count in counts.tolist()), strict=True)
        first, second = (np.concatenate(each) for each in tables)
        start, count = 2 * (np.cumsum(counts) - counts)[which], counts[which].astype(np.uint64)
        low, high = words & np.uint64(0xFFFFFFFF), words >> np.uint64(32)
        rotations = [start + (half * count >> np.uint64(32)).astype(np.int64) for half in (low, high)]
        return second[first[numbers + rotations[0]] + rotations[1]].astype(np.int64)


@lru_cache(maxsize=8)
def _tables(count: int, size: int, seed: int, epoch: int) -> tuple[NDArray[np.int32], ...]:
    """Return two random permutations of 0 .. count-1, int32 [2 * count], each twice in a row.

    They are the order of these numbers in two permutations of 0 .. size-1.
    """
    if count < size:
        tables = [table[:size][table[:size] < count] for table in _tables(size, size, seed, epoch)]
    else:
        draws = (permutation(size, seed, TABLE_STREAM + 2 * epoch + number) for number in range(2))
        tables = [table.astype(np.int32) for table in draws]
    return tuple(np.concatenate([table, table]) for table in tables)
