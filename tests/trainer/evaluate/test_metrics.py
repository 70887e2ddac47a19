"""All figures from one confusion matrix, held against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, precision_recall_fscore_support

from trainer.evaluate.metrics import ConfusionMatrix

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


@pytest.mark.filterwarnings("ignore:A single label was found")
@given(labels_and_predictions())
def test_figures_are_those_of_scikit_learn(made: Pairs) -> None:
    classes, pairs = made
    true, said = columns(pairs)
    every = range(classes)
    confusion = ConfusionMatrix.of(true, said, classes)
    assert np.array_equal(confusion.counts, confusion_matrix(true, said, labels=every))
    assert confusion.samples == len(pairs)
    precision, recall, f1, support = precision_recall_fscore_support(true, said, labels=every, zero_division=0)
    assert confusion.accuracy == pytest.approx(accuracy_score(true, said))
    assert confusion.precision == pytest.approx(precision)
    assert confusion.recall == pytest.approx(recall)
    assert confusion.f1 == pytest.approx(f1)
    assert np.array_equal(confusion.support, support)
    assert confusion.macro_f1 == pytest.approx(f1_score(true, said, average="macro", zero_division=0))
    assert confusion.weighted_f1 == pytest.approx(f1_score(true, said, average="weighted", zero_division=0))
    assert confusion.summary() == {
        "accuracy": confusion.accuracy,
        "macro_f1": confusion.macro_f1,
        "weighted_f1": confusion.weighted_f1,
        "samples": len(pairs),
    }


@given(labels_and_predictions(), st.integers(1, 5))
def test_matrices_of_ranks_add_up_to_the_matrix_of_all(made: Pairs, ranks: int) -> None:
    classes, pairs = made
    true, said = columns(pairs)
    parts = [ConfusionMatrix.of(true[rank::ranks], said[rank::ranks], classes).counts for rank in range(ranks)]
    assert np.array_equal(sum(parts), ConfusionMatrix.of(true, said, classes).counts)


def test_a_class_that_is_absent_counts_for_nothing() -> None:
    """Class 2 is nowhere; class 3 is predicted but never true, which is a fault that macro F1 must see."""
    confusion = ConfusionMatrix.of(np.array([0, 0, 1, 1]), np.array([0, 0, 1, 3]), 4)
    assert confusion.support.tolist() == [2, 2, 0, 0]
    assert confusion.precision.tolist() == [1, 1, 0, 0]
    assert confusion.recall.tolist() == [1, 0.5, 0, 0]
    assert confusion.f1 == pytest.approx([1, 2 / 3, 0, 0])
    assert confusion.macro_f1 == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert confusion.weighted_f1 == pytest.approx((1 + 2 / 3) / 2)


def test_rows_are_true_classes_and_columns_predictions() -> None:
    assert ConfusionMatrix.of(np.array([0, 0, 1]), np.array([1, 1, 0]), 2).counts.tolist() == [[0, 2], [1, 0]]


def test_most_confused_pairs_come_first_and_right_ones_never() -> None:
    confusion = ConfusionMatrix(np.array([[90, 3, 0], [7, 80, 3], [0, 1, 70]]))
    assert confusion.most_confused(3) == [(1, 0, 7), (0, 1, 3), (1, 2, 3)]
    assert confusion.most_confused(100) == [(1, 0, 7), (0, 1, 3), (1, 2, 3), (2, 1, 1)]
    assert confusion.counts[0, 0] == 90, "the matrix is not changed"


def test_a_perfect_classifier_confuses_nothing() -> None:
    assert ConfusionMatrix(np.diag([3, 4])).most_confused(5) == []


def test_metrics_of_each_class_have_its_name() -> None:
    confusion = ConfusionMatrix(np.array([[1, 1, 0], [0, 2, 0], [0, 4, 0]]))
    assert confusion.class_metrics(["a", "b", "c"]) == [
        {"name": "a", "samples": 2, "precision": 1, "recall": 0.5, "f1": pytest.approx(2 / 3)},
        {"name": "b", "samples": 2, "precision": pytest.approx(2 / 7), "recall": 1, "f1": pytest.approx(4 / 9)},
        {"name": "c", "samples": 4, "precision": 0, "recall": 0, "f1": 0},
    ]
    assert {type(value) for row in confusion.class_metrics(["a", "b", "c"]) for value in row.values()} == {
        str,
        int,
        float,
    }
