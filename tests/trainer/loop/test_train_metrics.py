"""Metrics of training predictions, counted on the device, equal those of scikit-learn on unmixed images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import pack_splits, synthetic_splits
from sklearn.metrics import accuracy_score, f1_score
from support.training_runs import train_here, write_recipe

from trainer.loop import engine
from trainer.loop.state import Training

SETTINGS: dict[str, Any] = {
    "data": {"val_fraction": 0.25, "resolution": 8},
    "loader": {"batch_size": 8},
    "model": {"name": "three_block_cnn"},
    "trainer": {"precision": "fp32", "epochs": 2},
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("metrics")
    splits = synthetic_splits(train=64, test=8, classes=3, shape=(8, 8, 1), transposed=False)
    return write_recipe(directory / "small.yaml", SETTINGS, pack_splits(splits, directory / "set", block_size=16))


def history(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_training_metrics_are_those_of_unmixed_images(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the batches are mixed. The decision subtracts tau log w, as in validation."""
    offsets: list[np.ndarray] = []
    steps: list[tuple[int, torch.Tensor, torch.Tensor, bool]] = []  # epoch, logits, labels, mixed
    compute, mix = engine.compute_loss, engine.mix_batch
    mixed: list[tuple[int, torch.Tensor, bool]] = []

    def mixing(config: Any, epoch: int, step: int, rank: int, images: Any, labels: Any, classes: int) -> Any:
        result = mix(config, epoch, step, rank, images, labels, classes)
        is_one_hot = bool((result[1].amax(dim=1) == 1).all())
        mixed.append((epoch, labels, not is_one_hot))
        return result

    def computing(logits: torch.Tensor, *others: Any) -> torch.Tensor:
        epoch, labels, is_mixed = mixed[-1]
        steps.append((epoch, logits.detach().clone(), labels, is_mixed))
        return compute(logits, *others)

    class Meter(engine.EpochMeter):
        def __init__(self, training: Training, *rest: Any) -> None:
            offsets.append(training.offsets)
            super().__init__(training, *rest)

    monkeypatch.setattr(engine, "mix_batch", mixing)
    monkeypatch.setattr(engine, "compute_loss", computing)
    monkeypatch.setattr(engine, "EpochMeter", Meter)
    options = ["mixup.prob=0.5", "loss.class_weights=inverse", "posthoc.tau=1", "optim.lr=0.01"]
    assert train_here(monkeypatch, recipe, tmp_path / "run", *options) == 0
    assert {is_mixed for *_, is_mixed in steps} == {False, True}
    assert offsets[0].any()
    for epoch, record in enumerate(history(tmp_path / "run")):
        own = [step for step in steps if step[0] == epoch and not step[3]]
        labels = torch.cat([labels for _, _, labels, _ in own]).numpy()
        predicted = (torch.cat([logits for _, logits, _, _ in own]).numpy() - offsets[epoch]).argmax(axis=1)
        assert record["train_accuracy"] == accuracy_score(labels, predicted)
        assert record["train_macro_f1"] == pytest.approx(f1_score(labels, predicted, average="macro", zero_division=0))


def test_an_epoch_of_mixed_batches_has_no_training_metrics(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    options = ["mixup.prob=1", "mixup.off_last_epochs=1"]
    assert train_here(monkeypatch, recipe, tmp_path / "run", *options) == 0
    first, second = history(tmp_path / "run")
    assert "train_accuracy" not in first and "train_accuracy" in second
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    assert f"training accuracy {second['train_accuracy']:.2%}" in lines[-1]
    assert "training accuracy" not in lines[0]
