"""Predictions that a run is sure of, as labels: listed, and packed beside the images that have some."""

from __future__ import annotations

import csv
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import pack_splits
from PIL import Image
from support.training_runs import train_here

from pipeline.packing.pack import ORIGINS
from pipeline.packing.repack import packed_splits
from shards import UserError, open_split
from trainer.predict import pseudo_label
from trainer.predict.predictor import Predictor


@pytest.fixture(scope="module")
def sets(digits_set: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Digits with labels, and others of which all are said to be 0, ten of them also in the test part."""
    directory = tmp_path_factory.mktemp("pseudo")
    train, test = packed_splits(digits_set)
    labelled = train.select(np.arange(700))
    rest = train.select(np.arange(700, 1100))
    images = np.concatenate([rest.read(rest.source_index), test.read(test.source_index[:10])])
    unlabelled = type(train).from_arrays(
        "train", images, np.zeros(len(images), np.int64), train.classes, transposed=train.transposed
    )
    return (
        pack_splits((labelled, test), directory / "labelled"),
        pack_splits((unlabelled, test), directory / "unlabelled"),
    )


@pytest.fixture(scope="module")
def run(sets: tuple[Path, Path]) -> Path:
    recipe = sets[0].parent / "few.yaml"
    content = {
        "data": {"shards": str(sets[0]), "resolution": 12, "val_fraction": 0.2},
        "loader": {"batch_size": 32},
        "model": {"name": "three_block_cnn"},
        "posthoc": {"tau": 0.5},
        "loss": {"class_weights": "inverse"},
        "trainer": {"epochs": 3, "precision": "fp32"},
    }
    recipe.write_text(yaml.safe_dump(content))
    with pytest.MonkeyPatch.context() as patch:
        assert train_here(patch, recipe, sets[0].parent / "run") == 0
    return sets[0].parent / "run"


def label(*arguments: object) -> None:
    """Run the command in this process, which saves the start of another."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["trainer.predict.pseudo_label", *map(str, arguments)])
        assert pseudo_label.main() == 0


def test_what_it_is_sure_of_is_listed_and_packed(
    run: Path, sets: tuple[Path, Path], digits_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    labelled, unlabelled = sets
    table, out = tmp_path / "labels.csv", tmp_path / "more"
    command = (run, unlabelled, "--confidence", 0.8, "--csv", table, "--add-to", labelled, "--out", out)
    label(*command)
    said = capsys.readouterr().out
    lines = list(csv.DictReader(table.open()))
    assert 150 < len(lines) < 410
    assert f"{len(lines):,} of 410 images labelled" in said
    assert min(float(line["confidence"]) for line in lines) >= 0.8
    truth = packed_splits(digits_set)
    known = np.concatenate([truth[0].labels[700:1100], truth[1].labels[:10]])
    right = np.mean([known[int(line["row"])] == int(line["label"]) for line in lines])
    assert right > 0.9, "the labels 0 that they came with are not looked at"

    held = sum(int(line["row"]) >= 400 for line in lines)
    assert held > 0 and f"{held} skipped (also in another split)" in said
    train = open_split(out, "train")
    assert len(train) == 700 + len(lines) - held
    assert (
        open_split(out, "test").manifest.digest()
        == open_split(labelled, "test")
        .manifest.model_copy(update={"options": open_split(out, "test").manifest.options})
        .digest()
    )
    origins = list(csv.DictReader((out / "train" / ORIGINS).open()))
    added = [line for line in origins if line["from"] == "pseudo-labelled"]
    by_row = {line["row"]: line for line in lines}
    label_of = dict(zip(train.rows.tolist(), train.labels.tolist(), strict=True))
    for line in added:
        assert by_row[line["from_row"]]["label"] == str(label_of[int(line["row"])])
        assert by_row[line["from_row"]]["confidence"] == line["confidence"]
    assert {line["confidence"] for line in origins if line["from"] == "train"} == {""}
    label(*command)
    assert "already packed" in capsys.readouterr().out


def test_image_files_are_labelled_and_packed_beside_labelled_images(
    run: Path, sets: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The added images are the files' pixels, in the orientation of the set, with the classes that the run predicts."""
    unlabelled = open_split(sets[1], "train")
    folder, out, table = tmp_path / "testing-a", tmp_path / "more", tmp_path / "labels.csv"
    folder.mkdir()
    raw = np.empty((30, *unlabelled.manifest.image_shape), np.uint8)
    unlabelled.gather(np.arange(30), raw)
    upright = raw[..., 0].swapaxes(1, 2) if unlabelled.manifest.transposed else raw[..., 0]
    for number, image in enumerate(upright):
        Image.fromarray(image).save(folder / f"{number}.png")
    (folder / "broken.png").write_bytes(b"text")
    label(run, folder, "--confidence", 0.01, "--csv", table, "--add-to", sets[0], "--out", out)
    assert "30 of 30 images labelled" in capsys.readouterr().out
    lines = list(csv.DictReader(table.open()))
    assert [line["path"] for line in lines] == [str(folder / f"{number}.png") for number in range(30)]
    train = open_split(out, "train")
    origins = [line for line in csv.DictReader((out / "train" / ORIGINS).open()) if line["from"] == "pseudo-labelled"]
    assert len(train) == 700 + len(origins) and len(origins) >= 25  # images of other splits are left out
    at = {row: place for place, row in enumerate(train.rows.tolist())}
    predictor = Predictor(run)
    for line in origins:
        place = at[int(line["row"])]
        stored = np.empty((1, *raw.shape[1:]), np.uint8)
        train.gather(np.array([place]), stored)
        image = predictor.adapter.adapt(Path(line["path"]).read_bytes()).image
        assert np.array_equal(stored[0].swapaxes(0, 1) if train.manifest.transposed else stored[0], image)
        predicted = predictor.predict([image]).probabilities[0]
        assert train.labels[place] == predicted.argmax() == int(lines[int(line["from_row"])]["label"])


def test_what_cannot_be_labelled_is_refused(
    run: Path, sets: tuple[Path, Path], synthetic_set: Path, tmp_path: Path
) -> None:
    command = (run, sets[1], "--confidence", 0.8)
    with pytest.raises(UserError, match="--csv FILE"):
        label(*command)
    with pytest.raises(UserError, match=r"2 inputs, of which .* is a packed data set"):
        label(run, sets[0].parent, sets[1], "--confidence", 0.8, "--csv", tmp_path / "labels.csv")
    with pytest.raises(UserError, match=r"--add-to .* with classes class 0"):
        label(*command, "--add-to", synthetic_set, "--out", tmp_path / "out")
    with pytest.raises(UserError, match="without --add-to"):
        label(*command, "--out", tmp_path / "out")
    unsure = (run, sets[1], "--add-to", sets[0], "--out", tmp_path / "out", "--confidence")
    with pytest.raises(UserError, match="no image with a confidence of at least 100") as caught:
        label(*unsure, 1)
    assert not (tmp_path / "out").exists()
    label(*unsure, caught.value.hint.split()[1].rstrip(","))
    with pytest.raises(UserError, match="packed with confidence") as caught:
        label(*unsure, 0.8)
    assert caught.value.hint.startswith("choose another --out, or add --force")
    label(*unsure, 0.8, "--force")
    assert open_split(tmp_path / "out", "train").manifest.options["confidence"] == 0.8


@pytest.mark.parametrize("has_val_split", [False, True])
def test_pseudo_labels_among_the_validation_images_are_warned_of(
    digits_set: Path, tmp_path: Path, has_val_split: bool, caplog: pytest.LogCaptureFixture
) -> None:
    train, test = packed_splits(digits_set)
    val = (replace(train.select(np.arange(50, 80)), name="val"),) if has_val_split else ()
    labelled = pack_splits((train.select(np.arange(50)), *val, test), tmp_path / "labelled")
    unlabelled = train.select(np.arange(100, 120))
    pseudo = pseudo_label.PseudoLabels(unlabelled.source_index, unlabelled.labels, np.ones(20, np.float32))
    out = str(tmp_path / "out")
    pseudo_label.add_pseudo_labels(labelled, out, unlabelled, pseudo, train.classes, {}, False)
    assert ("has no val split" in caplog.text) != has_val_split
    assert ("--val-fraction 0.1" in caplog.text) != has_val_split
