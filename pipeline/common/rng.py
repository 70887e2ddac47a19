"""Random numbers and permutations as functions of (seed, stream): stateless, and equal on every machine."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# A seed has many independent streams. The number of an epoch is the stream of its order.
PACKING_STREAM = 1 << 62  # plus the number of the split
PARTITION_STREAM = 1 << 63
BLOCK_STREAM = 1 << 61  # plus the epoch: the order of blocks if samples are shuffled within a window of blocks
AUGMENTATION_STREAM = 1 << 60  # plus the epoch times 2^32, plus the step
ELASTIC_STREAM = 1 << 59  # likewise
LEFT_OUT_STREAM = 1 << 58  # the order in which epochs leave samples out


def random_keys(seed: int, stream: int, count: int, first: int = 0) -> NDArray[np.uint64]:
    """Return independent uniform 64-bit words from the counter-based generator Philox.

    Salmon et al. 2011, https://doi.org/10.1145/2063384.2063405. NumPy guarantees that the raw words of its bit
    generators never change; it does not guarantee this for its distributions.

    Args:
        seed: The seed, 0 .. 2^64 - 1.
        stream: The stream of the seed.
        count: The number of words.
        first: The number of words to skip, a multiple of four. Skipping is free.

    Returns:
        uint64 [count].
    """
    key = np.array([seed, stream], np.uint64)
    return np.random.Philox(key=key, counter=first // 4).random_raw(count)


def permutation(count: int, seed: int, stream: int) -> NDArray[np.int64]:
    """Return a uniform permutation of 0 .. count-1, int64 [count], equal on every machine and NumPy version."""
    keys = random_keys(seed, stream, count)
    # Sorting words that hold their index in the low bits is several times as fast as argsort. The result is equal
    # unless two words have the same high bits.
    low = np.uint64(max(1, int(count - 1).bit_length()))
    marked = np.sort((keys >> low << low) | np.arange(count, dtype=np.uint64))
    high = marked >> low
    if (high[1:] == high[:-1]).any():
        return np.argsort(keys, kind="stable")
    return (marked & np.uint64((1 << int(low)) - 1)).astype(np.int64)
