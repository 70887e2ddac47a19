"""Subsets of large stores: exact shares of each class from few ranges, reading few labels."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.common import labelled_samples
from pipeline.common.index_ranges import IndexRanges
from pipeline.common.labelled_samples import LabelledSamples, SamplesByClass
from pipeline.common.rng import FOLD_STREAM
from pipeline.common.stratified import stratified_folds, stratified_mask
from shards.errors import CorruptError

SEEDS = st.integers(0, 2**63 - 1)
labellings = st.lists(st.integers(0, 5), min_size=1, max_size=300).map(lambda labels: np.array(labels, np.uint8))


def every(labels: NDArray[np.uint8], is_shuffled: bool = True) -> LabelledSamples:
    counts = np.bincount(labels, minlength=6)
    return LabelledSamples(labels, IndexRanges.first(len(labels)), counts, is_shuffled)


def check(samples: LabelledSamples) -> list[int]:
    found = np.asarray(samples.samples)
    assert np.bincount(samples.labels[found], minlength=6).tolist() == samples.counts.tolist()
    assert (np.diff(found) > 0).all()
    return found.tolist()


@pytest.fixture(autouse=True)
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """All stores are large, and read in several chunks."""
    monkeypatch.setattr(labelled_samples, "_MAX_SORTED", 0)
    monkeypatch.setattr(labelled_samples, "_CHUNK", 32)


@given(labels=labellings, fractions=st.tuples(st.floats(0, 1), st.floats(0, 1)), seed=SEEDS)
def test_fractions_have_the_class_counts_of_the_stratified_choice(
    labels: NDArray[np.uint8], fractions: tuple[float, float], seed: int
) -> None:
    rest = every(labels)
    remaining = set(range(len(labels)))
    for fraction in fractions:
        expected = stratified_mask(labels[sorted(remaining)], fraction, seed)
        chosen, rest = rest.split(fraction, seed)
        found = check(chosen)
        assert chosen.counts.tolist() == np.bincount(labels[sorted(remaining)][expected], minlength=6).tolist()
        assert set(found) <= remaining
        remaining -= set(found)
        assert check(rest) == sorted(remaining)


@given(labels=labellings, folds=st.integers(2, 7), seed=SEEDS, fraction=st.floats(0, 1))
def test_folds_have_the_class_counts_of_the_stratified_parts(
    labels: NDArray[np.uint8], folds: int, seed: int, fraction: float
) -> None:
    part = stratified_folds(labels, folds, seed, FOLD_STREAM)
    tested: list[int] = []
    for number in range(folds):
        held_out, rest = every(labels).fold(number, folds, seed)
        assert held_out.counts.tolist() == np.bincount(labels[part == number], minlength=6).tolist()
        tested += (here := check(held_out))
        assert sorted(here + check(rest)) == list(range(len(labels)))
        validation, train = rest.split(fraction, seed)
        assert sorted(here + check(validation) + check(train)) == list(range(len(labels)))
    assert sorted(tested) == list(range(len(labels)))


def test_a_choice_starts_at_a_random_sample() -> None:
    labels = np.random.default_rng(0).integers(0, 3, 1000).astype(np.uint8)
    starts = [int(every(labels).split(0.01, seed)[0].samples[np.arange(1)][0]) for seed in range(100)]
    assert np.histogram(starts, 4, (0, 1000))[0].min() > 10


class CountedLabels(np.ndarray):
    read = 0

    def __getitem__(self, positions: NDArray[np.int64]) -> NDArray[np.uint8]:
        CountedLabels.read += len(positions)
        return np.asarray(super().__getitem__(positions))


def test_a_small_part_of_a_large_store_reads_few_labels_and_is_few_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labelled_samples, "_CHUNK", 1 << 10)
    labels = np.random.default_rng(0).integers(0, 5, 200_000).astype(np.uint8)
    samples = every(labels)
    samples = LabelledSamples(labels.view(CountedLabels), samples.samples, samples.counts, True)
    for fraction in (0.1, 0.9):
        CountedLabels.read = 0
        chosen, rest = samples.split(fraction, 1)
        assert CountedLabels.read < 25_000
        assert len(chosen) == round(200_000 * fraction) and len(chosen) + len(rest) == 200_000
        for part in (chosen, rest):
            assert isinstance(part.samples, IndexRanges) and len(part.samples.bounds) < 2000


def test_small_stores_and_stores_in_their_own_order_are_drawn_by_sorting(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = np.arange(100, dtype=np.uint8) % 6
    expected = np.flatnonzero(stratified_mask(labels, 0.3, 7)).tolist()
    assert check(every(labels, is_shuffled=False).split(0.3, 7)[0]) == expected
    monkeypatch.setattr(labelled_samples, "_MAX_SORTED", 100)
    assert check(every(labels).split(0.3, 7)[0]) == expected
    held_out, _ = every(labels).fold(1, 3, 7)
    assert check(held_out) == np.flatnonzero(stratified_folds(labels, 3, 7, FOLD_STREAM) == 1).tolist()


@pytest.mark.parametrize("count", [200, 70_000])
def test_samples_by_class_are_in_random_order_in_four_bytes(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(labelled_samples, "_CHUNK", 1 << 12)
    labels = np.random.default_rng(0).integers(0, 5, count).astype(np.uint8)
    chosen, _ = every(labels).split(0.8, 3)
    by_class = SamplesByClass(chosen, 3)
    assert by_class.samples.dtype == np.uint32
    ends = np.cumsum(by_class.counts)
    for label, (start, end) in enumerate(zip(ends - by_class.counts, ends, strict=True)):
        own = by_class.samples[start:end]
        assert np.sort(own).tolist() == [sample for sample in np.asarray(chosen.samples) if labels[sample] == label]
        if len(own):
            assert abs(np.corrcoef(own, np.arange(len(own)))[0, 1]) < 4 / len(own) ** 0.5


@given(labels=labellings, seed=SEEDS, epoch=st.integers(0, 1000), data=st.data())
def test_classes_are_drawn_in_turn(labels: NDArray[np.uint8], seed: int, epoch: int, data: st.DataObject) -> None:
    by_class = SamplesByClass(every(labels), seed)
    drawn = np.array([data.draw(st.integers(0, 20)) if count else 0 for count in by_class.counts])
    expected: list[int] = []
    for label, number in enumerate(drawn.tolist()):
        turn = by_class.samples[labels[by_class.samples] == label].tolist()
        expected += [turn[(epoch * number + place) % len(turn)] for place in range(number)]
    assert by_class.draw(drawn, epoch).tolist() == sorted(expected)


def test_a_label_of_no_class_is_refused() -> None:
    """Labels of large stores are not checked on opening: this one is damaged."""
    samples = LabelledSamples(np.full(81, 6, np.uint8), IndexRanges.first(81), np.array([41, 40]), True)
    with pytest.raises(CorruptError, match=r"labels.npy: a label outside 0 \.\. 1"):
        samples.split(0.4, 0)
