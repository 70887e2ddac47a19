"""A loss that is not finite ends a run with its batch saved, or costs an update; without waiting for the device."""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from conftest import made_up_parts, pack_parts
from run_outcome import assert_same_weights, weights

from pipeline.loader import Batch, Loader
from pipeline.sampler import ShuffledBatchSampler
from shards import UserError, open_split
from trainer import checkpoint, engine, reproduce
from trainer.data import carve
from trainer.distributed import World
from trainer.nonfinite import Watch
from trainer.run import main as run_main

SMALL = {
    "seed": 5,
    "data": {"val_fraction": 0.1, "resolution": 12},
    "loader": {"batch_size": 16},
    "model": {"name": "three_block_cnn", "drop_rate": 0.3},
    "mixup": {"prob": 1.0, "cutmix_alpha": 0.0},
    "optim": {"name": "lion", "lr": 1e-3},
    "trainer": {"epochs": 2, "precision": "fp32"},
    "checkpoint": {"every_steps": 4},
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("small")
    parts = made_up_parts(train=144, test=30, classes=3, shape=(12, 12, 1), transposed=False)
    shards = pack_parts(parts, directory / "set", block_size=16)
    path = directory / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL | {"data": SMALL["data"] | {"shards": str(shards)}}))
    return path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, recipe: Path, tmp_path: Path) -> Callable[..., Path]:
    """Train in this process; returns the run directory."""

    def train(*overrides: str, name: str = "run") -> Path:
        monkeypatch.setattr(sys, "argv", ["trainer.run", str(recipe), f"run.dir={tmp_path / name}", *overrides])
        assert run_main() == 0
        return tmp_path / name

    return train


def rows_at(recipe: Path, epoch: int, step: int) -> list[int]:
    """Row ids of a global batch."""
    store = open_split(yaml.safe_load(recipe.read_text())["data"]["shards"], "train")
    samples, _ = carve(store.labels, SMALL["data"]["val_fraction"], 1.0, SMALL["seed"])
    order = ShuffledBatchSampler(samples, SMALL["loader"]["batch_size"], SMALL["seed"])
    return store.rows[next(order.steps(epoch, 0, 1, step)).samples].tolist()


def step_with(recipe: Path, epoch: int, row: int) -> int:
    return next(step for step in range(9) if row in rows_at(recipe, epoch, step))


def spoil_images(monkeypatch: pytest.MonkeyPatch, row: int, times: int = 1_000_000) -> None:
    """Let a picture that is trained on be infinite, whenever or the first few times it comes."""
    batches, left = Loader.batches, [times]

    def spoiled(loader: Loader, *place: int) -> Iterator[Batch]:
        for batch in batches(loader, *place):
            here = batch.source_index == row
            if isinstance(loader.sampler, ShuffledBatchSampler) and bool(here.any()) and left[0]:
                left[0] -= 1
                batch = replace(batch, images=torch.where(here[:, None, None, None], float("inf"), batch.images))
            yield batch

    monkeypatch.setattr(Loader, "batches", spoiled)


def spoil_gradient(monkeypatch: pytest.MonkeyPatch, row: int) -> None:
    """Let the loss of batches that hold a picture be finite, and its gradient not."""
    batches, divergence, holds = Loader.batches, engine.weighted_kl, [False]

    def noted(loader: Loader, *place: int) -> Iterator[Batch]:
        for batch in batches(loader, *place):
            holds[0] = bool((batch.source_index == row).any())
            yield batch

    def spoiled(logits: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        loss = divergence(logits, *others)
        return loss + (0 * logits.sum()).sqrt() if holds[0] else loss

    monkeypatch.setattr(Loader, "batches", noted)
    monkeypatch.setattr(engine, "weighted_kl", spoiled)


def leave_out(monkeypatch: pytest.MonkeyPatch, places: set[tuple[int, int]]) -> None:
    """Let runs leave out these updates from the beginning."""
    epoch = engine.train_epoch

    def without(training: Any, *others: Any) -> None:
        training.skipped = places
        epoch(training, *others)

    monkeypatch.setattr(engine, "train_epoch", without)


def test_it_ends_the_run_with_the_step_the_rows_and_what_it_takes_to_see_it_again(
    monkeypatch: pytest.MonkeyPatch, recipe: Path, run: Callable[..., Path], capsys: pytest.CaptureFixture
) -> None:
    clean, step = {}, engine.train_step

    def seen(training: Any, batch: Batch, *others: Any) -> torch.Tensor:
        if (training.epoch, batch.step) == (0, 5):
            clean.update({name: tensor.clone() for name, tensor in training.model.state_dict().items()})
        return step(training, batch, *others)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "train_step", seen)
        run("trainer.epochs=1", name="clean")

    rows = rows_at(recipe, 0, 5)
    spoil_images(monkeypatch, rows[3])
    with pytest.raises(UserError) as caught:
        run("trainer.epochs=1")
    assert "a loss that is not finite in epoch 1 step 6" in caught.value.found
    assert ", ".join(map(str, rows)) in caught.value.found
    file = Path(re.search(r"trainer.reproduce (\S+)", caught.value.hint)[1])

    state = torch.load(file, weights_only=True)
    (share,) = state["shares"]
    assert share["rows"].tolist() == rows
    assert [int(row) for row, image in zip(rows, share["images"], strict=True) if image.isinf().any()] == [rows[3]]
    trained = {name for name in clean if "running" not in name and "num_batches" not in name}
    assert all(torch.equal(clean[name], state["model"][name]) for name in trained)

    monkeypatch.setattr(sys, "argv", ["trainer.reproduce", str(file)])
    assert reproduce.main() == 0
    output = capsys.readouterr().out
    assert "epoch 1 step 6" in output and ", ".join(map(str, rows)) in output and "loss nan" in output
    assert output.index("    images") < output.index("output of 0 (Conv2d)") < output.index("gradient of 0.weight")

    last = checkpoint.load_newest(file.parent.parent / "checkpoints")[0]
    assert last["step"] == 4 and all(tensor.isfinite().all() for tensor in last["model"].values())
    run("trainer.epochs=1", "resume=auto", "trainer.max_nonfinite_steps=1")


QUICK = ((spoil_images, 5, 2), (spoil_gradient, 8, 1))


# Two of them in the default run; the slow ones are all combinations.
@pytest.mark.parametrize(
    ("spoil", "step", "accumulation"),
    [
        pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
        for case in itertools.product((spoil_images, spoil_gradient), (0, 5, 8), (1, 2))
    ],
)
def test_as_many_updates_as_allowed_are_left_out_and_nothing_else_changes(
    monkeypatch: pytest.MonkeyPatch,
    recipe: Path,
    run: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
    spoil: Callable[..., None],
    step: int,
    accumulation: int,
) -> None:
    row = rows_at(recipe, 0, step)[0]
    places = {(epoch, step_with(recipe, epoch, row) // accumulation * accumulation) for epoch in (0, 1)}
    overrides = (f"optim.grad_accumulation={accumulation}", "trainer.max_nonfinite_steps=2")
    with monkeypatch.context() as patch:
        spoil(patch, row)
        found = run(*overrides)
    assert "the update is left out (2 of 2)" in caplog.text
    with monkeypatch.context() as patch:
        leave_out(patch, places)
        expected = run(*overrides, name="expected")
    assert_same_weights(weights(expected), weights(found))
    assert (found / "metrics.jsonl").read_text().count("NaN") == 0
    state = checkpoint.load_newest(found / "checkpoints")[0]
    assert {tuple(place) for place in state["skipped"]} == places

    with monkeypatch.context() as patch:
        spoil(patch, row)
        with pytest.raises(UserError, match="epoch 2") as caught:
            run(overrides[0], "trainer.max_nonfinite_steps=1", name="limited")
    assert "but for 1 updates" in caught.value.expected and "trainer.max_nonfinite_steps=2" in caught.value.hint


def test_what_does_not_happen_again_costs_nothing(
    monkeypatch: pytest.MonkeyPatch, recipe: Path, run: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    clean = run(name="clean")
    spoil_images(monkeypatch, rows_at(recipe, 0, 5)[0], times=1)
    assert_same_weights(weights(clean), weights(run()))
    assert "taking its steps one by one" in caplog.text


def test_a_learning_rate_that_is_too_high_ends_the_run(run: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="not finite in epoch 1 step 2") as caught:
        run("optim.lr=1e30", "optim.name=adamw")
    assert "optim.lr" in caught.value.hint


@pytest.mark.gpu
def test_on_a_gpu_no_step_waits_for_its_loss(
    monkeypatch: pytest.MonkeyPatch, recipe: Path, run: Callable[..., Path]
) -> None:
    device = torch.device("cuda")
    order = SimpleNamespace(steps_per_epoch=1000)
    watched = SimpleNamespace(
        world=World(0, 1, device), epoch=0, data=SimpleNamespace(train=SimpleNamespace(order=order))
    )
    watch, losses = Watch(watched), torch.ones(100, device=device)
    losses[40] = float("nan")
    torch.cuda.set_sync_debug_mode("error")
    try:
        words = [(watch.note(step, loss), watch.word)[1] for step, loss in enumerate(losses.unbind())]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert words[:95] == [0] * 95 and words[95:] == [960] * 5

    spoil_images(monkeypatch, rows_at(recipe, 0, 5)[3])
    with pytest.raises(UserError, match="a loss that is not finite in epoch 1 step 6"):
        run("device=cuda", "trainer.epochs=1", "loader.backend=torch")
