"""Labels that are probably wrong: the published rule, flipped labels of the digits, and packing without them."""

from __future__ import annotations

import csv
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import pack_splits

from pipeline.packing.repack import packed_splits
from shards import UserError
from trainer.checkpoint.completed_run import CompletedRun
from trainer.predict import label_errors
from trainer.predict.label_errors import find_label_errors
from trainer.report.__main__ import main as report_main


def test_a_label_is_wrong_if_another_class_is_as_probable_as_its_own_images_are() -> None:
    """The mean probabilities of the classes are 0.7, 0.6 and 0.5."""
    labels = np.array([0, 0, 0, 1, 1, 2, 2, 2])
    probabilities = np.array(
        [
            [1.0, 0.0, 0.0],
            [0.9, 0.05, 0.05],
            [0.2, 0.65, 0.15],  # reaches 0.6 of class 1: margin -0.45
            [0.15, 0.8, 0.05],
            [0.3, 0.4, 0.3],  # its largest probability is its own
            [0.05, 0.05, 0.9],
            [0.55, 0.0, 0.45],  # class 0 is more probable, but below 0.7
            [0.85, 0.0, 0.15],  # reaches 0.7 of class 0: margin -0.7
        ],
        np.float32,
    )
    assert find_label_errors(labels, probabilities).tolist() == [7, 2]


def reference(labels: np.ndarray, probabilities: np.ndarray) -> list[int]:
    """Equation 1 of Northcutt et al. 2021, sample by sample, in order of the normalized margin.

    As in cleanlab, a sample whose label is its most probable class counts as correct.
    """
    classes = range(probabilities.shape[1])
    thresholds = [
        np.mean([p[k] for p, label in zip(probabilities, labels, strict=True) if label == k]) for k in classes
    ]
    margins = {}
    for sample, (p, label) in enumerate(zip(probabilities, labels, strict=True)):
        confident = [k for k in classes if p[k] >= thresholds[k]]
        if confident and max(confident, key=lambda k: p[k]) != label and p.argmax() != label:
            margins[sample] = p[label] - max(p[k] for k in classes if k != label)
    return sorted(margins, key=margins.__getitem__)


def test_random_predictions_are_judged_as_published() -> None:
    random = np.random.default_rng(3)
    probabilities = random.dirichlet([0.4] * 5, 300)
    labels = np.array([random.choice(5, p=p) for p in probabilities])
    expected = reference(labels, probabilities)
    assert len(expected) > 20
    assert find_label_errors(labels, probabilities).tolist() == expected


def test_a_class_without_images_is_suspected_of_none() -> None:
    probabilities = np.array([[0.6, 0.1, 0.3], [0.1, 0.2, 0.7], [0.2, 0.7, 0.1]], np.float32)
    assert find_label_errors(np.array([0, 1, 1]), probabilities).tolist() == []
    assert find_label_errors(np.array([0, 2, 0]), probabilities[[0, 1, 1]]).tolist() == [2]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["trainer.predict.label_errors", *map(str, arguments)])
    assert label_errors.main() == 0


@pytest.mark.parametrize("given", ["run.dir=runs/mine", "data.fold=2/5", "resume=never"])
def test_settings_of_the_folds_are_refused(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["trainer.predict.label_errors", "quickstart", given])
    with pytest.raises(UserError) as caught:
        label_errors.main()
    assert caught.value.found == given.partition("=")[0]


def test_flipped_labels_are_found(
    digits_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train, test = packed_splits(digits_set)
    train = train.select(np.arange(0, 1438, 2))
    flipped = np.random.default_rng(0).choice(len(train.labels), 40, replace=False)
    labels = train.labels.copy()
    labels[flipped] = (labels[flipped] + 3) % 10
    shards = pack_splits((replace(train, labels=labels), test), tmp_path / "flipped")
    recipe = tmp_path / "recipe.yaml"
    content = {
        "data": {"shards": str(shards), "resolution": 12, "val_fraction": 0},
        "loader": {"batch_size": 16},
        "model": {"name": "three_block_cnn"},
        "optim": {"lr": 3e-3},
        "trainer": {"epochs": 3, "precision": "fp32"},
    }
    recipe.write_text(yaml.safe_dump(content))
    out = tmp_path / "errors"
    run(monkeypatch, recipe, "--folds", 2, "--out", out)

    lines = list(csv.DictReader((out / "label_errors.csv").open()))
    found = [int(line["row"]) for line in lines]
    wrong = set(train.source_index[flipped].tolist())
    assert len(wrong & set(found)) / len(found) > 0.7  # precision
    assert len(wrong & set(found)) / len(wrong) > 0.6  # recall
    assert set(found[:10]) <= wrong  # the most suspicious first
    of_row = dict(zip(train.source_index.tolist(), labels.tolist(), strict=True))
    assert all(line["part"] == "train" and line["label"] == str(of_row[int(line["row"])]) for line in lines)
    page = (out / "label_errors.html").read_text()
    assert re.findall(r'alt="row (\d+)"', page) == [line["row"] for line in lines]
    assert page.count('src="data:image/png;base64,') == len(lines)

    # Each run was tested on its own part, and no image is in both.
    parts = [np.load(out / f"fold-{number}" / "predictions.npz")["rows"] for number in (1, 2)]
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.sort(train.source_index))
    _, store = CompletedRun.open(out / "fold-2").data()
    assert store.manifest.split == "train"
    monkeypatch.setattr(sys, "argv", ["trainer.report", str(out / "fold-2")])
    assert report_main() == 0

    # Other numbers of folds are refused, in the words of this command.
    for folds, expected in ((1, "two parts or more"), (3, "(--folds 3)")):
        with pytest.raises(UserError) as caught:
            run(monkeypatch, recipe, "--folds", folds, "--out", out)
        assert expected in caught.value.expected and "--folds" in caught.value.hint

    # Complete folds are not trained again.
    before = (out / "fold-1" / "summary.json").stat().st_mtime_ns
    capsys.readouterr()
    run(monkeypatch, recipe, "--folds", 2, "--out", out)
    assert capsys.readouterr().out.count("run already complete") == 2
    assert (out / "fold-1" / "summary.json").stat().st_mtime_ns == before
    assert [int(line["row"]) for line in csv.DictReader((out / "label_errors.csv").open())] == found
