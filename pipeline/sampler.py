"""Batch samplers: the samples of a batch are a pure function of (seed, epoch, step).

Resuming within an epoch therefore needs no stored state, and the order is the same on any number of ranks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from pipeline.common.index_ranges import Positions, as_positions
from pipeline.common.labelled_samples import SamplesByClass
from pipeline.common.rng import LEFT_OUT_STREAM, IndexPermutation, random_keys
from pipeline.common.windowed_order import LANES, WindowedOrder
from pipeline.transforms.augmentation import Augmentation, AugmentationParams
from shards.errors import UserError
from shards.manifest import Manifest
from shards.stores.base import ShardUse

_FIRST_INDICES = 1 << 9  # of a rank that are computed together at first
_INDICES_AT_ONCE = 1 << 16  # after that
_MAX_UNITS = 1 << 14  # of a windowed order
_BLOCKS_PER_LANE = 32  # of the window: each lane needs a block or two in addition to its share
_UNITS_PER_LANE = 2  # of the window: with fewer, the same units of different lanes would often be read together
SAMPLER_VERSION = 3  # increases when a state that was saved within an epoch would continue with other batches
_Batches: TypeAlias = Callable[[range, NDArray[np.int64]], NDArray[np.int64]]


@dataclass(frozen=True)
class BatchIndices:
    """The samples that one rank loads in one step.

    Attributes:
        step: Number of the step within the epoch, from 0.
        samples: int64 [n], positions in the store.
        global_size: Samples of the step over all ranks.
        params: Augmentation parameters of the n samples; None without augmentation.
    """

    step: int
    samples: NDArray[np.int64]
    global_size: int
    params: AugmentationParams | None = None


@dataclass(frozen=True, eq=False)
class ShuffledBatchSampler:
    """A new permutation in each epoch, split into global batches of one size that are divided evenly among the ranks.

    An epoch of N samples has the smallest number of batches that `batch_size` allows, S = ceil(N / batch_size), and
    each of them has N // S samples. The remaining N % S samples, fewer than one per batch, are left out, and all others
    occur once. Epochs leave out consecutive parts of one fixed permutation, so after any number of epochs two samples
    have been used equally often or one of them once more.

    With a shuffle window, the order is a `WindowedOrder` of units, which are consecutive blocks. Every batch takes
    equally many samples from each of a fixed number of lanes, which own a fixed share of the samples, so a number of
    ranks that divides the number of lanes divides the data set. Each unit is read once per epoch. Batches come from a
    window of units that slides, so the whole window never has to be read at once.

    With repeated augmentation (Hoffer et al. 2020, https://arxiv.org/abs/1901.09335), each sample of the order fills
    several consecutive positions, with an augmentation of its own at each. The number of batches stays the same, so an
    epoch uses the first part of its order.

    With class-balanced sampling (Kang et al. 2020, https://arxiv.org/abs/1910.09217, equation 1), an epoch of as many
    samples has a fixed number of them from each class, proportional to n^(1 - class_balance) for a class of n samples.
    Each class goes through its samples in a fixed random order, and an epoch continues where the one before it ended,
    so the numbers of times that two samples of a class were used differ by at most one. Repeated augmentation uses only
    the first part of this order, so both hold on average.

    Attributes:
        samples: The N positions in the store of the samples of an epoch.
        batch_size: Maximum number of samples of a global batch.
        seed: Seed of the permutations and of the augmentation.
        block_size: Samples of a block of the store.
        shuffle_window_blocks: Blocks from which samples are drawn at a time; None for a uniform permutation.
        augmentation: Augmentation whose parameters are sampled; None for none.
        left_out_offset: Position in the permutation at which epoch 0 starts to leave samples out.
        repeats: Consecutive positions of each sample.
        by_class: The samples by class, for class-balanced sampling.
        class_balance: 0 for every sample once, 1 for equally many samples of each class.
        unit_bounds: int64 [U + 1], positions at which the units of a windowed order begin, and the end of the last one;
            None for at most 16,384 units of 1, 2, 4, ... blocks.
    """

    samples: Positions
    batch_size: int
    seed: int
    block_size: int = 1
    shuffle_window_blocks: int | None = None
    augmentation: Augmentation | None = None
    left_out_offset: int = 0
    repeats: int = 1
    by_class: SamplesByClass | None = None
    class_balance: float = 0.0
    unit_bounds: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "samples", as_positions(self.samples))
        if not len(self.samples):
            raise UserError(
                found="a sampler of no samples", expected="at least one sample", hint="check the selection of samples"
            )

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.samples) // self.batch_size)

    @property
    def left_out(self) -> int:
        """Number of samples that an epoch leaves out."""
        return len(self.samples) % self.steps_per_epoch

    @property
    def can_fuse(self) -> bool:
        """Whether several steps may be computed in one call; a shuffle window's memory bound allows one batch."""
        return self.shuffle_window_blocks is None

    def steps(self, epoch: int, rank: int, world_size: int, first: int = 0) -> Iterator[BatchIndices]:
        """Iterate over the steps of an epoch from number `first` on, with the samples of one rank."""
        size, steps = equal_batch_size(len(self.samples), self.batch_size), self.steps_per_epoch
        local = _share_of_rank(size, rank, world_size)
        positions = np.arange(local.start, local.stop)
        batches = self._uniform(epoch) if self.shuffle_window_blocks is None else self._windowed(epoch)
        indices = _FIRST_INDICES
        while first < steps:
            stop = min(first + max(1, indices // max(1, len(positions))), steps)
            for step, batch in zip(range(first, stop), batches(range(first, stop), positions), strict=True):
                params = self.augmentation.sample_params(self.seed, epoch, step, local) if self.augmentation else None
                yield BatchIndices(step, batch, size, params)
            first, indices = stop, _INDICES_AT_ONCE

    def shard_uses(
        self, epoch: int, rank: int, world_size: int, first: int, shard_bounds: NDArray[np.int64]
    ) -> Iterator[ShardUse]:
        """Iterate over the shards that a rank reads from step `first` on, by their first step; see `Store.prefetch`.

        None are listed without a shuffle window, because every batch may then read any shard. All shards of a lane
        that ranks share are listed for each of these ranks.
        """
        if self.shuffle_window_blocks is None:
            return
        units, _ = self._units
        firsts = np.searchsorted(shard_bounds, units[:-1], side="right") - 1
        stops = np.searchsorted(shard_bounds, units[1:])
        order, _ = self._windowed_order(epoch)
        share = _share_of_rank(equal_batch_size(len(self.samples), self.batch_size), rank, world_size)
        for unit, start, last in order.unit_uses(share, first, self.repeats):
            for shard in range(firsts[unit], stops[unit]):
                yield ShardUse(shard, start, last)

    def _uniform(self, epoch: int) -> _Batches:
        """Return a function that returns the samples [n, m] at positions [m] of the batches of steps [n]."""
        size = equal_batch_size(len(self.samples), self.batch_size)
        order = IndexPermutation(self.steps_per_epoch * size, self.seed, epoch)

        def batches(steps: range, positions: NDArray[np.int64]) -> NDArray[np.int64]:
            places = (np.array(steps)[:, None] * size + positions) // self.repeats
            return self._kept(epoch, order[places.reshape(-1)]).reshape(places.shape)

        return batches

    def _kept(self, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return samples that an epoch uses, for positions within 0 .. N - left_out - 1."""
        if self.by_class is not None:
            drawn, (samples, counts) = self.class_counts, (self.by_class.samples, self.by_class.counts)
            label = np.searchsorted(np.cumsum(drawn), positions, side="right")
            # Samples of each class that earlier epochs have used, minus the first position of the class in this epoch.
            used = epoch * drawn - (np.cumsum(drawn) - drawn)
            places = (np.cumsum(counts) - counts)[label] + (used[label] + positions) % counts[label]
            return samples[places].astype(np.int64)
        if not self.left_out:
            return self.samples[positions]
        # An epoch leaves out a part of a fixed permutation and uses the rest of it, from the end of that part on.
        count, (start, stride) = len(self.samples), self._left_out_order
        end = (start + stride * (self.left_out_offset + (epoch + 1) * self.left_out)) % count
        return self.samples[(positions * stride + end) % count]

    @cached_property
    def _left_out_order(self) -> tuple[int, int]:
        """Start and stride of the fixed permutation (start + stride * i) % N; the stride spreads neighbours evenly."""
        count = len(self.samples)
        start = int(random_keys(self.seed, LEFT_OUT_STREAM, 1)[0] % np.uint64(count))
        golden = min(count, (1 << 62) // count) * (math.sqrt(5) - 1) / 2  # products stay below 2^63
        return start, next(stride for stride in itertools.count(int(golden)) if math.gcd(stride, count) == 1)

    def _windowed(self, epoch: int) -> _Batches:
        """Return the same as `_uniform` for an order with a shuffle window."""
        order, samples_at = self._windowed_order(epoch)
        return lambda steps, positions: samples_at(order.numbers(steps, positions, self.repeats))

    def _windowed_order(self, epoch: int) -> tuple[WindowedOrder, Callable[[NDArray[np.int64]], NDArray[np.int64]]]:
        """Return the order of an epoch, and a function from its numbers to samples."""
        units, covered = self._units
        below = self._below_units
        samples: Positions | NDArray[np.integer] = self.samples
        missing, begin = self.left_out, 0
        if self.by_class is not None:
            samples, missing = self.by_class.draw(self.class_counts, epoch), 0
            # searchsorted would convert all samples if the types differed.
            below = samples.searchsorted(units.astype(samples.dtype))
        elif missing:
            begin = (self._left_out_order[0] + self.left_out_offset + epoch * missing) % len(samples)
        # Consecutive samples are left out, in cyclic order: the first `wrapped` ones, and others from `begin` on.
        wrapped = max(0, begin + missing - len(samples))
        missing -= wrapped
        window = (self.shuffle_window_blocks or 1) * self.block_size
        order = WindowedOrder(
            below - np.minimum(below, wrapped) - np.clip(below - begin, 0, missing),
            steps=self.steps_per_epoch,
            batch_size=equal_batch_size(len(self.samples), self.batch_size),
            window=window * len(self.samples) // covered,
            lanes=self.lanes,
            seed=self.seed,
            epoch=epoch,
        )

        def samples_at(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
            numbers = numbers + wrapped
            numbers += missing * (numbers >= begin)
            return samples[numbers].astype(np.int64)

        return order, samples_at

    @cached_property
    def _units(self) -> tuple[NDArray[np.int64], int]:
        """Bounds of the units, and the number of positions in those that have samples."""
        bounds = self.unit_bounds
        if bounds is None:
            end = int(self.samples[np.array([len(self.samples) - 1])][0]) + 1
            blocks = -(-end // self.block_size)
            unit = self.block_size << max(0, (blocks - 1).bit_length() - (_MAX_UNITS - 1).bit_length())
            bounds = np.append(np.arange(0, end, unit), end)
        return bounds, int(np.diff(bounds)[np.diff(self.samples.searchsorted(bounds)) > 0].sum())

    @cached_property
    def _below_units(self) -> NDArray[np.int64]:
        """Number of samples before each bound of the units."""
        return self.samples.searchsorted(self._units[0])

    @cached_property
    def lanes(self) -> int:
        """Number of lanes of a windowed order. It does not depend on the number of ranks."""
        _, covered = self._units
        blocks = self.shuffle_window_blocks or 1
        used = int(np.count_nonzero(np.diff(self._below_units)))
        units = used * blocks * self.block_size // covered  # of the window
        most = min(blocks // _BLOCKS_PER_LANE, units // _UNITS_PER_LANE)
        most = min(most, equal_batch_size(len(self.samples), self.batch_size))
        return next((lanes for lanes in LANES if lanes <= most), 1)

    @cached_property
    def class_counts(self) -> NDArray[np.int64]:
        """Samples of each class in a class-balanced epoch, int64 [C], rounded by largest remainders."""
        assert self.by_class is not None
        counts = self.by_class.counts
        weights = np.where(counts > 0, np.maximum(counts, 1.0) ** (1 - self.class_balance), 0.0)
        total = len(self.samples) - self.left_out
        exact = weights * (total / weights.sum())
        rounded = exact.astype(np.int64)
        rounded[np.argsort(rounded - exact, kind="stable")[: total - rounded.sum()]] += 1
        return rounded


def _share_of_rank(size: int, rank: int, world_size: int) -> slice:
    return slice(size * rank // world_size, size * (rank + 1) // world_size)


def equal_batch_size(samples: int, batch_size: int) -> int:
    """Return the size of all batches of a training epoch of `samples` samples, which is at most `batch_size`."""
    return samples // -(-samples // batch_size)


def max_shuffle_window(manifest: Manifest, memory: int, batch_size: int) -> int | None:
    """Compute the widest shuffle window with which no block is read twice per epoch.

    Args:
        manifest: Manifest of the split.
        memory: Bytes that the store may use for images.
        batch_size: Samples of a global batch.

    Returns:
        The window in blocks; None if all images fit into memory.
    """
    if manifest.encoded or manifest.samples * manifest.image_bytes <= memory:
        return None
    slots = memory // (manifest.block_size * manifest.image_bytes)
    return largest_window(slots, batch_size / manifest.block_size, _BLOCKS_PER_LANE)


def shard_window(manifest: Manifest, memory: int, cache: int, batch_size: int) -> int:
    """Compute the widest shuffle window of a data set whose shards are fetched when they are needed.

    Args:
        manifest: Manifest of the split.
        memory: Bytes that the store may use for images.
        cache: Bytes of shards that the cache on disk holds for this rank: half of them for the window, the rest for
            shards that are fetched ahead.
        batch_size: Samples of a global batch.

    Returns:
        The window in blocks.
    """
    samples = max(shard.samples for shard in manifest.shards)
    slots = cache // 2 // max(shard.bytes for shard in manifest.shards)
    if not manifest.encoded:
        slots = min(slots, memory // (samples * manifest.image_bytes))
    return largest_window(slots, batch_size / samples) * -(-samples // manifest.block_size)


def largest_window(slots: int, blocks_per_batch: float, blocks_per_lane: int = _UNITS_PER_LANE) -> int:
    """Return the widest window with which a first-in first-out cache reads no block twice.

    A block is needed for one window after it was read. The cache needs room for further blocks: those of a batch and of
    a frame of a `WindowedOrder`, about sqrt(window * blocks_per_batch), which are read in any order, and a block of
    each lane, which is partly used.

    Args:
        slots: Blocks that the cache holds.
        blocks_per_batch: Size of a global batch in blocks.
        blocks_per_lane: Blocks of the window for each lane.
    """
    room = int(slots - math.sqrt(2 * slots * blocks_per_batch) - blocks_per_batch - 2)
    for lanes, more in zip(LANES, (math.inf, *LANES), strict=False):
        window = room - lanes
        if window >= blocks_per_lane * lanes:
            return int(min(window, blocks_per_lane * more - 1))
    return max(1, room - 1)


@dataclass(frozen=True, eq=False)
class SequentialBatchSampler:
    """Every sample exactly once, in order; each rank has consecutive batches, so a host reads only its share.

    The composition of a batch does not depend on the number of ranks, so predictions are bit-identical. The numbers of
    steps of two ranks differ by at most one, and nothing is padded.

    Attributes:
        samples: The N positions of the samples in the store.
        batch_size: Samples of a batch.
    """

    samples: Positions
    batch_size: int
    can_fuse = False  # fused calls would contain other images on another number of ranks

    def __post_init__(self) -> None:
        object.__setattr__(self, "samples", as_positions(self.samples))

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.samples) // self.batch_size)

    def steps(self, epoch: int, rank: int, world_size: int, first: int = 0) -> Iterator[BatchIndices]:
        """Iterate over this rank's steps from number `first` on. The epoch has no effect."""
        for step in self._steps_of(rank, world_size, first):
            batch = self.samples[step * self.batch_size : (step + 1) * self.batch_size]
            yield BatchIndices(step, batch, len(batch))

    def shard_uses(
        self, epoch: int, rank: int, world_size: int, first: int, shard_bounds: NDArray[np.int64]
    ) -> Iterator[ShardUse]:
        """Iterate over the shards that this rank's steps from number `first` on read; see `Store.prefetch`."""
        own, bounds = self._steps_of(rank, world_size, first), self.samples.searchsorted(shard_bounds)
        for shard in np.flatnonzero(bounds[1:] > bounds[:-1]).tolist():
            start, stop = bounds[shard : shard + 2].tolist()
            step, last = max(own.start, start // self.batch_size), min(own.stop - 1, (stop - 1) // self.batch_size)
            if step <= last:
                yield ShardUse(shard, step, last)

    def _steps_of(self, rank: int, world_size: int, first: int) -> range:
        start, stop = (self.steps_per_epoch * number // world_size for number in (rank, rank + 1))
        return range(max(first, start), stop)


BatchSampler: TypeAlias = ShuffledBatchSampler | SequentialBatchSampler
"""Selects the samples of each step on each rank."""
