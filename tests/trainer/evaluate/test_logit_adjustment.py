"""The class weights undone: the rule against what the loss is minimised by, the search for tau, and in a run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import pack_splits
from numpy.typing import NDArray

from pipeline.datasets import find_source
from pipeline.loader import Loader
from pipeline.readers.raw_split import SourceOptions
from pipeline.sampler import SequentialBatchSampler
from pipeline.transforms.build import build_transform
from pipeline.transforms.spec import TransformSpec
from shards import open_split
from trainer.checkpoint.trained_model import load_trained_model
from trainer.config.schema import LossConfig
from trainer.evaluate import logit_adjustment
from trainer.evaluate.evaluator import evaluate_run
from trainer.evaluate.logit_adjustment import best_tau, fit_posthoc, limit_samples, log_class_weights
from trainer.optim.losses import class_weights, log_priors, weighted_bce, weighted_kl
from trainer.predict.predictor import Predictor, upright_images
from trainer.run import main as run_main
from trainer.runtime.distributed import World

COUNTS = np.array([400, 100, 20, 3])
ALONE = World(rank=0, size=1, device=torch.device("cpu"))


@pytest.mark.parametrize("adjustment", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("weights", ["none", "inverse", "minmax", "effective"])
def test_undoing_the_weights_gives_the_probabilities_that_were_learned_from(weights: str, adjustment: float) -> None:
    """What the loss is least for, less the offsets of tau=1, are the targets' own logarithms."""
    settings = LossConfig(class_weights=weights, logit_adjustment=adjustment)
    targets = torch.tensor([[0.6, 0.25, 0.1, 0.05], [0.1, 0.2, 0.3, 0.4]])
    undone = torch.from_numpy(log_class_weights(COUNTS, settings))
    plain = weights == "none" and adjustment == 0
    logits = (targets.log() + (0 if plain else undone)).requires_grad_()
    shift = adjustment * log_priors(COUNTS)
    weighted_kl(logits + shift, targets, class_weights(COUNTS, settings)).backward()
    assert logits.grad is not None
    assert torch.allclose(logits.grad, torch.zeros(2, 4), atol=1e-5)
    if plain:
        assert torch.allclose(undone, -log_priors(COUNTS)), "nothing to undo: inverse frequencies"


@pytest.mark.parametrize("weights", ["inverse", "minmax", "effective"])
def test_binary_cross_entropy_learns_the_class_weights_that_tau_undoes(weights: str) -> None:
    settings = LossConfig(name="bce", class_weights=weights)
    targets = torch.tensor([[0.3, 0.3, 0.4, 0.1], [0.1, 0.2, 0.3, 0.4]])
    logits = (targets.logit() + torch.from_numpy(log_class_weights(COUNTS, settings))).requires_grad_()
    weighted_bce(logits, targets, class_weights(COUNTS, settings)).backward()
    assert logits.grad is not None
    assert torch.allclose(logits.grad, torch.zeros(2, 4), atol=1e-5)


def test_logit_adjustment_of_one_is_the_balanced_softmax() -> None:
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    counts = torch.from_numpy(COUNTS)
    balanced = counts * logits.exp() / (counts * logits.exp()).sum(dim=1, keepdim=True)  # Ren et al., equation 3
    assert torch.allclose((logits + log_priors(COUNTS)).softmax(dim=1), balanced, atol=1e-6)
    assert torch.isfinite(log_priors(np.array([0, 10]))).all()


def imbalanced(count: int = 40_000) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float32]]:
    """Logits of a model that learned inverse class weights perfectly, labels, and log w."""
    random = np.random.default_rng(0)
    priors = COUNTS / COUNTS.sum()
    probabilities = priors * np.exp(random.normal(0, 1.2, (count, 4)))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    labels = (probabilities.cumsum(axis=1) < random.random((count, 1))).sum(axis=1).clip(max=3)
    undone = log_class_weights(COUNTS, LossConfig(class_weights="inverse"))
    return (np.log(probabilities) + undone).astype(np.float32), labels, undone


def test_tau_is_tuned_for_the_figure_asked_for() -> None:
    logits, labels, undone = imbalanced()
    top, fair = (fit_posthoc(logits, labels, undone, "auto", select) for select in ("accuracy", "macro_f1"))
    assert top.tau == pytest.approx(1, abs=0.1), "the most probable class"
    assert fair.tau < top.tau
    assert top.validation.accuracy > top.as_learned.accuracy + 0.05
    assert fair.validation.macro_f1 > max(top.validation.macro_f1, fair.as_learned.macro_f1)
    assert top.temperature == pytest.approx(1, abs=0.05), "probabilities are those of the labels again"
    learned = fit_posthoc(logits, labels, undone, 0.0, "accuracy")
    assert learned.validation.summary() == learned.as_learned.summary()
    assert not learned.offsets.any()
    at_one = next(point for point in top.curve if point["tau"] == 1)
    assert at_one["accuracy"] == fit_posthoc(logits, labels, undone, 1.0, "accuracy").validation.accuracy


def test_a_tau_that_stands_out_alone_is_not_taken() -> None:
    figures = np.zeros(81)
    figures[10] = 1.0  # chance
    figures[50:57] = 0.9
    assert best_tau(list(figures)) == pytest.approx(-2 + 53 * 0.05, abs=0.06)
    assert best_tau([0.5] * 81) == 0.0, "of equals the least change"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on digits of which some classes are rare, with inverse weights and a tuned tau."""
    directory = tmp_path_factory.mktemp("decided")
    train, test = find_source("digits").load(SourceOptions(directory))
    rare = (train.labels % 2 == 1) & (np.arange(len(train.labels)) % 6 > 0)
    pack_splits((train.select(np.flatnonzero(~rare)), test), directory / "set")
    content = {
        "data": {"shards": str(directory / "set"), "resolution": 12, "val_fraction": 0.4},
        "loader": {"batch_size": 32},
        "model": {"name": "three_block_cnn"},
        "loss": {"class_weights": "inverse"},
        "posthoc": {"tau": "auto"},
        "optim": {"lr": 4e-4},
        "trainer": {"epochs": 1, "precision": "fp32"},
    }
    (directory / "few.yaml").write_text(yaml.safe_dump(content))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["trainer.run", str(directory / "few.yaml"), f"run.dir={directory / 'run'}"])
        assert run_main() == 0
    return directory / "run"


def test_a_run_decides_by_a_tuned_tau(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    decision = summary["decision"]
    trained = load_trained_model(run)
    assert trained.tau == decision["tau"] != 0
    offsets = trained.offsets
    assert offsets.shape == (10,) and np.ptp(offsets[::2]) < np.ptp(offsets), "odd classes are rare"
    assert decision["validation"]["accuracy"] > decision["validation_as_learned"]["accuracy"]
    assert decision["validation_as_learned"]["accuracy"] == pytest.approx(summary["validation"]["accuracy"])
    report = (run / "report.html").read_text()
    assert f"τ = {decision['tau']:g}" in report


def test_the_decision_goes_with_the_checkpoint(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    trained = load_trained_model(run)
    shards = str(run.parent / "set")
    again = evaluate_run(run, shards, ALONE)
    assert {name: again[name] for name in ("accuracy", "macro_f1", "loss")} == {
        name: summary[name] for name in ("accuracy", "macro_f1", "loss")
    }
    assert again["tau"] == trained.tau
    answered = np.load(run / "predictions.npz")
    store = open_split(shards, "test")
    samples = np.argsort(store.rows)[:32]
    seen = Predictor(run).predict(upright_images(store, samples)).probabilities
    assert np.array_equal(seen.argmax(axis=1), answered["predicted"][:32])
    assert seen.max(axis=1) == pytest.approx(answered["confidence"][:32], rel=1e-4)
    state = trained.state_dict()
    torch.save(state | {"offsets": [0.0] * 10, "tau": 0.0}, run / "checkpoints" / "best.pt")
    try:
        assert evaluate_run(run, shards, ALONE)["accuracy"] != summary["accuracy"]
    finally:
        torch.save(state, run / "checkpoints" / "best.pt")


def test_the_fit_takes_evenly_spaced_images_if_all_logits_exceed_the_memory(
    digits_set: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_split(digits_set, "test")
    sampler = SequentialBatchSampler(np.arange(0, 300, 3), 32)
    spec = TransformSpec.of(store.manifest, 8).with_normalization((0.5,), (0.5,))
    loader = Loader(store, sampler, build_transform(spec, "torch", torch.device("cpu"), 32), torch.device("cpu"))
    assert limit_samples(loader, 10) is loader
    monkeypatch.setattr(logit_adjustment, "_MAX_LOGITS", 1000)
    assert limit_samples(loader, 10) is loader
    bounded = limit_samples(loader, 90)
    assert bounded.sampler.samples.tolist() == [0, 27, 57, 87, 117, 147, 177, 207, 237, 267, 297]
    assert len(loader.sampler.samples) == 100, "the loader of validation is unchanged"
    assert "11 of 100 validation images" in caplog.text
    monkeypatch.setattr(logit_adjustment, "_ENOUGH_SAMPLES", 5)
    for enough, expected in ((100, 10), (20, 5), (2000, 100)):  # logits of 10 classes
        monkeypatch.setattr(logit_adjustment, "_ENOUGH_LOGITS", enough)
        assert len(limit_samples(loader, 10).sampler.samples) == expected
