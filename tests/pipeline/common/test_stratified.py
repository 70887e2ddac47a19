"""Stratified parts: exact size, classes in proportion, disjoint, a pure function."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.common import stratified
from pipeline.common.labelled_samples import LabelledSamples
from pipeline.common.rng import FOLD_STREAM, PARTITION_STREAM, random_keys
from pipeline.common.stratified import (
    group_quotas,
    iterate_stratified_mask,
    stratified_folds,
    stratified_mask,
    stratified_quotas,
)
from trainer.data.training_data import split_train_val


def split(
    labels: NDArray[np.int64], validation: float, subset: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    every = LabelledSamples(labels, np.arange(len(labels)), np.bincount(labels), True)
    return tuple(np.asarray(part.samples) for part in split_train_val(every, validation, subset, seed))


seeds = st.integers(0, 2**63 - 1)
fractions = st.one_of(
    st.floats(0, 1), st.sampled_from([0.0, 0.1, 0.2, 0.29, 1 / 3, 0.5, 0.7, 1.0]), st.fractions(0, 1).map(float)
)
labellings = st.lists(st.integers(0, 12), min_size=1, max_size=400).map(lambda labels: np.array(labels, np.int64))


@given(labels=labellings, fraction=fractions, seed=seeds)
def test_size_is_exact_and_every_class_has_its_share(labels: NDArray[np.int64], fraction: float, seed: int) -> None:
    chosen = stratified_mask(labels, fraction, seed)
    assert chosen.dtype == bool and chosen.shape == labels.shape
    assert chosen.sum() == round(fraction * len(labels))
    shares = np.bincount(labels) * fraction
    given_by_class = np.bincount(labels[chosen], minlength=len(shares))
    assert np.abs(given_by_class - shares).max() < 1 + 1e-9


@given(labels=labellings, fraction=st.floats(0, 0.99), seed=seeds)
def test_a_class_gives_its_last_sample_only_if_no_other_has_some_to_give(
    labels: NDArray[np.int64], fraction: float, seed: int
) -> None:
    chosen = stratified_mask(labels, fraction, seed)
    counts = np.bincount(labels)
    given_by_class = np.bincount(labels[chosen], minlength=len(counts))
    could_give = (given_by_class == np.floor(counts * fraction)) & (given_by_class + 1 < counts)
    if set(labels[~chosen]) != set(labels):
        assert not could_give.any()


def test_single_samples_stay_where_they_are() -> None:
    labels = np.array([7] * 10 + [-3, 1 << 40])
    for seed in range(20):
        assert stratified_mask(labels, 0.5, seed)[-2:].tolist() == [False, False]
        assert stratified_mask(labels, 0.5, seed).sum() == 6


def mask_within(
    labels: np.ndarray, groups: np.ndarray, fraction: float, seed: int, stream: int = PARTITION_STREAM
) -> np.ndarray:
    """A fraction of each class, with its groups in proportion, as packing chooses it."""
    _, classes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    strata, sizes, quotas = group_quotas(classes, groups, stratified_quotas(counts, fraction), seed, stream)
    return np.concatenate([*iterate_stratified_mask(strata, sizes, quotas, seed, stream)])


@given(data=st.data(), fraction=fractions, seed=seeds)
def test_groups_within_a_class_have_their_share_of_what_it_gives(
    data: st.DataObject, fraction: float, seed: int
) -> None:
    labels = data.draw(labellings)
    groups = np.array(data.draw(st.lists(st.integers(-5, 5), min_size=len(labels), max_size=len(labels))))
    chosen = mask_within(labels, groups, fraction, seed)
    alone = stratified_mask(labels, fraction, seed)
    np.testing.assert_array_equal(np.bincount(labels[chosen]), np.bincount(labels[alone]))
    for label in np.unique(labels):
        mine = labels == label
        for group in np.unique(groups[mine]):
            both = mine & (groups == group)
            assert abs(chosen[both].sum() - chosen[mine].mean() * both.sum()) < 1


def test_of_groups_of_one_sample_each_any_is_chosen() -> None:
    """2,000 draws of 3 of 12, each its own group: each sample comes about 500 times."""
    labels = np.repeat([0, 1], [12, 12])
    counts = np.sum([mask_within(labels, np.arange(24), 0.25, seed) for seed in range(2000)], axis=0)
    assert np.abs(counts - 500).max() < 5 * (2000 * 0.25 * 0.75) ** 0.5


def test_streams_choose_independently() -> None:
    labels = np.zeros(10_000, np.int64)
    one, other = (mask_within(labels, labels, 0.5, 3, PARTITION_STREAM + number) for number in (1, 2))
    assert abs((one & other).mean() - 0.25) < 0.02


@given(labels=labellings, fraction=fractions, seed=seeds)
def test_is_a_pure_function_of_its_arguments(labels: NDArray[np.int64], fraction: float, seed: int) -> None:
    before = labels.copy()
    first = stratified_mask(labels, fraction, seed)
    np.testing.assert_array_equal(stratified_mask(labels.copy(), fraction, seed), first)
    np.testing.assert_array_equal(labels, before)


@given(labels=labellings, folds=st.integers(2, 9))
def test_folds_differ_by_at_most_one_sample_also_of_each_class(labels: NDArray[np.int64], folds: int) -> None:
    part = stratified_folds(labels, folds, 5, FOLD_STREAM)
    for chosen in (part, *(part[labels == label] for label in np.unique(labels))):
        assert np.ptp(np.bincount(chosen, minlength=folds)) <= 1
    np.testing.assert_array_equal(part, stratified_folds(labels, folds, 5, FOLD_STREAM))


def test_folds_depend_on_the_seed_alone() -> None:
    labels = np.repeat(np.arange(4), 25)
    first, second = (stratified_folds(labels, 5, seed, FOLD_STREAM) for seed in (0, 1))
    assert (first != second).mean() == pytest.approx(0.8, abs=0.15)
    assert stratified_folds(np.zeros(8, np.int64), 3, 0, FOLD_STREAM).tolist() == [1, 1, 1, 0, 0, 2, 0, 2]


def test_golden_choice() -> None:
    """Pinned: validation parts of runs that were made, and the digits' test part, depend on it."""
    labels = np.arange(20) % 3
    assert np.flatnonzero(stratified_mask(labels, 0.3, 0)).tolist() == [2, 7, 9, 10, 12, 17]
    assert np.flatnonzero(stratified_mask(labels, 0.3, 1)).tolist() == [1, 2, 6, 7, 8, 12]


def test_every_sample_of_a_class_is_as_likely() -> None:
    """2,000 draws of 3 of 12: each sample comes about 500 times."""
    labels = np.repeat([0, 1], [12, 12])
    counts = np.sum([stratified_mask(labels, 0.25, seed) for seed in range(2000)], axis=0)
    assert np.abs(counts - 500).max() < 5 * (2000 * 0.25 * 0.75) ** 0.5


@given(labels=labellings, validation=st.floats(0, 0.9), subset=st.floats(0.05, 1), seed=seeds)
def test_carved_parts_are_disjoint_and_of_the_sizes_asked_for(
    labels: NDArray[np.int64], validation: float, subset: float, seed: int
) -> None:
    train, aside = split(labels, validation, subset, seed)
    assert len(np.intersect1d(train, aside)) == 0
    assert len(np.unique(train)) == len(train) and len(np.unique(aside)) == len(aside)
    assert len(aside) == round(validation * len(labels))
    assert len(train) == round(subset * (len(labels) - len(aside)))


@pytest.mark.parametrize("subset", [0.01, 0.1, 0.5])
def test_a_smaller_subset_is_judged_by_the_same_validation_part(subset: float) -> None:
    labels = np.random.default_rng(1).integers(0, 10, 2000)
    all_train, all_aside = split(labels, 0.2, 1.0, 5)
    train, aside = split(labels, 0.2, subset, 5)
    np.testing.assert_array_equal(aside, all_aside)
    assert set(train) < set(all_train)


def test_without_validation_all_is_trained_on() -> None:
    labels = np.arange(50) % 4
    train, aside = split(labels, 0.0, 1.0, 0)
    assert train.tolist() == list(range(50))
    assert aside.tolist() == []


@given(seed=seeds, data=st.data())
def test_the_smallest_words_of_each_stratum_are_chosen(seed: int, data: st.DataObject) -> None:
    """Compared with a sort of all words, stratum by stratum; pieces and narrow windows change nothing."""
    strata = data.draw(labellings)
    sizes = np.bincount(strata, minlength=15)
    quotas = np.array([data.draw(st.integers(0, int(size))) for size in sizes])
    keys = random_keys(seed, 9, len(strata))
    expected = np.zeros(len(strata), bool)
    for stratum, quota in enumerate(quotas):
        members = np.flatnonzero(strata == stratum)
        expected[members[np.argsort(keys[members], kind="stable")[:quota]]] = True
    pieces = list(iterate_stratified_mask(strata, sizes, quotas, seed, 9))
    np.testing.assert_array_equal(np.concatenate(pieces), expected)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stratified, "_PIECE", 64)
        patch.setattr(stratified, "_MARGIN", 0.1)
        pieces = list(iterate_stratified_mask(strata, sizes, quotas, seed, 9))
    np.testing.assert_array_equal(np.concatenate(pieces), expected)
    assert len(pieces) == -(-len(strata) // 64)


def test_absent_classes_contribute_nothing() -> None:
    assert stratified_quotas(np.array([0, 2, 0, 1, 0]), 0.5).tolist() == [0, 1, 0, 1, 0]
