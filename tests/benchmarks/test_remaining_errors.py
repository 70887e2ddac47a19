"""Errors by look-alike classes, counted by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.training.remaining_errors import coarse_accuracies, count_groups, errors_markdown, group_of, main
from trainer.evaluate.evaluator import ModelOutputs

CLASSES = ("0", "O", "o", "5", "S", "A", "x")
#        true, most probable, second
ANSWERS = ["0 0 O", "0 O 0", "O o 0", "o O o", "5 S 5", "A x 5", "x x A", "S S 5"]


def outputs() -> ModelOutputs:
    logits = np.zeros((len(ANSWERS), len(CLASSES)), np.float32)
    for sample, answer in enumerate(ANSWERS):
        _, best, second = answer.split()
        logits[sample, CLASSES.index(best)], logits[sample, CLASSES.index(second)] = 2, 1
    labels = np.array([CLASSES.index(answer[0]) for answer in ANSWERS])
    return ModelOutputs(np.arange(len(ANSWERS)), labels, logits)


def test_errors_are_counted_by_classes_that_look_alike() -> None:
    found = outputs()
    counts = count_groups(found.labels, found.logits.argmax(axis=1), CLASSES)
    assert list(counts.items()) == [("upper and lower case of a letter", 2), ("0 O o", 1), ("5 S s", 1), ("others", 1)]
    assert group_of("9", "q") and not group_of("9", "A")


def test_accuracies_at_finer_and_coarser_targets() -> None:
    found = outputs()
    assert list(coarse_accuracies(found.labels, found.logits, CLASSES).values()) == [
        pytest.approx(right / 8) for right in (3, 6, 5, 7, 3)
    ]
    found.logits[5] = 0
    found.logits[5, CLASSES.index("A")], found.logits[5, CLASSES.index("x")] = 0.1, 0.2  # below the mean of x, 0.49
    text = errors_markdown(found, CLASSES)
    assert "| 0 O o                            |      1 | 20.00% |               1 |" in text
    assert "| others                           |      1 | 20.00% |               0 |" in text
    assert "| all                              |      5 |        |               4 |" in text


def test_the_command_agrees_with_the_summary_of_the_run(
    digits_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["remaining_errors", str(digits_run), "--out", str(tmp_path)])
    assert main() == 0
    summary = json.loads((digits_run / "summary.json").read_text())
    shown = capsys.readouterr().out
    assert f"| class                             |   {summary['accuracy']:.2%} |" in shown
    assert f"| all                |{round((1 - summary['accuracy']) * summary['samples']):7} |" in shown
    assert (tmp_path / "remaining_errors.md").read_text().strip() in shown
    assert Image.open(tmp_path / "remaining_errors.png").width > 500
