"""All metrics from counts by class, compared with scikit-learn and with a dense confusion matrix."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    confusion_matrix,
    f1_score,
    precision_recall_fscore_support,
)

from trainer.evaluate.metrics import ClassificationMetrics, count_classes_, most_confused
from trainer.evaluate.metrics import confusion_matrix as dense_matrix

Pairs = tuple[int, list[tuple[int, int]]]


@st.composite
def labels_and_predictions(draw: st.DrawFn) -> Pairs:
    """A number of classes (of which some may be absent) and pairs of true and predicted class."""
    classes = draw(st.integers(2, 8))
    number = st.integers(0, classes - 1)
    return classes, draw(st.lists(st.tuples(number, number), min_size=1, max_size=60))


def columns(pairs: list[tuple[int, int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    array = np.array(pairs, np.int64)
    return array[:, 0], array[:, 1]


@pytest.mark.filterwarnings("ignore:A single label was found", "ignore:y_pred contains classes not in y_true")
@given(labels_and_predictions())
def test_figures_are_those_of_scikit_learn(made: Pairs) -> None:
    classes, pairs = made
    true, said = columns(pairs)
    every = range(classes)
    confusion = ClassificationMetrics.of(true, said, classes)
    assert np.array_equal(dense_matrix(true, said, classes), confusion_matrix(true, said, labels=every))
    assert confusion.samples == len(pairs)
    precision, recall, f1, support = precision_recall_fscore_support(true, said, labels=every, zero_division=0)
    assert confusion.accuracy == pytest.approx(accuracy_score(true, said))
    assert confusion.precision == pytest.approx(precision)
    assert confusion.recall == pytest.approx(recall)
    assert confusion.f1 == pytest.approx(f1)
    assert np.array_equal(confusion.support, support)
    assert confusion.macro_f1 == pytest.approx(f1_score(true, said, average="macro", zero_division=0))
    assert confusion.weighted_f1 == pytest.approx(f1_score(true, said, average="weighted", zero_division=0))
    assert confusion.balanced_accuracy == pytest.approx(balanced_accuracy_score(true, said))
    assert confusion.summary() == {
        "accuracy": confusion.accuracy,
        "balanced_accuracy": confusion.balanced_accuracy,
        "macro_f1": confusion.macro_f1,
        "weighted_f1": confusion.weighted_f1,
        "samples": len(pairs),
    }


@pytest.mark.filterwarnings("ignore:A single label was found")
@given(labels_and_predictions())
def test_metrics_equal_those_of_a_dense_matrix_bit_for_bit(made: Pairs) -> None:
    classes, pairs = made
    true, said = columns(pairs)
    dense, metrics = confusion_matrix(true, said, labels=range(classes)), ClassificationMetrics.of(true, said, classes)
    support, predicted, diagonal = dense.sum(axis=1), dense.sum(axis=0), np.diag(dense)
    f1 = 2 * diagonal / np.maximum(support + predicted, 1)
    assert metrics.accuracy == np.trace(dense) / dense.sum()
    assert np.array_equal(metrics.f1, f1)
    assert metrics.macro_f1 == f1[(support + predicted) > 0].mean()
    assert metrics.weighted_f1 == (f1 * support).sum() / support.sum()


@given(labels_and_predictions(), labels_and_predictions())
def test_batches_are_counted_on_the_device(first: Pairs, second: Pairs) -> None:
    classes = max(first[0], second[0])
    counts = torch.zeros(3, classes, dtype=torch.int64)
    for _, pairs in (first, second):
        labels, predicted = map(torch.from_numpy, columns(pairs))
        logits = torch.eye(classes)[predicted]
        count_classes_(counts, labels, logits)
    expected = ClassificationMetrics.of(*columns(first[1] + second[1]), classes)
    assert all(map(np.array_equal, counts.numpy(), vars(expected).values()))


def test_a_million_classes_take_a_few_arrays_of_that_length() -> None:
    """A dense matrix would have 10^12 entries."""
    classes = 1_000_000
    labels = np.arange(0, classes, 1000)
    predicted = np.where(labels < 500_000, labels, classes - 1)
    tracemalloc.start()
    metrics = ClassificationMetrics.of(labels, predicted, classes)
    summary, pairs = metrics.summary(), most_confused(labels, predicted, 2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert summary["accuracy"] == 0.5
    assert summary["macro_f1"] == pytest.approx(500 / 1001)
    assert pairs == [(500_000, 999_999, 1), (501_000, 999_999, 1)]
    assert peak < 100e6


def test_a_class_that_is_absent_counts_for_nothing() -> None:
    """Class 2 is nowhere; class 3 is predicted but never true, which is a fault that macro F1 must see."""
    confusion = ClassificationMetrics.of(np.array([0, 0, 1, 1]), np.array([0, 0, 1, 3]), 4)
    assert confusion.support.tolist() == [2, 2, 0, 0]
    assert confusion.precision.tolist() == [1, 1, 0, 0]
    assert confusion.recall.tolist() == [1, 0.5, 0, 0]
    assert confusion.f1 == pytest.approx([1, 2 / 3, 0, 0])
    assert confusion.macro_f1 == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert confusion.weighted_f1 == pytest.approx((1 + 2 / 3) / 2)


def test_rows_are_true_classes_and_columns_predictions() -> None:
    assert dense_matrix(np.array([0, 0, 1]), np.array([1, 1, 0]), 2).tolist() == [[0, 2], [1, 0]]


def test_most_confused_pairs_come_first_and_right_ones_never() -> None:
    counts = np.array([[90, 3, 0], [7, 80, 3], [0, 1, 70]])
    labels, predicted = (index.repeat(counts.ravel()) for index in np.indices(counts.shape).reshape(2, -1))
    assert most_confused(labels, predicted, 3) == [(1, 0, 7), (0, 1, 3), (1, 2, 3)]
    assert most_confused(labels, predicted, 100) == [(1, 0, 7), (0, 1, 3), (1, 2, 3), (2, 1, 1)]


def test_a_perfect_classifier_confuses_nothing() -> None:
    assert most_confused(np.array([0, 1, 1]), np.array([0, 1, 1]), 5) == []


def test_metrics_of_each_class_have_its_name() -> None:
    labels, predicted = np.array([0, 0, 1, 1, 2, 2, 2, 2]), np.array([0, 1, 1, 1, 1, 1, 1, 1])
    rows = ClassificationMetrics.of(labels, predicted, 3).class_metrics(["a", "b", "c"])
    assert rows == [
        {"name": "a", "samples": 2, "precision": 1, "recall": 0.5, "f1": pytest.approx(2 / 3)},
        {"name": "b", "samples": 2, "precision": pytest.approx(2 / 7), "recall": 1, "f1": pytest.approx(4 / 9)},
        {"name": "c", "samples": 4, "precision": 0, "recall": 0, "f1": 0},
    ]
    assert {type(value) for row in rows for value in row.values()} == {str, int, float}
