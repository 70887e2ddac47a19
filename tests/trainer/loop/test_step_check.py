"""Batches that batch norm or the memory does not take are refused before the first step, with a setting that works."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch import nn

from pipeline.sampler import ShuffledBatchSampler
from shards import UserError
from trainer.config.load import load
from trainer.config.schema import Config, ModelConfig
from trainer.data.resolution_schedule import resolution_stages
from trainer.loop import step_check
from trainer.loop.step_check import check_batch_sizes, saved_tensor_bytes
from trainer.models.factory import make_model
from trainer.run import main as run_main

QUICKSTART = ROOT / "configs" / "quickstart.yaml"
TINY = "test_efficientnet"  # its last batch norm sees one pixel at 28x28


def training_of(samples: int, ranks: int, model: nn.Module, config: Config) -> Any:
    """What `check_batch_sizes` reads of a training."""
    sampler = {
        stage: ShuffledBatchSampler(np.arange(samples), stage.batch_size, 0) for stage in resolution_stages(config)
    }
    train = SimpleNamespace(
        samples=np.arange(samples),
        stages=tuple(sampler),
        steps=lambda epoch: [each for stage, each in sampler.items() if stage.first <= epoch][-1].steps_per_epoch,
    )
    return SimpleNamespace(
        config=config,
        data=SimpleNamespace(train=train, spec=SimpleNamespace(image_shape=(8, 8, 1))),
        world=SimpleNamespace(size=ranks),
        state=SimpleNamespace(model=model),
        samplers=sampler,
    )


def smallest_batch(training: Any) -> int:
    """The smallest batch of any rank in any step of any stage, by listing them all."""
    ranks = training.world.size
    return min(
        len(step.samples)
        for sampler in training.samplers.values()
        for rank in range(ranks)
        for step in sampler.steps(0, rank, ranks)
    )


@pytest.mark.parametrize("has_batch_norm", [True, False])
@pytest.mark.parametrize("schedule", ["16", "[[1, 8], [2, 16]]"])
@pytest.mark.parametrize(
    ("samples", "batch_size", "ranks"),
    [(3, 2, 1), (4, 2, 1), (9, 4, 2), (7, 6, 2), (1, 1, 1), (5, 1, 3), (40, 12, 4), (13, 3, 1), (33, 8, 4)],
)
def test_every_batch_of_every_rank_and_stage_is_checked(
    has_batch_norm: bool, samples: int, batch_size: int, ranks: int, schedule: str
) -> None:
    norm = nn.BatchNorm1d(1) if has_batch_norm else nn.LayerNorm(1)
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), norm)
    overrides = [f"data.resolution={schedule}", "trainer.epochs=3", "loader.scale_batch_with_resolution=true"]
    config = load(QUICKSTART, [*overrides, f"loader.batch_size={batch_size}"])
    training = training_of(samples, ranks, model, config)
    needed = 2 if has_batch_norm else 1
    if smallest_batch(training) >= needed:
        check_batch_sizes(training)
        return
    with pytest.raises(UserError) as caught:
        check_batch_sizes(training)
    assert ("batch norm" in caught.value.expected) == (has_batch_norm and smallest_batch(training) == 1)
    if caught.value.hint.startswith("loader.batch_size="):
        larger = load(QUICKSTART, [*overrides, caught.value.hint])
        assert smallest_batch(training_of(samples, ranks, model, larger)) >= 2
    else:
        assert samples < 2 * ranks, "no batch size is sufficient"


def test_batch_norm_takes_one_image_of_several_pixels() -> None:
    model = make_model(ModelConfig(name=TINY), 1, 4)
    assert saved_tensor_bytes(model, (1, 1, 64, 64)) > 0
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        saved_tensor_bytes(model, (1, 1, 28, 28))
    assert saved_tensor_bytes(model, (2, 1, 28, 28)) > 0


@pytest.mark.parametrize("name", [TINY, "three_block_cnn", "test_vit", "test_resnet"])
def test_the_estimate_is_what_autograd_keeps(name: str) -> None:
    model = make_model(ModelConfig(name=name), 3, 10).train()
    side = 160 if name == "test_vit" else 32
    state, running = torch.get_rng_state(), {key: value.clone() for key, value in model.state_dict().items()}
    estimate = saved_tensor_bytes(model, (6, 3, side, side))
    assert torch.equal(torch.get_rng_state(), state), "the run draws the same numbers as without the estimate"
    assert all(torch.equal(running[key], value) for key, value in model.state_dict().items())
    weights = {each.untyped_storage()._cdata for each in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage()._cdata not in weights:
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(torch.zeros(6, 3, side, side))
    actual = sum(storage.nbytes() for storage in kept.values())
    assert 0.85 * actual < estimate <= actual, "it refuses no step that fits"


def start(digits_set: Path, directory: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    given = [str(QUICKSTART), f"data.shards={digits_set}", f"run.dir={directory}", "device=cpu", *arguments]
    monkeypatch.setattr(sys, "argv", ["trainer.run", *given])
    return run_main()


def test_a_batch_of_one_image_is_refused_before_the_run(
    digits_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = (f"model.name={TINY}", "loader.batch_size=2", "data.train_fraction=0.004", "trainer.epochs=1")
    with pytest.raises(UserError, match="the smallest batch of a rank has 1") as caught:
        start(digits_set, tmp_path / "run", monkeypatch, *small)
    assert not (tmp_path / "run").exists()
    assert start(digits_set, tmp_path / "run", monkeypatch, *small, caught.value.hint) == 0


def test_a_step_that_exceeds_the_memory_is_refused_and_a_dry_run_takes_a_smaller_one(
    digits_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(step_check, "available_memory", lambda: 100_000_000)
    many = ("loader.batch_size=1000000", "data.resolution=64")
    with pytest.raises(UserError, match=r"a step of 1,294 images needs at least .* 0.1 GB are available") as caught:
        start(digits_set, tmp_path / "run", monkeypatch, *many)
    assert not (tmp_path / "run").exists()
    assert caught.value.hint.startswith("loader.batch_size=")
    assert start(digits_set, tmp_path / "run", monkeypatch, *many, "--dry-run") == 0
    output = capsys.readouterr()
    size = caught.value.hint.split()[0].split("=")[1]
    assert f"loader.batch_size={size} " in output.out
    assert "one step      loss" in output.out
    assert "exceeds the 1,294 training images" in output.err
    assert "[1294, 1, 64, 64] per rank" in output.out
    many_steps = (*many, *caught.value.hint.split(), "--dry-run")
    assert start(digits_set, tmp_path / "run", monkeypatch, *many_steps) == 0
    assert "memory " not in capsys.readouterr().out, "the hint fits"


@pytest.mark.parametrize(
    ("repeats", "ranks", "warns"), [(3, 1, False), (3, 4, True), (4, 2, False), (8, 2, True), (1, 8, False)]
)
def test_images_that_are_mixed_with_themselves_are_named(
    repeats: int, ranks: int, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Mixing takes the image that is `repeats` further in the batch of a rank."""
    overrides = [f"loader.repeated_augmentation={repeats}", "mixup.prob=1", "loader.batch_size=16"]
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(1))
    check_batch_sizes(training_of(64, ranks, model, load(QUICKSTART, overrides)))
    images = np.arange(16 // ranks) // repeats
    assert bool((images == np.roll(images, repeats)).any() and repeats > 1) == warns
    assert ("mix some images with copies of themselves" in caplog.text) == warns
