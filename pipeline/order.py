"""Which samples make up a batch: a pure function of (seed, epoch, step), never a state.

Resuming in the middle of an epoch is arithmetic, and the order is the same on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

# A seed has many independent streams: an epoch's number for its order, and these for what is drawn once.
PACKING_STREAM = 1 << 62  # plus the number of the part
PARTITION_STREAM = 1 << 63


def random_keys(seed: int, stream: int, count: int) -> NDArray[np.uint64]:
    """[count] independent uniform 64-bit words of a (seed, stream), from the counter-based generator Philox.

    Salmon et al. 2011, https://doi.org/10.1145/2063384.2063405. NumPy guarantees the raw words of its bit
    generators for all time, which it does not for the numbers that its distributions make of them.
    """
    key = np.array([seed, stream], np.uint64)
    return np.random.Philox(key=key).random_raw(count)


def permutation(count: int, seed: int, stream: int) -> NDArray[np.int64]:
    """A uniform permutation of 0 .. count-1 as int64 [count], the same on every machine and NumPy."""
    return np.argsort(random_keys(seed, stream, count), kind="stable")


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
    """How many steps an epoch has, and what each of them loads on each rank."""

    samples: NDArray[np.int64]
    batch_size: int

    def steps(self, epoch: int, rank: int, world_size: int, first: int = 0) -> Iterator[Step]: ...


@dataclass(frozen=True, eq=False)
class TrainingOrder:
    """Every epoch another permutation, cut into global batches, each shared out evenly among the ranks.

    samples: int64 [N], the positions that take part. batch_size: samples of a global batch, over all ranks.
    The last, incomplete batch of an epoch is left out (another one in every epoch), so that all batches have
    one size; a set smaller than one batch makes one step.
    """

    samples: NDArray[np.int64]
    batch_size: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return max(1, len(self.samples) // self.batch_size)

    def steps(self, epoch: int, rank: int, world_size: int, first: int = 0) -> Iterator[Step]:
        """The steps of an epoch from number `first` on, as this rank loads them."""
        shuffled = self.samples[permutation(len(self.samples), self.seed, epoch)]
        for number in range(first, self.steps_per_epoch):
            batch = shuffled[number * self.batch_size : (number + 1) * self.batch_size]
            share = slice(len(batch) * rank // world_size, len(batch) * (rank + 1) // world_size)
            yield Step(number, batch[share], len(batch))


@dataclass(frozen=True, eq=False)
class EvaluationOrder:
    """Every sample exactly once, in order; whole batches are dealt to the ranks in turn.

    Batches keep their composition whatever the number of ranks, so predictions are the same to the last bit.
    Ranks may get unequal numbers of steps, and nothing is padded.
    """

    samples: NDArray[np.int64]
    batch_size: int

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.samples) // self.batch_size)

    def steps(self, epoch: int, rank: int, world_size: int, first: int = 0) -> Iterator[Step]:
        """This rank's batches; `epoch` changes nothing."""
        for number in range(first + (rank - first) % world_size, self.steps_per_epoch, world_size):
            batch = self.samples[number * self.batch_size : (number + 1) * self.batch_size]
            yield Step(number, batch, len(batch))
