"""What updates all weights in few kernels, held against timm's plain forms of it; several ranks against one."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm.optim
import timm.utils
import torch
import yaml
from support.run_outcome import weights
from support.training_runs import train, train_here
from torch import nn

from trainer.config.schema import ModelConfig, OptimConfig
from trainer.models.factory import make_model
from trainer.optim.ema import ModelEma
from trainer.optim.optimizers import make_optimizer

NAMES = {"adam": "adam", "adamw": "adamw", "lion": "lion", "sgd_lookahead": "lookahead_sgd"}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


def model_on(device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    return make_model(ModelConfig(name="test_efficientnet"), 1, 5).to(device)


def updates(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> list[torch.Tensor]:
    """The weights after some updates with synthetic gradients."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        for weight in model.parameters():
            weight.grad = torch.randn(weight.shape, generator=generator).to(weight.device)
        optimizer.step()
    return [weight.detach().clone() for weight in model.parameters()]


@pytest.mark.parametrize("name", ["lion", "sgd_lookahead", "adam", "adamw"])
def test_every_optimiser_computes_what_timms_plain_one_does(name: str, device: torch.device) -> None:
    ours, plain = model_on(device), model_on(device)
    settings = OptimConfig(name=name, lr=0.01, weight_decay=0.05, momentum=0.8)
    options = {"momentum": 0.8} if name == "sgd_lookahead" else {}
    reference = timm.optim.create_optimizer_v2(
        plain, opt=NAMES[name], lr=0.01, weight_decay=0.05, foreach=False, **options
    )
    found = updates(ours, make_optimizer(ours, settings), 13)
    expected = updates(plain, reference, 13)
    for weight, plain_weight in zip(found, expected, strict=True):
        if name == "lion":
            assert torch.equal(weight, plain_weight)
        torch.testing.assert_close(weight, plain_weight, rtol=1e-4, atol=1e-6)


def test_the_average_is_timms_to_the_last_bit(device: torch.device) -> None:
    model = model_on(device)
    ours = ModelEma(model, decay=0.95)
    plain = timm.utils.ModelEmaV3(model, decay=0.95, use_warmup=True)
    for step in range(1, 12):
        with torch.no_grad():
            for tensor in [*model.parameters(), *model.buffers()]:
                tensor.add_(1)
        ours.update(step)
        plain.update(model, step=step)
    expected, found = plain.module.state_dict(), ours.module.state_dict()
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert not any(weight.requires_grad for weight in ours.module.parameters())


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "most"), [("lion", 75), ("adamw", 20)])
def test_an_update_takes_few_kernels(name: str, most: int) -> None:
    model = model_on(torch.device("cuda"))
    optimizer, average = make_optimizer(model, OptimConfig(name=name)), ModelEma(model, decay=0.9)
    updates(model, optimizer, 1)
    average.update(1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        optimizer.step()
        average.update(2)
    kernels = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(list(model.parameters())) > 40
    assert 0 < len(kernels) < most


@pytest.mark.parametrize("accumulation", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_two_ranks_learn_what_one_does(
    accumulation: int, synthetic_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model without batch norm, which sees its rank's share alone: gradients shared and put off are the same."""
    recipe = tmp_path / "recipe.yaml"
    content = {
        "data": {"shards": str(synthetic_set), "val_fraction": 0.1, "resolution": 32},
        "loader": {"batch_size": 64},
        "model": {"name": "test_convnext"},
        "optim": {"name": "sgd_lookahead", "lr": 0.05, "grad_accumulation": accumulation},
        "trainer": {"epochs": 1, "precision": "fp32"},
    }
    recipe.write_text(yaml.safe_dump(content))
    two = train(recipe, tmp_path / "two", ranks=2)
    assert two.returncode == 0, two.stdout + two.stderr
    assert "Warning" not in two.stderr, two.stderr
    assert train_here(monkeypatch, recipe, tmp_path / "one") == 0
    expected, found = weights(tmp_path / "one"), weights(tmp_path / "two")
    first = make_model(ModelConfig(name="test_convnext"), 1, 5).state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=2e-6)
    assert any((first[name] - tensor).abs().max() > 1e-3 for name, tensor in expected.items())
