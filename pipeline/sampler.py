"""Which samples make up a batch: a pure function of (seed, epoch, step), never a state.

Resuming in the middle of an epoch is arithmetic, and the order is the same on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.common.rng import BLOCK_STREAM, permutation, random_keys
from pipeline.transforms.augmentation import Augmentation, AugmentationParams
from shards.manifest import Manifest


@dataclass(frozen=True)
class BatchIndices:
    """What one rank loads in one step.

    number: 0 .. steps-1 within the epoch. samples: int64 [n], this rank's positions in the store.
    global_size: samples of the step over all ranks. params: for their augmentation, if there is one.
    """

    step: int
    samples: NDArray[np.int64]
    global_size: int
    params: AugmentationParams | None = None


class BatchSampler(Protocol):
    """How many steps an epoch has, and what each of them loads on each rank.

    can_fuse: whether the model input of several steps may be computed in one call.
    """

    samples: NDArray[np.int64]
    batch_size: int

    @property
    def can_fuse(self) -> bool: ...

    def steps(self, epoch: int, rank: int, world_size: int, first: int = 0) -> Iterator[BatchIndices]: ...


@dataclass(frozen=True, eq=False)
class ShuffledBatchSampler:
    """Every epoch another permutation, cut into global batches, each shared out evenly among the ranks.

    samples: int64 [N], the positions that take part. batch_size: the most samples of a global batch, over all ranks.
    Every sample comes once an epoch, and all batches have the same size or one sample less: as few batches as
    batch_size allows, without a small one left over at the end.

    window: for sets larger than memory, from how many blocks (of block_size samples) samples are drawn at a time; None
    for a uniform permutation of all. Blocks come in a random order, and each sample is put off by a uniform share of
    the window after its block's turn. So the window slides: every batch lets in as many samples as it takes out, each
    block is read once an epoch, and there is no moment at which a whole window has to be read.
    augmentation: what to draw for each image, if any.
    """

    samples: NDArray[np.int64]
    batch_size: int
    seed: int
    block_size: int = 1
    shuffle_window_blocks: int | None = None
    augmentation: Augmentation | None = None

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.samples) // self.batch_size)

    @property
    def can_fuse(self) -> bool:
        """Not with a window, which is no larger than the memory for the blocks of one batch allows."""
        return self.shuffle_window_blocks is None

    def epoch_order(self, epoch: int) -> NDArray[np.int64]:
        """The samples as int64 [N] in the order of an epoch."""
        if self.shuffle_window_blocks is None:
            return self.samples[permutation(len(self.samples), self.seed, epoch)]
        blocks = self.samples // self.block_size
        turns = permutation(int(blocks.max()) + 1, self.seed, BLOCK_STREAM + epoch).argsort()
        put_off = random_keys(self.seed, epoch, len(blocks)).astype(np.float64) * (self.shuffle_window_blocks / 2.0**64)
        return self.samples[np.argsort(turns[blocks] + put_off, kind="stable")]

    def steps(self, epoch: int, rank: int, world_size: int, first: int = 0) -> Iterator[BatchIndices]:
        """The steps of an epoch from number `first` on, as this rank loads them."""
        shuffled = self.epoch_order(epoch)
        steps = self.steps_per_epoch
        for number in range(first, steps):
            batch = shuffled[len(shuffled) * number // steps : len(shuffled) * (number + 1) // steps]
            share = slice(len(batch) * rank // world_size, len(batch) * (rank + 1) // world_size)
            params = self.augmentation.sample_params(self.seed, epoch, number, share) if self.augmentation else None
            yield BatchIndices(number, batch[share], len(batch), params)


def max_shuffle_window(manifest: Manifest, memory: int, batch_size: int) -> int | None:
    """The widest window at which no block is read twice an epoch; None if all images fit.

    memory: bytes of images that a store may hold, which lets go of the blocks that came in first. A block is needed for
    the length of the window after it came in. The blocks of one batch come in together, in no order: batch_size /
    block_size of them, at the beginning of an epoch about sqrt(2 * window * batch_size / block_size), so many more have
    to fit.
    """
    if manifest.encoded or manifest.samples * manifest.image_bytes <= memory:
        return None
    slots = memory // (manifest.block_size * manifest.image_bytes)
    turns = batch_size / manifest.block_size
    return max(1, int(slots - np.sqrt(2 * slots * turns) - turns - 2))


@dataclass(frozen=True, eq=False)
class SequentialBatchSampler:
    """Every sample exactly once, in order; whole batches are dealt to the ranks in turn.

    Batches keep their composition whatever the number of ranks, so predictions are the same to the last bit.
    Ranks may get unequal numbers of steps, and nothing is padded.
    """

    samples: NDArray[np.int64]
    batch_size: int
    can_fuse = False  # or calls would hold other images on another number of ranks

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.samples) // self.batch_size)

    def steps(self, epoch: int, rank: int, world_size: int, first: int = 0) -> Iterator[BatchIndices]:
        """This rank's batches; `epoch` changes nothing."""
        for number in range(first + (rank - first) % world_size, self.steps_per_epoch, world_size):
            batch = self.samples[number * self.batch_size : (number + 1) * self.batch_size]
            yield BatchIndices(number, batch, len(batch))
