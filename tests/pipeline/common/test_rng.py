"""A permutation that is computed in pieces is the one that is computed at once."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.common import rng
from pipeline.common.rng import IndexPermutation, iterate_permutation, permutation, random_keys


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rng, "_PIECE", 64)
    monkeypatch.setattr(rng, "_SORTED_AT_ONCE", 100)


def in_pieces(count: int, seed: int, stream: int) -> NDArray[np.int64]:
    pieces = list(iterate_permutation(count, seed, stream))
    assert all(len(piece) < 200 for piece in pieces)
    return np.concatenate([np.empty(0, np.int64), *pieces])


@pytest.mark.parametrize("count", [0, 1, 2, 63, 64, 65, 99, 100, 101, 1000, 4321])
def test_pieces_make_up_the_sorted_permutation(count: int) -> None:
    expected = np.argsort(random_keys(3, 5, count), kind="stable")
    np.testing.assert_array_equal(in_pieces(count, 3, 5), expected)
    np.testing.assert_array_equal(permutation(count, 3, 5), expected)


def test_equal_words_keep_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    def words(seed: int, stream: int, count: int, first: int = 0) -> NDArray[np.uint64]:
        return (np.arange(first, first + count, dtype=np.uint64) % np.uint64(7)) << np.uint64(61)

    monkeypatch.setattr(rng, "random_keys", words)
    monkeypatch.setattr(rng, "_SORTED_AT_ONCE", 1000)
    expected = np.argsort(words(0, 0, 500), kind="stable")
    np.testing.assert_array_equal(np.concatenate(list(iterate_permutation(500, 0, 0))), expected)
    np.testing.assert_array_equal(permutation(500, 0, 0), expected)


def test_of_more_numbers_it_is_an_index_permutation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rng, "_MAX_SORTED", 999)
    expected = IndexPermutation(1000, 3, 5)[np.arange(1000)]
    np.testing.assert_array_equal(in_pieces(1000, 3, 5), expected)
    assert sorted(expected) == list(range(1000))
