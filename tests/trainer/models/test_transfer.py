"""Frozen layers stay as they are, and learning rates by depth are those of timm."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import nn

from shards import UserError
from trainer.config.schema import Config, ModelConfig, OptimConfig
from trainer.models.factory import check_resolutions, make_model
from trainer.models.transfer import freeze, lr_scales, set_training_mode
from trainer.optim.optimizers import make_optimizer
from trainer.optim.schedules import LRSchedule

TINY = "test_efficientnet"  # stem, blocks.0 to blocks.3, head


def made(**settings: Any) -> tuple[nn.Module, ModelConfig]:
    config = ModelConfig(**{"name": TINY} | settings)
    torch.manual_seed(0)
    model = make_model(config, channels=1, classes=3)
    freeze(model, config)
    return model, config


@pytest.mark.parametrize(
    ("settings", "trained"),
    [
        ({"freeze": 0}, "conv_stem bn1 blocks conv_head bn2 classifier"),
        ({"freeze": 1}, "blocks conv_head bn2 classifier"),
        ({"freeze": 3}, "blocks.2 blocks.3 blocks.4 conv_head bn2 classifier"),
        ({"freeze": ["blocks", "conv_stem"]}, "bn1 conv_head bn2 classifier"),
        ({"freeze": "backbone"}, "classifier"),
        ({"freeze": "backbone", "head_hidden": 5}, "head"),
        (
            {"freeze": 5, "head_hidden": 5, "gray_input": "repeated"},
            "backbone.blocks.4 backbone.conv_head backbone.bn2 head",
        ),
        ({"freeze": "backbone", "name": "lenet"}, "11"),
    ],
)
def test_a_step_changes_what_is_not_frozen(settings: dict[str, Any], trained: str) -> None:
    model, _ = made(**settings)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    set_training_mode(model)
    optimizer = make_optimizer(model, OptimConfig(lr=0.1, weight_decay=0.1))
    images = torch.randn(8, 1, *[28 if settings.get("name") else 32] * 2, generator=torch.Generator().manual_seed(1))
    nn.functional.cross_entropy(model(images), torch.arange(8) % 3).backward()
    optimizer.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) != name.startswith(tuple(trained.split())), name


def test_frozen_modules_are_in_evaluation_mode_and_the_others_in_training_mode() -> None:
    model, _ = made(freeze=2, drop_path_rate=0.5)
    model.eval()
    set_training_mode(model)
    assert not any(layer.training for layer in model.blocks[0].modules()) and not model.bn1.training
    assert all(layer.training for layer in [*model.blocks[1].modules(), model.classifier]) and model.training


@pytest.mark.parametrize(
    ("frozen", "training"),
    [("013", "000011"), ("01", "001111"), ("0", "011111"), ("35", "111010"), ("", "111111")],
)
def test_dropout_between_frozen_layers_of_a_sequence_is_off(frozen: str, training: str) -> None:
    layers = [nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Dropout(), nn.Conv2d(2, 2, 1), nn.Dropout(), nn.Linear(2, 3)]
    for number in frozen:
        layers[int(number)].requires_grad_(False)
    set_training_mode(nn.Sequential(*layers))
    assert "".join(str(int(layer.training)) for layer in layers) == training


@pytest.mark.parametrize("name", [TINY, "test_vit", "test_resnet"])
def test_layer_decay_is_that_of_timm(name: str) -> None:
    model = timm.create_model(name, num_classes=3)
    expected = {
        id(weight): group["lr_scale"]
        for group in param_groups_layer_decay(model, layer_decay=0.7)
        for weight in group["params"]
    }
    scales = lr_scales(model, OptimConfig(layer_decay=0.7))
    assert {id(weight): scales[key][1] for key, weight in model.named_parameters()} == pytest.approx(expected)
    assert len({*scales.values()}) > 3 and max(scales.values())[1] == 1


@pytest.mark.parametrize("layer_decay", [None, 0.5])
@pytest.mark.parametrize("hidden", [None, 4])
def test_groups_do_not_depend_on_rates(hidden: int | None, layer_decay: float | None) -> None:
    """A checkpoint lists moments by position, so a resumed run with another rate needs the same groups."""
    model, _ = made(head_hidden=hidden)
    names = {id(weight): name for name, weight in model.named_parameters()}
    found = []
    for lr in (0.5, 1.0, 2.0):
        optimizer = make_optimizer(model, OptimConfig(lr=lr, head_lr=1.0, layer_decay=layer_decay))
        found.append([[names[id(weight)] for weight in group["params"]] for group in optimizer.param_groups])
        assert optimizer.param_groups[-1]["lr_scale"] == 1 / lr
    assert found[0] == found[1] == found[2]
    assert found[0][-1][-1] == ("head.3.weight" if hidden else "classifier.weight")


@pytest.mark.parametrize("settings", [{}, {"gray_input": "repeated"}, {"head_hidden": 4}])
@pytest.mark.parametrize("name", ["test_vit", "test_vit2"])
def test_tokens_and_embeddings_of_positions_are_not_decayed_in_a_network_of_ours(
    name: str, settings: dict[str, Any]
) -> None:
    model, _ = made(name=name, **settings)
    groups = make_optimizer(model, OptimConfig(weight_decay=0.1)).param_groups
    decayed = {id(weight) for group in groups if group["weight_decay"] for weight in group["params"]}
    names = [name for name, weight in model.named_parameters() if id(weight) not in decayed and weight.ndim > 1]
    assert {name.rpartition(".")[2] for name in names} == getattr(model, "backbone", model).no_weight_decay() & {
        name.removeprefix("backbone.") for name, _ in model.named_parameters()
    }
    assert any("pos_embed" in name for name in names)


def test_rates_by_depth_follow_the_schedule() -> None:
    model, _ = made(head_hidden=4)
    config = Config.model_validate(
        {
            "data": {"shards": ""},
            "optim": {"lr": 0.1, "head_lr": 0.5, "layer_decay": 0.5},
            "schedule": {"name": "cosine", "min_lr": 0.01},
            "trainer": {"epochs": 2},
        }
    )
    optimizer = make_optimizer(model, config.optim)
    schedule = LRSchedule(optimizer, config, [2, 2])
    scales = lr_scales(model, config.optim)

    def rates() -> dict[str, float]:
        by_weight = {id(weight): group["lr"] for group in optimizer.param_groups for weight in group["params"]}
        return {name: by_weight[id(weight)] for name, weight in model.named_parameters()}

    for rate in (0.1, 0.01 + 0.09 * (2 + 2**0.5) / 4, 0.055):
        assert schedule.lr == pytest.approx(rate)
        assert rates() == pytest.approx({name: scale * rate for name, (_, scale) in scales.items()})
        assert rates()["head.3.weight"] == pytest.approx(5 * rate)
        assert rates()["backbone.conv_stem.weight"] < rates()["backbone.blocks.1.0.conv_exp.weight"] < rate
        optimizer.step()
        schedule.step_update()
    restored = make_optimizer(model, config.optim)
    again = LRSchedule(restored, config, [2, 2])
    restored.load_state_dict(optimizer.state_dict())
    again.load_state_dict(schedule.state_dict())
    assert [group["lr"] for group in restored.param_groups] == [group["lr"] for group in optimizer.param_groups]
    assert again.lr == schedule.lr


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"freeze": ["block.1"]}, "block.1"),
        ({"freeze": 100}, "all"),
        ({"freeze": 1, "name": "three_block_cnn"}, "three_block_cnn"),
        ({"name": "three_block_cnn", "options": {"img_size": 28}}, "model.options"),
        ({"options": {"img_sise": 28}}, "img_sise"),
        ({"options": {"act_layer": "rellu"}}, "rellu"),
        ({"options": {"features_only": True}}, "head_hidden_size"),
        ({"name": "test_vit", "options": {"num_heads": 0}}, "test_vit"),
    ],
)
def test_what_a_model_cannot_do_is_one_message(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        made(**settings)


def test_a_vision_transformer_takes_small_images_by_its_options() -> None:
    small, _ = made(name="test_vit", options={"img_size": 28, "patch_size": 7})
    check_resolutions(small, "test_vit", 1, [28])
    assert small.patch_embed.proj.kernel_size == (7, 7) and small.pos_embed.shape[1] == 16 + 1
    images = torch.randn(6, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(6) % 3
    optimizer = make_optimizer(small, OptimConfig(lr=3e-3))
    losses = []
    for _ in range(8):
        loss = nn.functional.cross_entropy(small(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * losses[0]
    large, _ = made(name="test_vit")
    with pytest.raises(UserError) as caught:
        check_resolutions(large, "test_vit", 1, [28])
    assert "model.options={patch_size: N}" in caught.value.hint
