"""Which samples make up a batch: a pure function of (seed, epoch, step), never a state.

Resuming in the middle of an epoch is arithmetic, and the order is the same on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from shards.manifest import Manifest

# A seed has many independent streams: an epoch's number for its order, and these for what is drawn once.
PACKING_STREAM = 1 << 62  # plus the number of the part
PARTITION_STREAM = 1 << 63
BLOCK_STREAM = 1 << 61  # plus the epoch: the order of blocks, where samples are drawn within a window of them


def random_keys(seed: int, stream: int, count: int) -> NDArray[np.uint64]:
    """[count] independent uniform 64-bit words of a (seed, stream), from the counter-based generator Philox.

    Salmon et al. 2011, https://doi.org/10.1145/2063384.2063405. NumPy guarantees the raw words of its bit
    generators for all time, which it does not for the numbers that its distributions make of them.
    """
    key = np.array([seed, stream], np.uint64)
    return np.random.Philox(key=key).random_raw(count)


def permutation(count: int, seed: int, stream: int) -> NDArray[np.int64]:
    """A uniform permutation of 0 .. count-1 as int64 [count], the same on every machine and NumPy."""
    keys = random_keys(seed, stream, count)
    # Sorting words that carry their place in the low bits is several times as fast as argsort. It is the same unless
    # two words agree in all the high bits.
    low = np.uint64(max(1, int(count - 1).bit_length()))
    marked = np.sort((keys >> low << low) | np.arange(count, dtype=np.uint64))
    high = marked >> low
    if (high[1:] == high[:-1]).any():
        return np.argsort(keys, kind="stable")
    return (marked & np.uint64((1 << int(low)) - 1)).astype(np.int64)


@dataclass(frozen=True)
class Step:
    """What one rank loads in one step.

    number: 0 .. steps-1 within the epoch. samples: int64 [n], this rank's positions in the store.
    global_size: samples of the step over all ranks.
    """

    number: int
    samples: NDArray[np.int64]
    global_size: int


class Order(Protocol):
    """How many steps an epoch has, and what each of them loads on each rank.

    joinable: whether the model input of several steps may be computed in one call.
    """

    samples: NDArray[np.int64]
    batch_size: int

    @property
    def joinable(self) -> bool: ...

    def steps(self, epoch: int, rank: int, world_size: int, first: int = 0) -> Iterator[Step]: ...


@dataclass(frozen=True, eq=False)
class TrainingOrder:
    """Every epoch another permutation, cut into global batches, each shared out evenly among the ranks.

    samples: int64 [N], the positions that take part. batch_size: the most samples of a global batch, over all ranks.
    Every sample comes once an epoch, and all batches have the same size or one sample less: as few batches as
    batch_size allows, without a small one left over at the end.

    window: for sets larger than memory, from how many blocks (of block_size samples) samples are drawn at a time; None
    for a uniform permutation of all. Blocks come in a random order, and each sample is put off by a uniform share of
    the window after its block's turn. So the window slides: every batch lets in as many samples as it takes out, each
    block is read once an epoch, and there is no moment at which a whole window has to be read.
    """

    samples: NDArray[np.int64]
    batch_size: int
    seed: int
    block_size: int = 1
    window: int | None = None

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.samples) // self.batch_size)

    @property
    def joinable(self) -> bool:
        """Not with a window, which is no larger than the memory for the blocks of one batch allows."""
        return self.window is None

    def shuffled(self, epoch: int) -> NDArray[np.int64]:
        """The samples as int64 [N] in the order of an epoch."""
        if self.window is None:
            return self.samples[permutation(len(self.samples), self.seed, epoch)]
        blocks = self.samples // self.block_size
        turns = permutation(int(blocks.max()) + 1, self.seed, BLOCK_STREAM + epoch).argsort()
        put_off = random_keys(self.seed, epoch, len(blocks)).astype(np.float64) * (self.window / 2.0**64)
        return self.samples[np.argsort(turns[blocks] + put_off, kind="stable")]

    def steps(self, epoch: int, rank: int, world_size: int, first: int = 0) -> Iterator[Step]:
        """The steps of an epoch from number `first` on, as this rank loads them."""
        shuffled = self.shuffled(epoch)
        steps = self.steps_per_epoch
        for number in range(first, steps):
            batch = shuffled[len(shuffled) * number // steps : len(shuffled) * (number + 1) // steps]
            share = slice(len(batch) * rank // world_size, len(batch) * (rank + 1) // world_size)
            yield Step(number, batch[share], len(batch))


def window_within(manifest: Manifest, memory: int, batch_size: int) -> int | None:
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
class EvaluationOrder:
    """Every sample exactly once, in order; whole batches are dealt to the ranks in turn.

    Batches keep their composition whatever the number of ranks, so predictions are the same to the last bit.
    Ranks may get unequal numbers of steps, and nothing is padded.
    """

    samples: NDArray[np.int64]
    batch_size: int
    joinable = False  # or calls would hold other images on another number of ranks

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.samples) // self.batch_size)

    def steps(self, epoch: int, rank: int, world_size: int, first: int = 0) -> Iterator[Step]:
        """This rank's batches; `epoch` changes nothing."""
        for number in range(first + (rank - first) % world_size, self.steps_per_epoch, world_size):
            batch = self.samples[number * self.batch_size : (number + 1) * self.batch_size]
            yield Step(number, batch, len(batch))
