"""Parts carved out of a raw data set: complete, disjoint, in proportion, the same on every call."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.packing.splits import make_splits
from pipeline.readers.raw_split import RawSplit
from shards import UserError

CLASSES = tuple("abcde")
SIZE = 1000
UNTOUCHED = {"test_fraction": None, "val_fraction": None, "subset": 1.0, "stratify": "", "seed": 0}


def synthetic_raw_split(count: int, name: str = "train", seed: int = 1, classes: int = 5) -> RawSplit:
    """Images that tell their own row by their pixels, with a column of writers that depends on the label."""
    random = np.random.default_rng([seed, count])
    labels = random.integers(0, classes, count)
    writers = np.array([f"writer {number}" for number in (random.random(count) * (2 + labels)).astype(int)])
    images = np.arange(count).astype("<u4").view(np.uint8).reshape(count, 2, 2, 1)
    return RawSplit.from_arrays(name, images, labels, CLASSES[:classes], columns={"writer": writers})


def carved(parts: tuple[RawSplit, ...] | RawSplit, **asked: object) -> dict[str, RawSplit]:
    parts = parts if isinstance(parts, tuple) else (parts,)
    return {part.name: part for part in make_splits(parts, **{**UNTOUCHED, **asked})}


def refusal(parts: tuple[RawSplit, ...] | RawSplit, **asked: object) -> UserError:
    with pytest.raises(UserError) as caught:
        carved(parts, **asked)
    return caught.value


def assert_shows_its_rows(part: RawSplit) -> None:
    """What is read for its rows are the images of these rows, with their labels."""
    raw = synthetic_raw_split(SIZE)
    np.testing.assert_array_equal(part.read(part.source_index), raw.read(part.source_index))
    np.testing.assert_array_equal(part.labels, raw.labels[part.source_index])
    np.testing.assert_array_equal(part.columns["writer"], raw.columns["writer"][part.source_index])


@settings(max_examples=40)
@given(
    test=st.floats(0.05, 0.5),
    val=st.one_of(st.none(), st.floats(0.05, 0.5)),
    subset=st.floats(0.1, 1),
    stratify=st.sampled_from(["", "writer"]),
    seed=st.integers(0, 2**63 - 1),
)
def test_parts_are_disjoint_complete_and_of_the_sizes_asked_for(
    test: float, val: float | None, subset: float, stratify: str, seed: int
) -> None:
    whole = synthetic_raw_split(SIZE)
    asked = {"test_fraction": test, "val_fraction": val, "stratify": stratify, "seed": seed}
    parts = carved(whole, **asked)
    assert list(parts) == ["train", "test"] if val is None else ["train", "test", "val"]
    assert sorted(np.concatenate([part.source_index for part in parts.values()])) == list(range(SIZE))
    assert len(parts["test"].source_index) == round(test * SIZE)
    if val is not None:
        assert len(parts["val"].source_index) == round(val * (SIZE - len(parts["test"].source_index)))
    for part in parts.values():
        assert_shows_its_rows(part)

    smaller = carved(whole, **asked, subset=subset)
    for name in set(parts) - {"train"}:
        np.testing.assert_array_equal(smaller[name].source_index, parts[name].source_index)
    assert set(smaller["train"].source_index) <= set(parts["train"].source_index)
    assert (
        abs(len(smaller["train"].source_index) - subset * len(parts["train"].source_index)) <= 0.5 + 1e-9
    )  # the products are rounded
    assert_shows_its_rows(smaller["train"])

    again = carved(synthetic_raw_split(SIZE), **asked, subset=subset)
    for name, part in smaller.items():
        np.testing.assert_array_equal(again[name].source_index, part.source_index)


def counts(part: RawSplit, writers: NDArray[np.str_]) -> NDArray[np.int64]:
    """[classes, writers], images of each."""
    places = np.searchsorted(writers, part.columns["writer"])
    return np.bincount(part.labels * len(writers) + places, minlength=len(CLASSES) * len(writers)).reshape(5, -1)


@pytest.mark.parametrize("seed", range(5))
def test_labels_are_in_proportion_to_an_image(seed: int) -> None:
    whole = synthetic_raw_split(SIZE)
    parts = carved(whole, test_fraction=0.2, val_fraction=0.25, subset=0.3, seed=seed)
    share = np.bincount(whole.labels)
    for name, fraction, slack in (("test", 0.2, 1), ("val", 0.2, 1.25), ("train", 0.18, 1.6)):
        assert np.abs(np.bincount(parts[name].labels) - fraction * share).max() <= slack


@pytest.mark.parametrize("seed", range(5))
def test_labels_and_writers_are_in_proportion_to_an_image_or_two(seed: int) -> None:
    whole = synthetic_raw_split(SIZE)
    writers = np.unique(whole.columns["writer"])
    parts = carved(whole, test_fraction=0.2, val_fraction=0.25, stratify="writer", seed=seed)
    for name, fraction in (("test", 0.2), ("val", 0.2), ("train", 0.6)):
        assert np.abs(counts(parts[name], writers) - fraction * counts(whole, writers)).max() < 2.5
    by_label = carved(whole, test_fraction=0.2, val_fraction=0.25, seed=seed)
    differences = [
        np.abs(counts(one["test"], writers) - 0.2 * counts(whole, writers)).sum() for one in (by_label, parts)
    ]
    assert differences[1] < differences[0]


def test_another_seed_makes_other_parts() -> None:
    one, other = (
        carved(synthetic_raw_split(SIZE), test_fraction=0.2, seed=seed)["test"].source_index for seed in (0, 1)
    )
    assert 20 < len(np.intersect1d(one, other)) < 70  # 40 by chance


def test_test_val_and_subset_are_drawn_independently() -> None:
    """Of what would be the test part at another draw, the val part and the subset hold their share, not all or none."""
    whole = synthetic_raw_split(SIZE)
    test = carved(whole, test_fraction=0.5)["test"].source_index
    as_train = carved((whole, synthetic_raw_split(10, "test")), val_fraction=0.5, subset=0.5)
    for rows, expected in ((as_train["val"].source_index, 250), (as_train["train"].source_index, 125)):
        assert abs(len(np.intersect1d(test, rows)) - expected) < 60


def test_a_smaller_subset_lies_in_a_larger_one_but_for_an_image_of_each_class() -> None:
    whole = synthetic_raw_split(SIZE)
    rows = [
        carved(whole, test_fraction=0.2, subset=subset)["train"].source_index for subset in (0.05, 0.1, 0.33, 0.7, 1)
    ]
    for smaller, larger in itertools.pairwise(rows):
        assert len(np.setdiff1d(smaller, larger)) <= len(CLASSES)
        assert len(smaller) < len(larger)


def test_no_class_is_lost_from_training() -> None:
    """Of three hundred classes of one or two images each, all are still there to train on."""
    labels = np.concatenate([np.arange(300), np.arange(150)])
    images = np.zeros((450, 2, 2, 1), np.uint8)
    whole = RawSplit.from_arrays("train", images, labels, tuple(map(str, range(300))))
    parts = carved(whole, test_fraction=0.2, val_fraction=0.1)
    assert {name: len(part.source_index) for name, part in parts.items()} == {"train": 324, "test": 90, "val": 36}
    assert len(np.unique(parts["train"].labels)) == 300
    assert len(np.unique(carved(whole, test_fraction=0.2, subset=0.9)["train"].labels)) == 300
    # Equal shares of many classes are not always settled in favour of the first ones.
    assert 30 < np.median(parts["test"].labels) < 120


def test_parts_that_are_there_stay_as_they_are() -> None:
    parts = (synthetic_raw_split(40, "test"), synthetic_raw_split(30, "val"), synthetic_raw_split(SIZE))
    arranged = make_splits(parts, **UNTOUCHED)
    assert [part.name for part in arranged] == ["train", "test", "val"]
    assert all(part in parts for part in arranged)
    carved_val = carved(parts[::2], val_fraction=0.1, subset=0.5)
    assert carved_val["test"] is parts[0]
    assert {name: len(part.source_index) for name, part in carved_val.items()} == {"train": 450, "test": 40, "val": 100}


class TestRefusals:
    def test_a_set_without_test_part(self) -> None:
        error = refusal(synthetic_raw_split(100))
        assert "no test split" in error.found and error.hint == "--test-fraction 0.2"

    def test_a_test_part_besides_the_one_there(self) -> None:
        error = refusal((synthetic_raw_split(100), synthetic_raw_split(7, "test")), test_fraction=0.2)
        assert "--test-fraction 0.2" in error.found and "7 images" in error.found and "omit" in error.hint

    def test_a_val_part_besides_the_one_there(self) -> None:
        error = refusal(
            (synthetic_raw_split(100), synthetic_raw_split(7, "test"), synthetic_raw_split(8, "val")), val_fraction=0.2
        )
        assert "--val-fraction 0.2" in error.found and "8 images" in error.found

    def test_an_unknown_column(self) -> None:
        error = refusal(synthetic_raw_split(100), test_fraction=0.2, stratify="writers")
        assert "writers" in error.found and "writer" in error.expected and error.hint == "--stratify writer"

    def test_a_column_where_there_is_none(self) -> None:
        images = np.zeros((9, 2, 2, 1), np.uint8)
        part = RawSplit.from_arrays("train", images, np.arange(9) % 3, tuple("abc"))
        assert "omit --stratify" in refusal(part, test_fraction=0.3, stratify="writer").hint

    @pytest.mark.parametrize(("fraction", "amount"), [(0.0, "none"), (0.004, "none"), (1.0, "all")])
    def test_empty_parts(self, fraction: float, amount: str) -> None:
        for option in ("test", "val"):
            parts = (
                (synthetic_raw_split(100), synthetic_raw_split(9, "test"))
                if option == "val"
                else (synthetic_raw_split(100),)
            )
            error = refusal(parts, **{f"{option}_fraction": fraction})
            assert f"--{option}-fraction {fraction}" in error.found and f"{amount} of 100" in error.found

    @pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
    def test_the_hint_of_an_empty_part_works(self, count: int) -> None:
        part = RawSplit.from_arrays("train", np.zeros((count, 2, 2, 1), np.uint8), np.arange(count) % 2, ("a", "b"))
        hint = refusal(part, test_fraction=0.01).hint
        if count == 1:
            assert hint == "add images"
            return
        option, fraction = hint.split()
        assert option == "--test-fraction"
        try:
            assert len(carved((part,), test_fraction=float(fraction))["test"].labels) > 0
        except UserError as error:  # of two images, one class is left
            assert count < 4 and "one class" in str(error)

    def test_an_empty_subset(self) -> None:
        assert (
            "--subset 0.001" in refusal((synthetic_raw_split(100), synthetic_raw_split(9, "test")), subset=0.001).found
        )


def test_val_is_the_test_split_where_there_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    train, val = synthetic_raw_split(50, "train"), synthetic_raw_split(10, "val")
    parts = carved((train, val))
    assert list(parts) == ["train", "test"] and parts["test"].labels.tolist() == val.labels.tolist()
    assert "the val split is the test split" in capsys.readouterr().err
    assert list(carved((train, val), test_fraction=0.2)) == ["train", "test", "val"]


def test_one_class_is_refused() -> None:
    """A model of it reaches 100 % accuracy."""
    train = synthetic_raw_split(50, "train")
    for split in (
        replace(train, labels=np.zeros(50, np.int64)),
        replace(train, labels=np.zeros(50, np.int64), classes=("img",)),
    ):
        assert "one class" in refusal(split, test_fraction=0.2).found
