"""Every command that takes a run directory works or refuses it with one message, whatever is in it."""

from __future__ import annotations

import os
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from support.damaged_runs import Place, commands, damage
from support.training_runs import QUICK, train_here

MAX_KILOBYTES = 400_000  # by which memory may grow
MESSAGE = ("error: ", "\nexpected: ", "\nhint: ")


MAX_KILOBYTES = 400_000  # by which memory may grow

needs_pipes = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, digits_set: Path) -> Place:
    """A complete run of two epochs with the batch of a step, and another run with other settings."""
    directory = tmp_path_factory.mktemp("runs")
    settings = QUICK | {
        "data": {"val_fraction": 0.1, "resolution": 8, "shards": str(digits_set)},
        "loader": {"batch_size": 256},
        "posthoc": {"tau": "auto"},
    }
    recipe = directory / "quick.yaml"
    recipe.write_text(yaml.safe_dump(settings))
    drawing = np.zeros((40, 30), np.uint8)
    drawing[5:35, 12:17] = 255
    Image.fromarray(drawing).save(directory / "image.png")
    run = directory / "run"
    with pytest.MonkeyPatch.context() as patch:
        assert train_here(patch, recipe, run, "trainer.epochs=2", "trainer.profile=true") == 0
        changes = ["trainer.epochs=3", "trainer.profile=true", "optim.name=adamw", "model.drop_rate=0.1", "seed=7"]
        assert train_here(patch, recipe, directory / "other", *changes) == 0
    best = torch.load(run / "checkpoints" / "best.pt", weights_only=True)
    share = {"images": torch.rand(4, 1, 8, 8), "labels": torch.arange(4), "rows": torch.arange(4)}
    parts = {"class_weights": torch.ones(10), "logit_shift": torch.zeros(10), "shares": [share]}
    content = best | parts | {"weights": "before the step", "channels": 1, "epoch": 0, "step": 1}
    for path in (run, directory / "other"):
        (path / "nonfinite").mkdir()
        torch.save(content, path / "nonfinite" / "step.pt")
    return Place(digits_set, directory / "other", directory / "image.png", recipe)


def attack(place: Place, tmp_path: Path, seed: int, most: int = 100) -> list[str]:
    """Damage a copy of the run and run commands, all or some; returns what is wrong with their outcomes."""
    directory = tmp_path / f"run-{seed}"
    shutil.copytree(place.other.parent / "run", directory)
    what = damage(directory, place.other, seed)
    wrong = []
    names = [*commands(directory, place)]
    some = np.random.default_rng(seed).permutation(len(names))[:most]
    for name in (names[number] for number in np.sort(some)):
        command = commands(directory, place)[name]
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        outcome = command()
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        # A command may warn before it fails.
        is_refused = outcome.status == 2 and [outcome.errors.count(word) for word in MESSAGE] == [1, 1, 1]
        if not (outcome.status == 0 or is_refused) or "Traceback" in outcome.errors or grown > MAX_KILOBYTES:
            wrong.append(f"{what}, {name}: status {outcome.status}, {grown} kB\n{outcome.errors[-3000:]}")
    shutil.rmtree(directory)
    return wrong


def test_all_commands_work_on_an_intact_run(place: Place, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    shutil.copytree(place.other.parent / "run", directory)
    for name, command in commands(directory, place).items():
        outcome = command()
        assert outcome.status == 0, f"{name}: {outcome.errors}"


@needs_pipes
@pytest.mark.parametrize("seed", range(420, 460))
def test_damaged_runs_are_refused_with_one_message(place: Place, tmp_path: Path, seed: int) -> None:
    assert attack(place, tmp_path, seed, most=2) == []


@needs_pipes
@pytest.mark.slow
@pytest.mark.parametrize("start", range(0, 400, 20))
def test_many_damaged_runs_are_refused_with_one_message(place: Place, tmp_path: Path, start: int) -> None:
    wrong = [line for seed in range(start, start + 20) for line in attack(place, tmp_path, seed)]
    assert not wrong, "\n\n".join(wrong)
