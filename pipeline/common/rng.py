"""Random words and permutations as functions of (seed, stream): nothing to keep, and the same on every machine."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# A seed has many independent streams: an epoch's number for its order, and these for what is drawn once.
PACKING_STREAM = 1 << 62  # plus the number of the part
PARTITION_STREAM = 1 << 63
BLOCK_STREAM = 1 << 61  # plus the epoch: the order of blocks, where samples are drawn within a window of them
AUGMENTATION_STREAM = 1 << 60  # plus the epoch times 2^32, plus the step
ELASTIC_STREAM = 1 << 59  # likewise


def random_keys(seed: int, stream: int, count: int, first: int = 0) -> NDArray[np.uint64]:
    """[count] independent uniform 64-bit words of a (seed, stream), from the counter-based generator Philox.

    first: how many words to pass over, a multiple of four; it costs nothing.

    Salmon et al. 2011, https://doi.org/10.1145/2063384.2063405. NumPy guarantees the raw words of its bit
    generators for all time, which it does not for the numbers that its distributions make of them.
    """
    key = np.array([seed, stream], np.uint64)
    return np.random.Philox(key=key, counter=first // 4).random_raw(count)


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
