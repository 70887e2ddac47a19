"""Any position of a bitmap is found by its rank, as in the array of positions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.common.bitmap import Bitmap


@given(seed=st.integers(0, 2**32), count=st.integers(0, 700), density=st.sampled_from([0, 0.01, 0.5, 0.97, 1]))
def test_ranks_are_those_of_the_array_of_positions(seed: int, count: int, density: float) -> None:
    random = np.random.default_rng(seed)
    mask = random.random(count) < density
    bitmap = Bitmap(mask[first : first + 64] for first in range(0, count, 64))
    positions = np.flatnonzero(mask)
    ranks = random.permutation(np.repeat(np.arange(len(positions)), 2))
    assert len(bitmap) == len(positions)
    np.testing.assert_array_equal(bitmap[ranks], positions[ranks])


@pytest.mark.parametrize("gap", [0, 5000])
def test_long_runs(gap: int) -> None:
    mask = np.repeat([True, False, True], [3000, gap, 64])
    assert Bitmap([mask])[np.array([0, 2999, 3000, 3063])].tolist() == [0, 2999, 3000 + gap, 3063 + gap]
