"""Labels and source indices that are computed when they are read act as arrays."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from conftest import synthetic_splits

from pipeline.common.bitmap import Bitmap
from pipeline.readers.raw_split import computed_array

ARRAY = np.arange(50) ** 2 % 17
COMPUTED = computed_array(50, lambda positions: positions**2 % 17)


@pytest.mark.parametrize("key", [slice(None), slice(3, -5, 2), np.array([7, 7, 0]), ARRAY > 9, 4, np.int64(-0)])
def test_computed_values_are_those_of_the_array(key: object) -> None:
    np.testing.assert_array_equal(COMPUTED[key], ARRAY[key])  # type: ignore[call-overload]


def test_functions_of_arrays_apply_to_computed_ones() -> None:
    np.testing.assert_array_equal(COMPUTED == 4, ARRAY == 4)
    np.testing.assert_array_equal(5 - COMPUTED, 5 - ARRAY)
    np.testing.assert_array_equal(np.isin(COMPUTED, [1, 2]), np.isin(ARRAY, [1, 2]))
    np.testing.assert_array_equal(np.concatenate([COMPUTED, COMPUTED]), np.tile(ARRAY, 2))
    assert (np.max(COMPUTED), len(COMPUTED), COMPUTED.tolist(), list(COMPUTED)) == (16, 50, ARRAY.tolist(), [*ARRAY])
    with pytest.raises(IndexError):
        COMPUTED[50]


def test_a_bitmap_selects_what_its_positions_select() -> None:
    train, _ = synthetic_splits(train=300)
    train = replace(train, columns={"writer": np.array([f"w{row}" for row in range(300)])})
    first, second = (np.random.default_rng(seed).random(count) < 0.5 for seed, count in ((0, 300), (1, 300)))
    second = second[: first.sum()]
    lazy = train.select(Bitmap([first]), "val").select(Bitmap([second]))
    eager = train.select(np.flatnonzero(first), "val").select(np.flatnonzero(second))
    assert lazy.name == eager.name == "val"
    for one, other in ((lazy.labels, eager.labels), (lazy.source_index, eager.source_index)):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(lazy.columns["writer"], eager.columns["writer"])
    np.testing.assert_array_equal(lazy.read(lazy.source_index[3:5]), eager.read(eager.source_index[3:5]))
    assert lazy.class_counts().tolist() == np.bincount(eager.labels, minlength=len(train.classes)).tolist()
