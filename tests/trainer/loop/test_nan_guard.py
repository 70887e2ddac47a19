"""A loss or gradient that is not finite ends a run with its batch saved, found without waiting for the device."""

from __future__ import annotations

import math
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
from support.training_runs import train_here, write_recipe

from pipeline.common.labelled_samples import LabelledSamples
from pipeline.loader import Batch, Loader
from pipeline.sampler import ShuffledBatchSampler
from shards import UserError, open_split
from trainer.checkpoint import io as checkpoint
from trainer.data.training_data import split_train_val
from trainer.loop import engine, replay_step, state
from trainer.loop.nan_guard import NonFiniteMonitor, NonFiniteStep
from trainer.runtime.distributed import World

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
def recipe(tmp_path_factory: pytest.TempPathFactory, small_set: Path) -> Path:
    return write_recipe(tmp_path_factory.mktemp("small") / "small.yaml", SMALL, small_set)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, recipe: Path, tmp_path: Path) -> Callable[..., Path]:
    """Train in this process; returns the run directory."""

    def train(*overrides: str, name: str = "run") -> Path:
        assert train_here(monkeypatch, recipe, tmp_path / name, *overrides) == 0
        return tmp_path / name

    return train


def rows_at(recipe: Path, epoch: int, step: int) -> list[int]:
    """Row ids of a global batch."""
    store = open_split(yaml.safe_load(recipe.read_text())["data"]["shards"], "train")
    train, _ = split_train_val(LabelledSamples.of(store), SMALL["data"]["val_fraction"], 1.0, SMALL["seed"])
    order = ShuffledBatchSampler(train.samples, SMALL["loader"]["batch_size"], SMALL["seed"])
    return store.rows[next(order.steps(epoch, 0, 1, step)).samples].tolist()


def spoil_images(monkeypatch: pytest.MonkeyPatch, row: int) -> None:
    """Let a picture that is trained on be infinite."""
    batches = Loader.batches

    def spoiled(loader: Loader, *place: int) -> Iterator[Batch]:
        for batch in batches(loader, *place):
            here = batch.source_index == row
            if isinstance(loader.sampler, ShuffledBatchSampler) and bool(here.any()):
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


def test_it_ends_the_run_with_the_step_the_rows_and_what_it_takes_to_see_it_again(
    monkeypatch: pytest.MonkeyPatch, recipe: Path, run: Callable[..., Path], capsys: pytest.CaptureFixture
) -> None:
    clean, step = {}, engine.train_step

    def seen(training: Any, batch: Batch, *others: Any) -> torch.Tensor:
        if (training.state.epoch, batch.step) == (0, 5):
            clean.update({name: tensor.clone() for name, tensor in training.state.model.state_dict().items()})
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
    file = Path(re.search(r"trainer.loop.replay_step (\S+)", caught.value.hint)[1])

    state = torch.load(file, weights_only=True)
    (share,) = state["shares"]
    assert share["rows"].tolist() == rows
    assert [int(row) for row, image in zip(rows, share["images"], strict=True) if image.isinf().any()] == [rows[3]]
    trained = {name for name in clean if "running" not in name and "num_batches" not in name}
    assert all(torch.equal(clean[name], state["model"][name]) for name in trained)

    monkeypatch.setattr(sys, "argv", ["trainer.loop.replay_step", str(file)])
    assert replay_step.main() == 0
    output = capsys.readouterr().out
    assert "epoch 1 step 6" in output and ", ".join(map(str, rows)) in output and "loss nan" in output
    assert output.index("    images") < output.index("output of 0 (Conv2d)") < output.index("gradient of 0.weight")

    last = checkpoint.load_newest(file.parent.parent / "checkpoints")[0]
    assert last["step"] == 4 and all(tensor.isfinite().all() for tensor in last["model"].values())


@pytest.mark.parametrize(
    ("step", "accumulation"),
    [(8, 1), (3, 2), pytest.param(0, 1, marks=pytest.mark.slow), pytest.param(8, 2, marks=pytest.mark.slow)],
)
def test_a_gradient_is_found_at_its_update(
    monkeypatch: pytest.MonkeyPatch, recipe: Path, run: Callable[..., Path], step: int, accumulation: int
) -> None:
    row = rows_at(recipe, 0, step)[0]
    update = min(step // accumulation * accumulation + accumulation - 1, 8)
    spoil_gradient(monkeypatch, row)
    with pytest.raises(UserError, match=f"a gradient that is not finite in epoch 1 step {update + 1}"):
        run(f"optim.grad_accumulation={accumulation}")


def test_of_accumulated_batches_the_bad_one_is_named(
    monkeypatch: pytest.MonkeyPatch, recipe: Path, run: Callable[..., Path]
) -> None:
    rows = rows_at(recipe, 0, 4)
    spoil_images(monkeypatch, rows[0])
    with pytest.raises(UserError, match="a loss that is not finite in epoch 1 step 5") as caught:
        run("optim.grad_accumulation=2")
    assert ", ".join(map(str, rows)) in caught.value.found


def test_a_learning_rate_that_is_too_high_ends_the_run(run: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match=r"not finite in epoch 1 step [2-8]") as caught:
        run("optim.lr=1e3", "optim.name=sgd", "optim.weight_decay=1e3")  # each step multiplies the weights by 1 - 1e6
    assert "optim.lr" in caught.value.hint


@pytest.mark.gpu
def test_on_a_gpu_no_step_waits_for_its_loss(
    monkeypatch: pytest.MonkeyPatch, recipe: Path, run: Callable[..., Path]
) -> None:
    device = torch.device("cuda")
    model = torch.nn.Linear(2, 2, device=device)
    trained = SimpleNamespace(model=model, scaler=torch.amp.GradScaler(enabled=False))
    monitored = SimpleNamespace(world=World(0, 1, device), state=trained)
    monitor, losses = NonFiniteMonitor(monitored), torch.ones(100, device=device)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    losses[40] = float("nan")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(95):
            if step == 40:
                model.weight.grad = torch.full_like(model.weight, float("nan"))
            monitor.check_batch(step, losses[step], True)
        with pytest.raises(NonFiniteStep) as found:
            monitor.check_batch(95, losses[95], True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (found.value.step, found.value.what) == (40, "loss")

    spoil_images(monkeypatch, rows_at(recipe, 0, 5)[3])
    with pytest.raises(UserError, match="a loss that is not finite in epoch 1 step 6"):
        run("device=cuda", "trainer.epochs=1", "loader.backend=torch")


def start_with_scale(monkeypatch: pytest.MonkeyPatch, scale: float) -> None:
    monkeypatch.setattr(state, "make_grad_scaler", lambda *_: torch.amp.GradScaler("cpu", init_scale=scale))


def test_an_overflow_in_fp16_skips_the_update_and_is_no_error(
    monkeypatch: pytest.MonkeyPatch, run: Callable[..., Path]
) -> None:
    start_with_scale(monkeypatch, 2.0**24)
    directory = run("trainer.precision=fp16")
    saved = checkpoint.load(directory / "checkpoints" / "last.pt")
    assert 2**8 <= saved["scaler"]["scale"] < 2**24
    assert saved["updates"] == 2 * 9, "a skipped update counts for the schedule"
    assert all(weight.isfinite().all() for weight in saved["model"].values())


def test_an_overflow_that_was_skipped_is_not_named_for_a_later_gradient() -> None:
    model, scale = torch.nn.Linear(2, 2), torch.tensor(4.0)
    scaler = SimpleNamespace(is_enabled=lambda: True, scale=lambda value: value * scale)
    trained = SimpleNamespace(model=model, scaler=scaler)
    monitor = NonFiniteMonitor(SimpleNamespace(world=World(0, 1, torch.device("cpu")), state=trained))

    def check(step: int, loss: float, gradient: float) -> None:
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        monitor.check_batch(step, torch.tensor(loss), True)

    check(0, math.inf, math.nan)  # skipped
    scale.fill_(0.5)
    check(1, 1.0, 1.0)
    with pytest.raises(NonFiniteStep) as found:
        check(2, 1.0, math.nan)
    assert (found.value.step, found.value.what) == (2, "gradient")


def test_a_gradient_that_is_not_finite_at_any_scale_is_an_error_in_fp16_too(
    monkeypatch: pytest.MonkeyPatch, run: Callable[..., Path]
) -> None:
    start_with_scale(monkeypatch, 4.0)
    divergence = engine.weighted_kl
    monkeypatch.setattr(engine, "weighted_kl", lambda *given: divergence(*given) + (0 * given[0].sum()).sqrt())
    with pytest.raises(UserError, match="a gradient that is not finite in epoch 1 step 4"):
        run("trainer.precision=fp16")
