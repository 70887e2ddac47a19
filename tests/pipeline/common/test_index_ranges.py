"""Ranges of positions answer like the array of the positions."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.common.index_ranges import IndexRanges

position_sets = st.sets(st.integers(0, 60)).map(lambda values: np.array(sorted(values), np.int64))


@given(positions=position_sets, data=st.data())
def test_ranges_answer_like_an_array(positions: np.ndarray, data: st.DataObject) -> None:
    ranges = IndexRanges.of(positions)
    assert len(ranges) == len(positions)
    assert ranges[:].tolist() == np.asarray(ranges).tolist() == positions.tolist()
    assert ranges[3:17:2].tolist() == positions[3:17:2].tolist()
    numbers = np.array(data.draw(st.permutations(range(len(positions)))), np.int64)
    assert ranges[numbers].tolist() == positions[numbers].tolist()
    queries = np.arange(-2, 65)
    assert ranges.searchsorted(queries).tolist() == positions.searchsorted(queries).tolist()
    assert ranges[:].dtype == ranges.searchsorted(queries).dtype == np.int64


@given(sets=st.lists(position_sets, min_size=1, max_size=4))
def test_a_symmetric_difference_has_what_an_odd_number_of_sets_has(sets: list[np.ndarray]) -> None:
    found = IndexRanges.symmetric_difference(*map(IndexRanges.of, sets))
    count = np.bincount(np.concatenate(sets), minlength=61)
    assert found[:].tolist() == np.flatnonzero(count % 2).tolist()
    assert (np.diff(found.bounds) > 0).all()


def test_all_positions_are_one_range() -> None:
    assert IndexRanges.first(10**12).bounds.tolist() == [0, 10**12]
    assert len(IndexRanges.first(0)) == 0 == len(IndexRanges.first(0)[:])
