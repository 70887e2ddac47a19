"""The pictures of the predictions that loggers receive."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import pack_splits, synthetic_splits
from support.training_runs import train_here, write_recipe

from pipeline.preview import read_images
from shards import open_split
from trainer.loop import train
from trainer.report import run_page
from trainer.runtime.loggers.base import PredictionImages

SETTINGS: dict[str, Any] = {
    "data": {"val_fraction": 0, "resolution": 8, "fold": "2/3"},
    "loader": {"batch_size": 8},
    "model": {"name": "three_block_cnn"},
    "optim": {"lr": 1e-5},
    "trainer": {"precision": "fp32", "epochs": 1},
    "logging": {"tensorboard": True},
}


def test_errors_of_a_fold_have_their_own_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    splits = synthetic_splits(train=96, test=8, classes=3, shape=(8, 8, 1), transposed=False)
    recipe = write_recipe(tmp_path / "small.yaml", SETTINGS, pack_splits(splits, tmp_path / "set", block_size=16))
    drawn: list[PredictionImages] = []
    mapped: list[int] = []
    draw = train.prediction_images

    def drawing(*arguments: Any) -> PredictionImages:
        drawn.append(draw(*arguments))
        return drawn[0]

    def mapping(store: Any, trained: Any, samples: Any, predicted: Any) -> None:
        mapped.extend(store.rows[samples].tolist())

    monkeypatch.setattr(train, "prediction_images", drawing)
    monkeypatch.setattr(run_page, "grad_cam_pictures", mapping)
    assert train_here(monkeypatch, recipe, tmp_path / "run") == 0
    store = open_split(tmp_path / "set", "train")
    images = dict(zip(store.rows.tolist(), read_images(store, np.arange(len(store))), strict=True))
    assert len(drawn[0].errors) > 5
    for error in drawn[0].errors:
        np.testing.assert_array_equal(np.asarray(error.image)[..., 0], images[error.row][..., 0])
    assert {error.row for error in drawn[0].errors} >= set(mapped) and len(mapped) > 5
