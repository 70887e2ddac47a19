"""The learning-rate range test finds the rate at which the loss falls fastest."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from shards import UserError
from trainer.loop import find_lr
from trainer.loop.find_lr import range_test, smooth

QUICKSTART = ROOT / "configs" / "quickstart.yaml"


class Quadratic:
    """Gradient descent on curvature / 2 * w^2 from w = 1."""

    def __init__(self, curvature: float, noise: float = 0.0) -> None:
        self.curvature, self.noise = curvature, noise
        self.weight, self.rng, self.steps = 1.0, np.random.default_rng(0), 0

    def __call__(self, rate: float) -> float:
        loss = 1 + self.curvature / 2 * self.weight**2 * (1 + self.noise * self.rng.standard_normal())
        self.weight -= rate * self.curvature * self.weight
        self.steps += 1
        return loss


@pytest.mark.parametrize("noise", [0.0, 0.05])
@pytest.mark.parametrize("curvature", [2.0, 20.0])
def test_the_suggestion_for_a_quadratic_is_the_rate_of_the_closed_form(curvature: float, noise: float) -> None:
    """With rates that grow by e^k per step, the loss is exp(-2 a rate / k), whose slope over log(rate) is steepest at
    rate = k / (2 a)."""
    lowest, highest, steps = 1e-5, 0.1, 300
    growth = math.log(highest / lowest) / (steps - 1)
    result = range_test(Quadratic(curvature, noise), lowest, highest, steps)
    assert result.suggestion == pytest.approx(growth / (2 * curvature), rel=0.1 if noise == 0 else 0.5)
    assert result.lr == pytest.approx([lowest * math.exp(growth * step) for step in range(len(result.lr))])


def test_the_test_ends_when_the_loss_diverges() -> None:
    quadratic = Quadratic(curvature=1.0)
    result = range_test(quadratic, 0.3, 100.0, 40)  # diverges above 2
    assert quadratic.steps == len(result.lr) < 40 and result.lr[-1] > 2
    assert result.suggestion < 2
    rates = iter([1.0] * 5 + [0.5, math.nan])
    assert len(range_test(lambda rate: next(rates), 0.1, 1.0, 40).loss) == 6
    with pytest.raises(UserError, match="does not fall"):
        range_test(lambda rate: 1 + rate, 0.1, 1.0, 10)


def test_smoothing_is_a_mean_weighted_by_a_gaussian() -> None:
    losses = np.array([3.0, 1.0, 4.0, 1.0, 5.0])
    expected = []
    for center in range(5):
        weights = [math.exp(-((center - other) ** 2) / (2 * 1.5**2)) for other in range(5)]
        expected.append(sum(w * loss for w, loss in zip(weights, losses, strict=True)) / sum(weights))
    assert smooth(losses, 1.5) == pytest.approx(expected)
    assert smooth(np.array([1.0, 100.0]), 1e-3) == pytest.approx([1, 8]), "a diverged loss does not hide the others"


def test_many_steps_are_smoothed_in_seconds() -> None:
    start = time.process_time()
    result = range_test(Quadratic(curvature=1.0), 1e-6, 100.0, 4000)
    assert time.process_time() - start < 5, "4,000 products of 4,000 x 4,000 matrices take minutes"
    assert 2 < result.lr[-1] < 50 and len(result.smoothed) == len(result.lr)


def test_the_command_writes_a_plot_and_no_run(
    digits_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [str(QUICKSTART), f"data.shards={digits_set}", "data.train_fraction=0.2", "optim.grad_accumulation=2"]
    monkeypatch.setattr(sys, "argv", ["find_lr", *given, "data.resolution=8", "--steps", "20", "--highest", "1"])
    assert find_lr.main() == 0
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["find-lr.json", "find-lr.svg"]
    result = json.loads((tmp_path / "runs/find-lr/quickstart/find-lr.json").read_text())
    assert len(result["lr"]) == len(result["loss"]) == len(result["smoothed"]) <= 20
    assert result["lr"][0] == pytest.approx(1e-6) and result["suggestion"] in result["lr"]
    assert f"optim.lr={result['suggestion']:.2g}" in capsys.readouterr().out
    assert "<svg" in (tmp_path / "runs/find-lr/quickstart/find-lr.svg").read_text()
    for wrong in (("--lowest", "2", "--highest", "1"), ("--highest", "inf"), ("--steps", "1000000000000")):
        monkeypatch.setattr(sys, "argv", ["find_lr", *given, *wrong])
        with pytest.raises(UserError, match="--lowest"):
            find_lr.main()


def test_the_rate_of_the_classifier_is_suggested_with_its_ratio(
    digits_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [str(QUICKSTART), f"data.shards={digits_set}", "data.train_fraction=0.2", "data.resolution=8"]
    rates = ["optim.lr=0.001", "optim.head_lr=0.01"]
    monkeypatch.setattr(sys, "argv", ["find_lr", *given, *rates, "--steps", "20", "--highest", "1"])
    assert find_lr.main() == 0
    suggestion = json.loads((tmp_path / "runs/find-lr/quickstart/find-lr.json").read_text())["suggestion"]
    assert f"optim.lr={suggestion:.2g} optim.head_lr={10 * suggestion:.2g} (" in capsys.readouterr().out
