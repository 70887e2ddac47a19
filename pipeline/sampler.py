"""Batch samplers: the samples of a batch are a pure function of (seed, epoch, step).

Resuming within an epoch therefore needs no stored state, and the order is the same on any number of ranks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from pipeline.common.index_ranges import Positions
from pipeline.common.rng import (
    BALANCE_STREAM,
    BLOCK_STREAM,
    LEFT_OUT_STREAM,
    IndexPermutation,
    permutation,
    random_keys,
)
from pipeline.transforms.augmentation import Augmentation, AugmentationParams
from shards.manifest import Manifest

_INDICES_AT_ONCE = 1 << 16  # indices of a rank that are computed together
SAMPLER_VERSION = 2  # increases when a state that was saved within an epoch would continue with other batches


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

    With a shuffle window, the blocks of a data set larger than memory come in random order, and each sample is delayed
    by a uniform fraction of the window. The window slides: every batch adds as many samples as it removes, each block
    is read once per epoch, and the whole window never has to be read at once.

    With repeated augmentation (Hoffer et al. 2020, https://arxiv.org/abs/1901.09335), each sample of the order fills
    several consecutive positions, with an augmentation of its own at each. The number of batches stays the same, so an
    epoch uses the first part of its order.

    With class-balanced sampling (Kang et al. 2020, https://arxiv.org/abs/1910.09217, equation 1), an epoch of as many
    samples has a fixed number of them from each class, proportional to n^(1 - class_balance) for a class of n samples.
    Each class goes through its samples in a fixed random order, and an epoch continues where the one before it ended,
    so the numbers of times that two samples of a class were used differ by at most one.

    Attributes:
        samples: The N positions in the store of the samples of an epoch.
        batch_size: Maximum number of samples of a global batch.
        seed: Seed of the permutations and of the augmentation.
        block_size: Samples of a block of the store.
        shuffle_window_blocks: Blocks from which samples are drawn at a time; None for a uniform permutation.
        augmentation: Augmentation whose parameters are sampled; None for none.
        left_out_offset: Position in the permutation at which epoch 0 starts to leave samples out.
        repeats: Consecutive positions of each sample.
        labels: int64 [N], classes of the samples; needed for class-balanced sampling.
        class_balance: 0 for every sample once, 1 for equally many samples of each class.
    """

    samples: Positions
    batch_size: int
    seed: int
    block_size: int = 1
    shuffle_window_blocks: int | None = None
    augmentation: Augmentation | None = None
    left_out_offset: int = 0
    repeats: int = 1
    labels: NDArray[np.int64] | None = None
    class_balance: float = 0.0

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.samples) // self.batch_size)

    @property
    def left_out(self) -> int:
        """Number of samples that an epoch leaves out."""
        return len(self.samples) % self.steps_per_epoch

    @cached_property
    def _left_out_order(self) -> tuple[int, int]:
        """Start and stride of the fixed permutation (start + stride * i) % N; the stride spreads neighbours evenly."""
        count = len(self.samples)
        start = int(random_keys(self.seed, LEFT_OUT_STREAM, 1)[0] % np.uint64(count))
        golden = count * (math.sqrt(5) - 1) / 2
        return start, next(stride for stride in itertools.count(int(golden)) if math.gcd(stride, count) == 1)

    @cached_property
    def class_counts(self) -> NDArray[np.int64]:
        """Samples of each class in a class-balanced epoch, int64 [C], rounded by largest remainders."""
        assert self.labels is not None
        counts = np.bincount(self.labels)
        weights = np.where(counts > 0, np.maximum(counts, 1.0) ** (1 - self.class_balance), 0.0)
        total = len(self.samples) - self.left_out
        exact = weights * (total / weights.sum())
        rounded = exact.astype(np.int64)
        rounded[np.argsort(rounded - exact, kind="stable")[: total - rounded.sum()]] += 1
        return rounded

    @cached_property
    def _by_class(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The samples, sorted by class and in random order within each, and the number of each class."""
        assert self.labels is not None
        order = permutation(len(self.samples), self.seed, BALANCE_STREAM)
        return self.samples[order[np.argsort(self.labels[order], kind="stable")]], np.bincount(self.labels)

    @property
    def can_fuse(self) -> bool:
        """Whether several steps may be computed in one call; a shuffle window's memory bound allows one batch."""
        return self.shuffle_window_blocks is None

    def epoch_order(self, epoch: int) -> NDArray[np.int64]:
        """Return the samples of an epoch in its order, int64 [N - left_out]."""
        every = np.arange(len(self.samples) - self.left_out)
        if self.shuffle_window_blocks is None:
            return self._kept(epoch, IndexPermutation(len(every), self.seed, epoch)[every])
        samples = self._kept(epoch, every)
        del every  # the arrays of an epoch may be as large as the memory for images: hold few of them at a time
        samples.sort()
        ranks = permutation(int(samples[-1]) // self.block_size + 1, self.seed, BLOCK_STREAM + epoch).argsort()
        keys = random_keys(self.seed, epoch, len(samples)).astype(np.float64)
        keys *= self.shuffle_window_blocks / 2.0**64
        keys += ranks[samples // self.block_size]
        return samples[np.argsort(keys, kind="stable")]

    def steps(self, epoch: int, rank: int, world_size: int, first: int = 0) -> Iterator[BatchIndices]:
        """Iterate over the steps of an epoch from number `first` on, with the samples of one rank."""
        size, steps = equal_batch_size(len(self.samples), self.batch_size), self.steps_per_epoch
        local = slice(size * rank // world_size, size * (rank + 1) // world_size)
        if self.shuffle_window_blocks is None:
            order = IndexPermutation(steps * size, self.seed, epoch)
        else:
            windowed = self.epoch_order(epoch)
        at_once = max(1, _INDICES_AT_ONCE // max(1, local.stop - local.start))
        for start in range(first, steps, at_once):
            numbers = np.arange(start, min(start + at_once, steps))
            positions = (numbers[:, None] * size + np.arange(local.start, local.stop)) // self.repeats
            if self.shuffle_window_blocks is None:
                batches = self._kept(epoch, order[positions.reshape(-1)]).reshape(positions.shape)
            else:
                batches = windowed[positions]
            for step, batch in zip(numbers.tolist(), batches, strict=True):
                params = self.augmentation.sample_params(self.seed, epoch, step, local) if self.augmentation else None
                yield BatchIndices(step, batch, size, params)

    def _kept(self, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return samples that an epoch uses, for positions within 0 .. N - left_out - 1."""
        if self.class_balance:
            drawn, (samples, counts) = self.class_counts, self._by_class
            label = np.searchsorted(np.cumsum(drawn), positions, side="right")
            # Samples of each class that earlier epochs have used, minus the first position of the class in this epoch.
            used = epoch * drawn - (np.cumsum(drawn) - drawn)
            return samples[(np.cumsum(counts) - counts)[label] + (used[label] + positions) % counts[label]]
        if not self.left_out:
            return self.samples[positions]
        # An epoch leaves out a part of a fixed permutation and uses the rest of it, from the end of that part on.
        count, (start, stride) = len(self.samples), self._left_out_order
        end = (start + stride * (self.left_out_offset + (epoch + 1) * self.left_out)) % count
        return self.samples[(positions * stride + end) % count]


def equal_batch_size(samples: int, batch_size: int) -> int:
    """Return the size of all batches of a training epoch of `samples` samples, which is at most `batch_size`."""
    return samples // -(-samples // batch_size)


def max_shuffle_window(manifest: Manifest, memory: int, batch_size: int) -> int | None:
    """Compute the widest shuffle window with which no block is read twice per epoch.

    A store evicts blocks in the order in which they were read, and a block is needed for one window after it was read.
    The blocks of one batch are read in any order: batch_size / block_size of them, and at the start of an epoch about
    sqrt(2 * window * batch_size / block_size). This number of blocks has to fit in addition.

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
    blocks_per_batch = batch_size / manifest.block_size
    return max(1, int(slots - np.sqrt(2 * slots * blocks_per_batch) - blocks_per_batch - 2))


@dataclass(frozen=True, eq=False)
class SequentialBatchSampler:
    """Every sample exactly once, in order; complete batches are assigned to the ranks in turn.

    The composition of a batch does not depend on the number of ranks, so predictions are bit-identical. Ranks may have
    different numbers of steps, and nothing is padded.

    Attributes:
        samples: The N positions of the samples in the store.
        batch_size: Samples of a batch.
    """

    samples: Positions
    batch_size: int
    can_fuse = False  # fused calls would contain other images on another number of ranks

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.samples) // self.batch_size)

    def steps(self, epoch: int, rank: int, world_size: int, first: int = 0) -> Iterator[BatchIndices]:
        """Iterate over this rank's steps from number `first` on. The epoch has no effect."""
        for step in range(first + (rank - first) % world_size, self.steps_per_epoch, world_size):
            batch = self.samples[step * self.batch_size : (step + 1) * self.batch_size]
            yield BatchIndices(step, batch, len(batch))


BatchSampler: TypeAlias = ShuffledBatchSampler | SequentialBatchSampler
"""Selects the samples of each step on each rank."""
