"""What comes once is done before the clock of an epoch starts, and leaves no trace in the state."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support.training_runs import record_compilations, train_here, write_recipe

from trainer.config.load import load
from trainer.data import training_data
from trainer.data.training_data import open_data
from trainer.loop import engine
from trainer.loop.state import Training, make_training
from trainer.loop.warm_up import warm_up
from trainer.runtime.distributed import World

RECIPE = {
    "data": {"val_fraction": 0.1, "resolution": [[1, 8], [2, 12]]},
    "loader": {"batch_size": 16, "scale_batch_with_resolution": True},
    "model": {"name": "three_block_cnn", "drop_rate": 0.3},
    "augment": {"rotation": 10.0},
    "mixup": {"prob": 0.5},
    "trainer": {"epochs": 2, "precision": "fp32", "ema_decay": 0.9},
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, small_set: Path) -> Path:
    return write_recipe(tmp_path_factory.mktemp("small") / "small.yaml", RECIPE, small_set)


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return record_compilations(monkeypatch)


def training_of(recipe: Path, *overrides: str) -> Training:
    config, world = load(recipe, [*overrides, "device=cpu"]), World(rank=0, size=1, device=torch.device("cpu"))
    return make_training(config, open_data(config, world), world)


def assert_equal(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_it_compiles_every_resolution_and_changes_nothing(recipe: Path, built: list[int], precision: str) -> None:
    training = training_of(recipe, "trainer.compile=default", f"trainer.precision={precision}")
    before, random = copy.deepcopy(training.state.state_dict()), torch.get_rng_state()
    assert warm_up(training) > 0
    assert built == [26, 14], "130 images in batches of at most 32 and 16"
    after = training.state.state_dict()
    assert before.pop("elapsed") < after.pop("elapsed")
    assert_equal(before, after)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(weight.grad is None for weight in training.state.model.parameters())
    for epoch in range(2):
        training.state.epoch = epoch
        for batch in training.data.train.batches(epoch):
            engine.train_step(training, batch, 1, True)
    assert built == [26, 14], "no step compiles"


def test_a_resumed_run_compiles_what_follows(recipe: Path, built: list[int]) -> None:
    training = training_of(recipe, "trainer.compile=default")
    training.state.epoch = 1
    warm_up(training)
    assert built == [14]


def test_a_model_on_a_cpu_that_is_not_compiled_needs_none(recipe: Path) -> None:
    assert warm_up(training_of(recipe)) == 0


def test_transforms_are_built_before_the_clock_of_their_epoch_starts(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, clock, built = training_data.build_transform, time.perf_counter, []

    def build_slowly(*arguments: Any) -> Any:
        built.append(1000)  # seconds
        return build(*arguments)

    monkeypatch.setattr(training_data, "build_transform", build_slowly)
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + sum(built))
    assert train_here(monkeypatch, recipe, tmp_path / "run") == 0
    assert len(built) == 3, "for validation, and for images of two sizes"
    for record in map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()):
        assert record["seconds"] < 1000
