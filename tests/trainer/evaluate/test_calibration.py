"""Temperatures and calibration errors against their definitions, and in a run: fitted on the validation part alone."""

from __future__ import annotations

import json
import re
import sys
from fractions import Fraction
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import free_port, run_module
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

from shards import open_split
from trainer.checkpoint.trained_model import load_trained_model
from trainer.config.schema import TrainerConfig
from trainer.evaluate import calibration, evaluator
from trainer.evaluate.calibration import calibration_error, fit_temperature, reliability
from trainer.evaluate.evaluator import evaluate_run
from trainer.evaluate.logit_adjustment import ProbabilityHead
from trainer.evaluate.tta import VIEWS, mean_logits
from trainer.loop import engine
from trainer.models.ensemble import Ensemble
from trainer.run import main as run_main
from trainer.runtime.distributed import World


def drawn(count: int, temperature: float, seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Logits, and labels drawn from the probabilities that they have at a temperature."""
    random = np.random.default_rng(seed)
    logits = random.normal(0, 3, (count, 6))
    probabilities = np.exp(logits / temperature)
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    labels = (probabilities.cumsum(axis=1) < random.random((count, 1))).sum(axis=1)
    return logits.astype(np.float32), labels.astype(np.int64)


def cross_entropy(logits: NDArray[np.float32], labels: NDArray[np.int64], temperature: float) -> float:
    return float(F.cross_entropy(torch.from_numpy(logits).double() / temperature, torch.from_numpy(labels)))


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7, 6.0])
def test_the_temperature_is_found_that_labels_were_drawn_at(temperature: float) -> None:
    logits, labels = drawn(20_000, temperature)
    found = fit_temperature(logits, labels)
    assert found == pytest.approx(temperature, rel=0.05)
    least = cross_entropy(logits, labels, found)
    for other in (found * 0.999, found * 1.001):
        assert cross_entropy(logits, labels, other) > least
    assert fit_temperature(3 * logits + 100, labels) == pytest.approx(3 * found, rel=1e-4)


def test_the_temperature_of_parts_is_that_of_all_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = drawn(1001, 1.7)
    whole = minimize_scalar(lambda value: cross_entropy(logits, labels, value), (0.5, 2.0), tol=1e-9).x
    assert fit_temperature(logits, labels) == pytest.approx(whole, rel=1e-6)
    for values in (1, 600):  # one sample at a time; ten parts and a rest of one sample
        monkeypatch.setattr(calibration, "_LOGITS_AT_ONCE", values)
        assert fit_temperature(logits, labels) == pytest.approx(whole, rel=1e-6)


def test_temperatures_that_no_minimum_bounds() -> None:
    logits, _ = drawn(300, 1.0)
    assert fit_temperature(logits, logits.argmax(axis=1)) == 1.0, "without an error there is nothing to learn from"
    assert fit_temperature(logits, logits.argmin(axis=1)) == pytest.approx(20.0, rel=1e-3), "always wrong: know nothing"
    first = np.zeros(300, np.int64)  # true of some, and of no later number than any that is predicted
    assert cross_entropy(logits, first, fit_temperature(logits, first)) < cross_entropy(logits, first, 1.0) - 0.1
    almost = logits.argmax(axis=1)
    almost[0] = logits[0].argsort()[-2]
    assert 1 / 20 <= fit_temperature(100 * logits, almost) <= 20


def test_the_calibration_error_is_its_definition() -> None:
    random = np.random.default_rng(0)
    confidence = random.random(2000).astype(np.float32)
    confidence[:3] = (0.0, 1.0, 1 / 3)
    correct = random.random(2000) < confidence**2
    expected = 0.0
    for number in range(15):
        inside = (confidence > number / 15) & (confidence <= (number + 1) / 15)
        if number == 0:
            inside |= confidence == 0
        if inside.any():
            expected += inside.mean() * abs(correct[inside].mean() - confidence[inside].astype(np.float64).mean())
    assert calibration_error(confidence, correct) == pytest.approx(expected, rel=1e-6)
    assert calibration_error(np.ones(4, np.float32), np.ones(4, bool)) == 0
    assert calibration_error(np.ones(4, np.float32), np.zeros(4, bool)) == 1


def bin_of(confidence: np.float32) -> int:
    """The bin of a single sample."""
    (number,) = reliability(np.array([confidence], np.float32), np.array([True])).samples.nonzero()[0]
    return int(number)


def test_an_upper_edge_belongs_to_its_bin() -> None:
    assert bin_of(np.float32(0)) == bin_of(np.nextafter(np.float32(0), np.float32(1))) == 0
    for number in range(1, 15):
        edge = Fraction(number, 15)
        below = np.float32(number / 15)
        while Fraction(float(below)) > edge:
            below = np.nextafter(below, np.float32(0))
        above = np.nextafter(below, np.float32(1))
        assert Fraction(float(below)) <= edge < Fraction(float(above))
        assert bin_of(below) == number - 1
        assert bin_of(above) == number
    one = np.float32(1)
    assert bin_of(np.nextafter(one, np.float32(0))) == bin_of(one) == 14
    assert bin_of(np.nextafter(one, np.float32(2))) == 14, "a mean of probabilities may be rounded up"


def test_bins_hold_the_means_of_their_samples() -> None:
    found = reliability(np.array([0.25, 0.5, 0.25, 0.2734375, 1.0], np.float32), np.array([1, 0, 0, 0, 1], bool))
    assert found.samples.tolist() == [0, 0, 0, 2, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1]
    assert found.confidence.tolist() == [0, 0, 0, 0.25, 0.2734375, 0, 0, 0.5, 0, 0, 0, 0, 0, 0, 1]
    assert found.accuracy.tolist() == [0, 0, 0, 0.5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]


def test_the_right_temperature_calibrates() -> None:
    logits, labels = drawn(50_000, 2.5)

    def error(temperature: float) -> float:
        probabilities = torch.from_numpy(logits / temperature).softmax(dim=1).numpy()
        return calibration_error(probabilities.max(axis=1), probabilities.argmax(axis=1) == labels)

    assert error(1.0) > 0.1
    assert error(fit_temperature(logits, labels)) < 0.01


def test_views_of_rectangular_images_are_shifted_by_their_height_and_width() -> None:
    seen: list[torch.Tensor] = []

    def model(images: torch.Tensor) -> torch.Tensor:
        seen.append(images)
        return images.flatten(1)[:, :2]

    images = torch.rand(1, 1, 28, 84, generator=torch.Generator().manual_seed(0))
    mean_logits(model, images, "shifts")
    assert torch.equal(seen[1][..., 3:], images[..., :-3])
    assert torch.equal(seen[3][..., 1:, :], images[..., :-1, :])


def test_views_are_the_image_and_its_shifts() -> None:
    seen: list[torch.Tensor] = []

    def model(images: torch.Tensor) -> torch.Tensor:
        seen.append(images)
        return torch.stack([images.sum(dim=(1, 2, 3)), images[:, 0, 9, 20]], dim=1)

    images = torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    whole = mean_logits(model, images, "shifts_scales")
    assert len(seen) == 7
    assert seen[0] is images
    torch.testing.assert_close(seen[1][..., 1:], images[..., :-1], atol=1e-5, rtol=0)  # to the right
    torch.testing.assert_close(seen[2][..., :-1], images[..., 1:], atol=1e-5, rtol=0)
    torch.testing.assert_close(seen[3][..., 1:, :], images[..., :-1, :], atol=1e-5, rtol=0)  # down
    torch.testing.assert_close(seen[1][..., 0], images[..., 0], atol=1e-5, rtol=0)  # the edge repeats
    blob = torch.zeros(1, 1, 28, 28)
    blob[..., 10:18, 10:18] = 1
    seen.clear()
    mean_logits(model, blob, "shifts_scales")
    smaller, larger = (float(view.sum()) / 64 for view in seen[5:])
    assert smaller == pytest.approx(1 / 1.06**2, rel=0.02)
    assert larger == pytest.approx(1.06**2, rel=0.02)
    probabilities = torch.stack([model(view).softmax(dim=1) for view in list(seen)]).mean(dim=0)
    torch.testing.assert_close(mean_logits(model, blob, "shifts_scales").exp(), probabilities)
    assert whole.shape == (3, 2)
    assert torch.equal(mean_logits(model, images, "none"), model(images))


@pytest.mark.parametrize(("views", "moved"), [("flip", 1), ("shifts_flip", 5)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_each_view_is_followed_by_its_mirror_image(views: str, moved: int, layout: torch.memory_format) -> None:
    seen: list[torch.Tensor] = []

    def model(images: torch.Tensor) -> torch.Tensor:
        seen.append(images)
        return images.flatten(1)[:, :2]

    images = torch.rand(2, 3, 8, 12, generator=torch.Generator().manual_seed(0)).to(memory_format=layout)
    mean_logits(model, images, views)
    assert all(view.is_contiguous(memory_format=layout) for view in seen)
    assert seen[0] is images and len(seen) == 2 * moved
    mirrored = seen[1::2]
    assert all(torch.equal(view.flip(-1), mirror) for view, mirror in zip(seen[::2], mirrored, strict=True))
    seen.clear()
    mean_logits(model, images, "shifts")
    assert all(torch.equal(mirror.flip(-1), view) for mirror, view in zip(mirrored, seen, strict=False))


@pytest.mark.parametrize("views", VIEWS)
@pytest.mark.parametrize("networks", [1, 3])
def test_a_network_of_an_ensemble_is_calibrated_as_it_was_fitted(views: str, networks: int) -> None:
    """Offsets and temperature follow the mean over the views."""
    torch.manual_seed(0)
    images = torch.rand(20, 1, 28, 28)
    members = [torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(28 * 28, 5)) for _ in range(networks)]
    for member in members:
        member[1].weight.data *= 25
    offsets = [np.array([1, -0.6, 0, 0.4, -0.8], np.float32) * scale for scale in (1, -2, 3)[:networks]]
    temperatures = [2.5, 0.7, 1.3][:networks]
    with torch.inference_mode():
        each = [
            ProbabilityHead(shift, temperature)(mean_logits(member, images, views))
            for member, shift, temperature in zip(members, offsets, temperatures, strict=True)
        ]
        together = mean_logits(Ensemble(members, offsets, temperatures), images, views).softmax(dim=1)
    torch.testing.assert_close(together, torch.stack(each).mean(dim=0))


def test_the_number_of_views_is_known_for_every_setting() -> None:
    settings = get_args(TrainerConfig.model_fields["test_time_augmentation"].annotation)
    assert set(VIEWS) == set(settings)
    for views in settings:
        seen: list[torch.Tensor] = []
        mean_logits(lambda images, seen=seen: seen.append(images) or images.flatten(1), torch.zeros(1, 1, 8, 8), views)
        assert len(seen) == VIEWS[views], views


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, digits_set: Path) -> Path:
    """A run that learned a little from genuine digits, evaluated with views."""
    directory = tmp_path_factory.mktemp("calibrated") / "run"
    recipe = directory.parent / "few.yaml"
    content = {
        "data": {"shards": str(digits_set), "resolution": 16, "val_fraction": 0.2},
        "loader": {"batch_size": 64},
        "model": {"name": "three_block_cnn"},
        "optim": {"lr": 3e-4},
        "trainer": {"epochs": 2, "precision": "fp32", "test_time_augmentation": "shifts"},
    }
    recipe.write_text(yaml.safe_dump(content))
    fitted_on: list[int] = []

    def counted(*arguments: object) -> object:
        fitted_on.append(len(arguments[1].sampler.samples))
        return original(*arguments)

    original = engine.predict_logits
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "predict_logits", counted)
        patch.setattr(sys, "argv", ["trainer.run", str(recipe), f"run.dir={directory}"])
        assert run_main() == 0
    assert fitted_on == [288], "the validation part, once"
    return directory


def test_a_run_calibrates_and_says_so(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    found = summary["calibration"]
    assert found["ece"] < found["ece_before"]
    assert found["nll"] < found["nll_before"] == summary["loss"]
    predictions = np.load(run / "predictions.npz")
    correct = predictions["labels"] == predictions["predicted"]
    assert calibration_error(predictions["confidence"], correct) == found["ece"]
    assert calibration_error(predictions["uncalibrated"], correct) == found["ece_before"]
    best = torch.load(run / "checkpoints" / "best.pt", weights_only=True)
    assert best["temperature"] == found["temperature"] != 1
    assert f"{found['ece']:.2%}" in (run / "report.html").read_text()


def test_evaluating_again_gives_the_same(run: Path, digits_set: Path) -> None:
    alone = World(rank=0, size=1, device=torch.device("cpu"))
    found = evaluate_run(run, str(digits_set), alone)
    macro = re.search(r"macro avg +[\d.]+ +[\d.]+ +([\d.]+) +(\d+)", found["report"])
    assert (float(macro[1]), int(macro[2])) == (pytest.approx(found["macro_f1"], abs=5e-5), found["samples"])
    assert found["calibration"] == json.loads((run / "summary.json").read_text())["calibration"]


def test_top_5_and_balanced_accuracy_are_those_of_scikit_learn(run: Path, digits_set: Path) -> None:
    alone = World(rank=0, size=1, device=torch.device("cpu"))
    found, trained = evaluate_run(run, str(digits_set), alone), load_trained_model(run)
    loader = evaluator.loader_for(open_split(digits_set, "test"), trained, alone)
    outputs = evaluator.predict_logits(trained.build_model(alone.device), loader, trained.config.trainer, alone)
    assert outputs is not None
    decided = (outputs.logits - trained.offsets).argmax(axis=1)
    assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(outputs.labels, decided))
    top5 = top_k_accuracy_score(outputs.labels, outputs.logits - trained.offsets, k=5)
    assert found["accuracy"] < found["top5_accuracy"] == pytest.approx(top5)
    assert json.loads((run / "summary.json").read_text())["top5_accuracy"] == found["top5_accuracy"]


def test_the_metrics_do_not_depend_on_how_many_logits_are_in_memory(
    run: Path, digits_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 100,000 classes the logits of a split exceed the memory, so they are reduced in parts."""
    alone = World(rank=0, size=1, device=torch.device("cpu"))
    whole = evaluate_run(run, str(digits_set), alone)
    monkeypatch.setattr(evaluator, "_MAX_PENDING_LOGITS", 1)
    parts = evaluate_run(run, str(digits_set), alone)
    for name in ("accuracy", "macro_f1", "weighted_f1", "loss", "samples", "calibration"):
        assert parts[name] == whole[name]


@pytest.mark.slow
def test_several_ranks_calibrate_alike(run: Path, digits_set: Path, tmp_path: Path) -> None:
    out = tmp_path / "metrics.json"
    launcher = ("torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}", "-m")
    process = run_module(*launcher, "trainer.evaluate", run, digits_set, "--json", out, timeout=300)
    assert process.returncode == 0, process.stderr
    expected = json.loads((run / "summary.json").read_text())["calibration"]
    assert json.loads(out.read_text())["calibration"] == pytest.approx(expected, rel=1e-6)
