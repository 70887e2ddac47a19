"""A training ends by epochs, patience or the clock, also after a resume, and selects its best epoch by the monitor."""

from __future__ import annotations

import itertools
import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import pack_splits, synthetic_splits
from support.training_runs import train_here, write_recipe
from torch import nn

from shards import UserError
from trainer.checkpoint import io as checkpoint
from trainer.config.load import load
from trainer.loop import engine
from trainer.loop.state import Training
from trainer.optim.schedules import LRSchedule
from trainer.tune import search_space

SETTINGS: dict[str, Any] = {
    "data": {"val_fraction": 0.25, "resolution": 8},
    "loader": {"batch_size": 16},
    "model": {"name": "three_block_cnn"},
    "trainer": {"precision": "fp32"},
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("stopping")
    splits = synthetic_splits(train=64, test=8, classes=2, shape=(8, 8, 1), transposed=False)
    return write_recipe(directory / "small.yaml", SETTINGS, pack_splits(splits, directory / "set", block_size=16))


def results(directory: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return json.loads((directory / "summary.json").read_text()), [json.loads(line) for line in lines]


def expected_epochs(metrics: list[float], patience: int, epochs: int) -> int:
    """Count the epochs without a new highest value one by one."""
    best, waited = float("-inf"), 0
    for epoch, metric in enumerate(metrics, 1):
        best, waited = (metric, 0) if metric > best else (best, waited + 1)
        if waited == patience or epoch == epochs:
            return epoch
    raise AssertionError("the run ended too early")


@pytest.mark.parametrize("monitor", ["accuracy", "loss"])
def test_patience_ends_a_run_and_a_resumed_run_at_the_same_epoch(
    monkeypatch: pytest.MonkeyPatch, recipe: Path, tmp_path: Path, monitor: str, capsys: pytest.CaptureFixture
) -> None:
    """The rate is so high that the metric soon becomes worse."""
    options = ["trainer.patience=2", "trainer.epochs=40", "optim.lr=0.1", f"trainer.monitor={monitor}"]
    assert train_here(monkeypatch, recipe, tmp_path / "run", *options) == 0
    summary, epochs = results(tmp_path / "run")
    sign = -1 if monitor == "loss" else 1
    metrics = [sign * epoch["validation"][monitor] for epoch in epochs]
    assert len(metrics) == expected_epochs(metrics, 2, 40) < 40
    assert summary["stopped_by"] == "patience"
    assert metrics[summary["best_epoch"] - 1] == max(metrics)
    assert "by trainer.patience" in capsys.readouterr().out
    assert "trainer.patience" in (tmp_path / "run" / "report.html").read_text().partition("<dl")[0]
    if monitor == "loss":
        return
    (tmp_path / "run" / "summary.json").unlink()  # as after a kill during the test
    assert train_here(monkeypatch, recipe, tmp_path / "run", *options, "resume=auto") == 0
    again, epochs_again = results(tmp_path / "run")
    assert (again["stopped_by"], epochs_again) == ("patience", epochs)
    assert again["best_epoch"] == summary["best_epoch"] and again["accuracy"] == summary["accuracy"]


class StopError(Exception):
    """Ends a training at its first step."""


def stop(*arguments: Any) -> None:
    raise StopError


@pytest.fixture
def step_times(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float]]:
    """The run's elapsed seconds and the learning rate at the start of each training step."""
    times: list[tuple[float, float]] = []
    step = engine.train_step

    def timed(training: Training, *arguments: Any) -> torch.Tensor:
        times.append((training.state.elapsed, training.state.learning_rate.lr))
        return step(training, *arguments)

    monkeypatch.setattr(engine, "train_step", timed)
    return times


def test_minutes_end_a_run_by_the_clock_at_the_minimum_rate(
    monkeypatch: pytest.MonkeyPatch, recipe: Path, tmp_path: Path, step_times: list[tuple[float, float]]
) -> None:
    budget = 1.0  # seconds
    options = [f"trainer.minutes={budget / 60}", "trainer.epochs=300", "schedule.name=cosine", "optim.lr=0.01"]
    start = time.perf_counter()
    assert train_here(monkeypatch, recipe, tmp_path / "run", *options) == 0
    assert time.perf_counter() - start > budget
    summary, epochs = results(tmp_path / "run")
    seconds = [second for second, _ in step_times]
    rates = [rate for _, rate in step_times]
    assert summary["stopped_by"] == "minutes" and summary["epochs"] == len(epochs)
    assert summary["seconds"] >= budget
    assert all(second < budget for second in seconds[:-1])  # the first step after the end is the last
    # Each step has the rate of the cosine at a moment between the starts of the step before and of this one.
    for (before, _), (now, rate) in itertools.pairwise(step_times):
        total = 300 * 3  # steps of the schedule: 300 epochs of three batches
        points = [int(min(1, second / budget) * total) for second in (before - 1e-3, now)]  # in whole ms
        curve = [0.005 * (1 + math.cos(math.pi * point / total)) for point in points]
        assert curve[1] - 1e-9 <= rate <= curve[0] + 1e-9
    assert rates == sorted(rates, reverse=True)

    # A resumed run counts its earlier time: of 10 ms nothing is left, of 20 s the rest.
    change = ["resume=auto", "checkpoint.resume_allow_changes=[trainer.minutes]"]
    (tmp_path / "run" / "summary.json").unlink()
    step_times.clear()
    assert train_here(monkeypatch, recipe, tmp_path / "run", *options, *change, f"trainer.minutes={budget / 6000}") == 0
    assert not step_times and len(results(tmp_path / "run")[1]) == len(epochs)
    (tmp_path / "run" / "summary.json").unlink()
    monkeypatch.setattr(engine, "forward_backward", stop)
    with pytest.raises(StopError):
        train_here(monkeypatch, recipe, tmp_path / "run", *options, *change, f"trainer.minutes={budget / 3}")
    elapsed = checkpoint.load(tmp_path / "run" / "checkpoints" / "last.pt")["elapsed"]
    ((second, rate),) = step_times
    assert 0 < elapsed < second
    point = int(int(elapsed * 1000) / (20_000 * budget) * 900)  # the clock counts whole ms
    assert rate == pytest.approx(0.005 * (1 + math.cos(math.pi * point / 900)))


def test_a_schedule_by_time_ends_at_its_minimum_whatever_the_number_of_steps() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=1.0)
    settings = load(
        Path("quickstart"),
        ["trainer.minutes=1", "trainer.epochs=10", "optim.lr=1", "schedule.name=one_cycle", "schedule.warmup=0"],
    )
    schedule = LRSchedule(optimizer, settings, [5] * 10)
    found = []
    for fraction in (0.0, 0.1, 0.3, 0.29, 0.95, 1.0, 1.2):
        optimizer.step()
        schedule.step_time(fraction)
        found.append(schedule.lr)
    reference = torch.optim.lr_scheduler.OneCycleLR(
        torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=1.0), 1.0, 51, pct_start=0.3, cycle_momentum=False
    )
    rates = []
    for _ in range(51):
        rates.append(reference.get_last_lr()[0])
        reference.optimizer.step()
        if len(rates) < 51:
            reference.step()
    assert found == pytest.approx([rates[0], rates[5], rates[15], rates[15], rates[47], rates[50], rates[50]])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["trainer.minutes=2", "data.resolution=[[1, 8], [2, 12]]"], "data.resolution"),
        (["trainer.minutes=2", "mixup.off_last_epochs=1"], "mixup.off_last_epochs"),
        (["trainer.monitor=loss", "posthoc.tau=auto"], "posthoc.tau"),
    ],
)
def test_settings_that_exclude_each_other_are_one_message(recipe: Path, overrides: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        load(recipe, overrides)


@pytest.mark.parametrize("setting", ["trainer.minutes: 3", "trainer.monitor: loss"])
def test_a_search_compares_accuracies_after_equal_epochs(recipe: Path, tmp_path: Path, setting: str) -> None:
    search = tmp_path / "search.yaml"
    space = "space: {optim.lr: {type: float, low: 1.0e-4, high: 1.0e-2, log: true}}"
    search.write_text(f"recipe: {recipe}\nsettings: {{{setting}}}\n{space}\nbudget: {{trials: 1}}\n")
    with pytest.raises(UserError, match=setting.partition(":")[0]):
        search_space.load(search, [])
