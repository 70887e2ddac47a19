"""Random numbers and permutations as functions of (seed, stream): stateless, and equal on every machine."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

# A seed has many independent streams. The number of an epoch is the stream of its order.
PACKING_STREAM = 1 << 62  # plus the number of the split
PARTITION_STREAM = 1 << 63  # plus 1 .. 3 in packing
FOLD_STREAM = PARTITION_STREAM + 4  # the parts of a cross-validation
BLOCK_STREAM = 1 << 61  # plus the epoch: the order of blocks if samples are shuffled within a window of blocks
DELAY_STREAM = 1 << 55  # plus the epoch: the permutation of each frame of a windowed order, which delays its samples
ORDER_STREAM = 1 << 54  # plus the epoch: the permutation of each period of a windowed order
TABLE_STREAM = 1 << 53  # plus twice the epoch: the tables from which both permutations are computed
AUGMENTATION_STREAM = 1 << 60  # plus the epoch times 2^32, plus the step
ELASTIC_STREAM = 1 << 59  # likewise
POLICY_STREAM = 1 << 57  # likewise: further numbers of the augmentation
LEFT_OUT_STREAM = 1 << 58  # the order in which epochs leave samples out
BALANCE_STREAM = 1 << 56  # the order of the samples of each class in class-balanced sampling

_MAX_SORTED = 1 << 24  # numbers: the time of `iterate_permutation` grows with their square
_SORTED_AT_ONCE = 1 << 19
_PIECE = 1 << 16  # numbers computed at a time


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
    return _argsort(random_keys(seed, stream, count))


def iterate_permutation(count: int, seed: int, stream: int) -> Iterator[NDArray[np.int64]]:
    """Yield a pseudorandom permutation of 0 .. count-1 in pieces, in memory independent of `count`.

    Up to 2^24 numbers it is the uniform `permutation`. It is sorted range by range of the random words, which are
    computed anew for each range. Of more numbers it is an `IndexPermutation`.

    Yields:
        int64 [n], the next numbers.
    """
    if count > _MAX_SORTED:
        order = IndexPermutation(count, seed, stream)
        for first in range(0, count, _PIECE):
            yield order[np.arange(first, min(first + _PIECE, count))]
        return
    ranges = -(-count // _SORTED_AT_ONCE)
    for number in range(ranges):
        low, last = number * 2**64 // ranges, (number + 1) * 2**64 // ranges - 1
        found: list[tuple[NDArray[np.uint64], NDArray[np.int64]]] = []
        for first in range(0, count, _PIECE):
            keys = random_keys(seed, stream, min(_PIECE, count - first), first)
            inside = np.flatnonzero((keys >= low) & (keys <= last))
            found.append((keys[inside], inside + first))
        range_keys, numbers = map(np.concatenate, zip(*found, strict=True))
        # Spread over 64 bits, so that the high bits of two words are rarely equal.
        numbers = numbers[_argsort((range_keys - np.uint64(low)) * np.uint64(ranges))]
        yield from (numbers[first : first + _PIECE] for first in range(0, len(numbers), _PIECE))


def _argsort(keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """`np.argsort(keys, kind="stable")` of uniform words."""
    # Sorting words that hold their index in the low bits is several times as fast as argsort. The result is equal
    # unless two words have the same high bits.
    low = np.uint64(max(1, int(len(keys) - 1).bit_length()))
    marked = np.sort((keys >> low << low) | np.arange(len(keys), dtype=np.uint64))
    high = marked >> low
    if (high[1:] == high[:-1]).any():
        return np.argsort(keys, kind="stable")
    return (marked & np.uint64((1 << int(low)) - 1)).astype(np.int64)


class IndexPermutation:
    """A pseudorandom permutation of 0 .. count-1 of which any part is computed alone.

    Up to 65,536 numbers it is the uniform `permutation`. More numbers are permuted by a keyed bijection, in time and
    memory proportional to the part: a Feistel network (Luby and Rackoff 1988, https://doi.org/10.1137/0217022) permutes
    the next power of two, and numbers outside of 0 .. count-1 are permuted again until they are within (cycle walking,
    Black and Rogaway 2002, https://doi.org/10.1007/3-540-45760-7_9), less than twice on average.

    Args:
        count: The number of numbers, up to 2^63.
        seed: The seed, 0 .. 2^64 - 1.
        stream: The stream of the seed.
    """

    _MAX_TABLE = 1 << 16  # sorting takes 5 ms; a Feistel network permutes few numbers badly
    _ROUNDS = 8  # of 6 and more, chi-squared tests of positions and distances do not notice any
    _CHUNK = 1 << 14  # numbers whose intermediate results stay in the cache of a core

    def __init__(self, count: int, seed: int, stream: int) -> None:
        self.count = count
        self._seed = seed
        self._stream = stream
        bits = max(0, count - 1).bit_length()
        self._bits = bits // 2, bits - bits // 2  # of the left and right half

    def __getitem__(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the numbers at positions, int64 [n], which are within 0 .. count-1."""
        if self.count <= self._MAX_TABLE:
            return self._table[positions]
        numbers = self._permute(positions)
        outside = np.flatnonzero(numbers >= self.count)
        while len(outside):
            numbers[outside] = again = self._permute(numbers[outside])
            outside = outside[again >= self.count]
        return numbers

    @cached_property
    def _table(self) -> NDArray[np.int64]:
        return permutation(self.count, self._seed, self._stream)

    @cached_property
    def _keys(self) -> NDArray[np.uint32]:
        return (random_keys(self._seed, self._stream, self._ROUNDS) >> np.uint64(32)).astype(np.uint32)

    def _permute(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        permuted = np.empty_like(numbers)
        for start in range(0, len(numbers), self._CHUNK):
            chunk = slice(start, start + self._CHUNK)
            permuted[chunk] = self._permute_chunk(numbers[chunk])
        return permuted

    def _permute_chunk(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        left_bits, right_bits = self._bits
        left = (numbers >> right_bits).astype(np.uint32)
        right = (numbers & ((1 << right_bits) - 1)).astype(np.uint32)
        mixed, shifted = np.empty_like(left), np.empty_like(left)
        for key in self._keys:
            np.add(right, key, out=mixed)
            # `lowbias32` of https://github.com/skeeto/hash-prospector without its last shift
            for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
                np.right_shift(mixed, np.uint32(shift), out=shifted)
                np.bitwise_xor(mixed, shifted, out=mixed)
                np.multiply(mixed, np.uint32(factor), out=mixed)
            np.right_shift(mixed, np.uint32(32 - left_bits), out=mixed)  # the high bits are mixed best
            np.bitwise_xor(left, mixed, out=left)
            left, right = right, left
            left_bits, right_bits = right_bits, left_bits
        return left.astype(np.int64) << right_bits | right
