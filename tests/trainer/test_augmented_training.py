"""A recipe with preparation and augmentation: what is evaluated is prepared alike and not augmented."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

from pipeline.preview import upright
from pipeline.transforms.augmentation import Augmentation
from shards import UserError, open_split
from trainer.config.load import load
from trainer.data.training_data import open_data
from trainer.evaluate.evaluator import evaluate_run
from trainer.predict.predictor import Predictor
from trainer.run import main
from trainer.runtime.distributed import World

RECIPE = ROOT / "configs" / "quickstart.yaml"
WORLD = World(0, 1, torch.device("cpu"))
OVERRIDES = (
    *(
        "data.resolution=10x14",
        "data.train_fraction=0.3",
        "trainer.epochs=2",
        "trainer.precision=fp32",
        "loader.batch_size=64",
    ),
    *("data.invert=true", "data.equalize=true", "augment.rotation=10", "augment.elastic=0.04", "augment.stroke=0.4"),
)


@pytest.fixture(scope="module")
def trained(digits_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("augmented") / "run"
    with pytest.MonkeyPatch.context() as patch:
        settings = (f"data.shards={digits_set}", f"run.dir={directory}")
        patch.setattr(sys, "argv", ["trainer.run", str(RECIPE), *settings, *OVERRIDES])
        assert main() == 0
    return directory


def test_evaluation_prepares_images_as_training_did(trained: Path, digits_set: Path) -> None:
    found = evaluate_run(trained, str(digits_set), WORLD)
    summary = json.loads((trained / "summary.json").read_text())
    assert found["accuracy"] == summary["accuracy"]
    assert found["loss"] == pytest.approx(summary["loss"], rel=1e-6)


def test_a_rectangular_input_is_reported_and_predicted(trained: Path, digits_set: Path) -> None:
    summary, predictor = json.loads((trained / "summary.json").read_text()), Predictor(trained, "cpu")
    assert summary["resolution"] == predictor.resolution == "10x14"
    assert " at 10\u00d714 on " in (trained / "report.html").read_text(encoding="utf-8")
    store = open_split(digits_set, "test")
    images = [upright(image, store.manifest.transposed) for image in store.read(np.arange(40))]
    predictions = predictor.predict(images)
    assert predictions.images.shape == (40, 10, 14, 1)
    with np.load(trained / "predictions.npz") as evaluated:
        by_row = dict(zip(evaluated["rows"].tolist(), evaluated["predicted"].tolist(), strict=True))
    expected = [by_row[row] for row in store.rows[:40].tolist()]
    assert predictions.probabilities.argmax(axis=1).tolist() == expected


def test_only_training_is_augmented_and_statistics_are_free_of_it(digits_set: Path) -> None:
    settings = [f"data.shards={digits_set}", *OVERRIDES]
    data = open_data(load(RECIPE, settings), WORLD)
    off = [f"augment.{name}=0" for name in ("rotation", "elastic", "stroke")]
    plain = open_data(load(RECIPE, [*settings, *off]), WORLD)
    assert (data.spec, data.spec.preprocessing.invert) == (plain.spec, True)
    for mine, other in ((data.validation, plain.validation), (data.test, plain.test)):
        assert torch.equal(next(mine.batches()).images, next(other.batches()).images)
    one, other = next(data.train.batches(0)), next(plain.train.batches(0))
    assert torch.equal(one.source_index, other.source_index)
    assert (one.images - other.images).abs().amax(dim=(1, 2, 3)).min() > 0.1, "every image is changed"
    again = [next(data.train.batches(epoch)).images for epoch in (0, 1)]
    assert torch.equal(again[0], one.images)
    assert not torch.equal(again[1][: len(one.source_index)], one.images)
    assert isinstance(data.train.sampler_at(0).augmentation, Augmentation)
    assert np.isfinite(data.spec.mean).all()


def test_colours_of_grey_images_are_warned_about(digits_set: Path, caplog: pytest.LogCaptureFixture) -> None:
    for override, lines in (("augment.hue=10", 1), ("augment.contrast=0.1", 0)):
        caplog.clear()
        open_data(load(RECIPE, [f"data.shards={digits_set}", override]), WORLD)
        assert len(caplog.messages) == lines, override


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("augment.erase_area_min=0.5", "augment.erase_area_max=0.2"),
        ("augment.flip=3", "augment.flip=3"),
        ("augment.rotate=3", "unknown setting augment.rotate"),
        ("data.invert=maybe", "data.invert=maybe"),
    ],
)
def test_settings_that_make_no_sense_are_refused(override: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        load(RECIPE, ["data.shards=x", override])
    assert said in caught.value.found


def test_settings_without_effect_are_said() -> None:
    config = load(RECIPE, ["augment.fill=3", "augment.erase_at=contour", "augment.elastic_sigma=0.2"])
    lines = list(config.settings_without_effect())
    assert [line.split()[0] for line in lines] == [
        "augment.elastic_sigma",
        "augment.fill",
        "augment.erase_at",
    ]
    assert not list(load(RECIPE, ["augment.fill=3", "augment.rotation=3"]).settings_without_effect())
