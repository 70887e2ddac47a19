"""Weights as other programs leave them load, or the error lists what does not fit."""

from __future__ import annotations

import argparse
import collections
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from shards import UserError
from trainer.config.schema import ModelConfig
from trainer.models.factory import make_model
from trainer.models.weights import load_weights

TINY = "test_efficientnet"
CLASSES = 10


class AttributeDict(dict):
    """As a Lightning checkpoint holds its hyperparameters."""


class Hyperparameters:
    """An object whose class a reader of the file may lack."""

    def __init__(self) -> None:
        self.learning_rate = 0.1


@pytest.fixture(scope="module")
def published() -> nn.Module:
    torch.manual_seed(1)
    return timm.create_model(TINY, in_chans=1, num_classes=CLASSES)


def build(path: Path | None, channels: int = 1, classes: int = CLASSES, **settings: Any) -> Any:
    torch.manual_seed(2)
    return make_model(ModelConfig(**{"name": TINY, "init_checkpoint": path} | settings), channels, classes)


def assert_loaded(model: nn.Module, expected: nn.Module, besides: tuple[str, ...] = ()) -> None:
    own, theirs = model.state_dict(), expected.state_dict()
    assert own.keys() == theirs.keys()
    for name, tensor in own.items():
        if name not in besides:
            assert torch.equal(tensor, theirs[name]), name


def prefixed(prefix: str) -> Callable[[dict], Any]:
    return lambda state: OrderedDict((prefix + name, tensor) for name, tensor in state.items())


@pytest.mark.parametrize(
    "wrap",
    [
        prefixed(""),
        prefixed("module."),
        prefixed("_orig_mod."),
        prefixed("module._orig_mod."),
        prefixed("_orig_mod.module."),
        prefixed("backbone."),
        lambda state: {"state_dict": state, "epoch": 3, "optimizer": {"state": {}}, "metric": 70.0},
        lambda state: {"model": state, "args": argparse.Namespace(lr=0.1), "epoch": 3},
        lambda state: {"model": {"state_dict": prefixed("module.")(state)}},
        lambda state: {"model_state_dict": state, "scheduler": Hyperparameters()},
        lambda state: {
            "state_dict": prefixed("model.")(state) | {"criterion.weight": torch.ones(3)},
            "hyper_parameters": AttributeDict(lr=0.1),
            "pytorch-lightning_version": "2.0",
        },
        lambda state: {"state_dict": prefixed("net._orig_mod.")(state), "callbacks": {"x": collections.Counter("ab")}},
        lambda state: (
            {"state_dict": {name: torch.zeros_like(tensor) for name, tensor in state.items()}}
            | {"state_dict_ema": prefixed("module.")(state), "args": argparse.Namespace()}
        ),
        lambda state: {"model": {"x.y": torch.zeros(1)}, "model_ema": state},
        lambda state: {"state_dict_ema": None, "state_dict": state},
        lambda state: {name: tensor for name, tensor in state.items() if "num_batches" not in name},
    ],
)
def test_weights_of_other_programs_load(tmp_path: Path, published: nn.Module, wrap: Callable[[dict], Any]) -> None:
    path = tmp_path / "weights.pth"
    torch.save(wrap(dict(published.state_dict())), path)
    assert_loaded(build(path), published)


def test_a_file_in_the_old_format_of_torch_loads(tmp_path: Path, published: nn.Module) -> None:
    path = tmp_path / "weights.pth"
    content = {"state_dict": published.state_dict(), "args": argparse.Namespace(lr=0.1)}
    torch.save(content, path, _use_new_zipfile_serialization=False)
    assert_loaded(build(path), published)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rgb_weights_of_other_classes_load_for_gray_images(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, suffix: str, dtype: torch.dtype
) -> None:
    """A gray image has equal channels, so its convolution is the sum over them, as timm adapts its own weights."""
    rgb = timm.create_model(TINY, num_classes=1000).to(dtype)
    path = tmp_path / f"weights{suffix}"
    state = {name: tensor.contiguous() for name, tensor in rgb.state_dict().items()}
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    model = build(path)
    expected = timm.create_model(TINY, in_chans=1, num_classes=CLASSES)
    expected.load_state_dict(
        {k: v for k, v in state.items() if k.split(".")[0] not in ("classifier", "conv_stem")}, strict=False
    )
    expected.conv_stem.weight.data = state["conv_stem.weight"].float().sum(dim=1, keepdim=True).to(dtype).float()
    assert_loaded(model, expected, besides=("classifier.weight", "classifier.bias"))
    assert "conv_stem.weight is adapted from 3 to 1 channels" in caplog.text
    assert "is for 1000 classes: the classifier" in caplog.text


def test_gray_weights_load_for_rgb_images(tmp_path: Path, published: Any) -> None:
    path = tmp_path / "weights.pth"
    torch.save(published.state_dict(), path)
    model = build(path, channels=3).eval()
    gray = torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(gray.expand(-1, 3, -1, -1)), published.eval()(gray))


@pytest.mark.parametrize(
    "settings", [{"head_hidden": 5}, {"gray_input": "repeated"}, {"gray_input": "repeated", "head_hidden": 5}]
)
def test_weights_of_timm_load_into_a_network_with_layers_of_ours(tmp_path: Path, settings: dict[str, Any]) -> None:
    repeats = "gray_input" in settings
    rgb = timm.create_model(TINY, in_chans=3 if repeats else 1, num_classes=7)
    path = tmp_path / "weights.pth"
    torch.save(rgb.state_dict(), path)
    model = build(path, **settings)
    theirs, own = rgb.state_dict(), model.backbone.state_dict()
    assert [
        name for name in own if not name.startswith("classifier") and not torch.equal(own[name], theirs[name])
    ] == []


@pytest.mark.parametrize("settings", [{}, {"head_hidden": 5}, {"name": "squeezenet1_1"}])
def test_a_random_first_convolution_stays_random_with_weights_of_rgb_images(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    path = tmp_path / "weights.pth"
    torch.save(build(None, channels=3, **settings).state_dict(), path)
    loaded = build(path, gray_input="random", **settings).state_dict()
    first, *others = [name for name, tensor in loaded.items() if tensor.ndim == 4]
    stem = {name for name in loaded if name.rpartition(".")[0] == first.rpartition(".")[0]}
    expected = torch.load(path) | {
        name: tensor
        for name, tensor in build(None, gray_input="random", **settings).state_dict().items()
        if name in stem
    }
    assert [name for name in loaded if not torch.equal(loaded[name], expected[name])] == []
    assert others and not torch.equal(loaded[first], torch.load(path)[first].sum(dim=1, keepdim=True))


def test_weights_of_gray_images_need_no_random_convolution(tmp_path: Path, published: nn.Module) -> None:
    path = tmp_path / "weights.pth"
    torch.save(published.state_dict(), path)
    assert_loaded(build(path, gray_input="random"), published)


@pytest.mark.parametrize(
    ("epoch", "averaged", "expected"), [(2, 1.0, 1.0), (2, None, 0.0), (0, 1.0, 0.0)], ids=["average", "none", "early"]
)
def test_a_checkpoint_with_averaged_weights_gives_these(
    tmp_path: Path, epoch: int, averaged: float | None, expected: float
) -> None:
    """Before the first validation, the average of a schedule-free optimizer holds the initial weights."""
    path, model = tmp_path / "last.pt", nn.Linear(2, 2)
    own, ema = (
        {name: torch.full_like(tensor, value) for name, tensor in model.state_dict().items()} for value in (0.0, 1.0)
    )
    torch.save({"model": own, "ema": ema if averaged else None, "classes": ["a", "b"], "epoch": epoch}, path)
    load_weights(model, path)
    assert (model.weight == expected).all() and (model.bias == expected).all()


def test_position_embeddings_of_another_resolution_are_resampled(tmp_path: Path) -> None:
    larger = timm.create_model("test_vit", img_size=320, num_classes=CLASSES)
    path = tmp_path / "weights.pth"
    torch.save(larger.state_dict(), path)
    model = make_model(ModelConfig(name="test_vit", init_checkpoint=path), 3, CLASSES)
    assert torch.equal(model.blocks[0].attn.qkv.weight, larger.blocks[0].attn.qkv.weight)
    assert model.pos_embed.shape != larger.pos_embed.shape
    assert torch.isfinite(model.pos_embed).all()
    assert not torch.equal(model.pos_embed, timm.create_model("test_vit").pos_embed)


def test_weights_without_a_classifier_load(tmp_path: Path, published: Any, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "weights.pth"
    torch.save({name: each for name, each in published.state_dict().items() if "classifier" not in name}, path)
    assert_loaded(build(path), published, besides=("classifier.weight", "classifier.bias"))
    assert "has no classifier" in caplog.text


def test_the_error_lists_what_does_not_fit(tmp_path: Path, published: nn.Module) -> None:
    state = dict(published.state_dict())
    state["extra.weight"] = torch.zeros(2)
    del state["bn2.weight"]
    state["conv_head.weight"] = torch.zeros(3, 3)
    path = tmp_path / "weights.pth"
    torch.save(state, path)
    with pytest.raises(UserError) as caught:
        build(path)
    shape = list(published.state_dict()["conv_head.weight"].shape)
    for part in (
        "1 missing (bn2.weight)",
        "1 unexpected (extra.weight)",
        f"1 of another shape (conv_head.weight [3, 3] instead of {shape})",
    ):
        assert part in caught.value.found


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (nn.Linear(2, 2), "holds a pickled model, whose code is not run"),
        ({"model": nn.Linear(2, 2)}, "no weights in"),
        ({"epoch": 3}, "no weights in"),
        ([torch.zeros(2)], "no weights in"),
    ],
)
def test_a_file_without_a_state_dict_is_refused(tmp_path: Path, content: Any, expected: str) -> None:
    path = tmp_path / "model.pt"
    torch.save(content, path)
    with pytest.raises(UserError, match=expected) as caught:
        load_weights(nn.Linear(2, 2), path)
    assert "torch.save(model.state_dict(), FILE)" in caught.value.hint


def test_a_run_directory_and_an_ensemble_are_refused_with_what_to_name(tmp_path: Path) -> None:
    best = tmp_path / "checkpoints" / "best.pt"
    best.parent.mkdir()
    torch.save({"model": {}, "classes": ["a", "b"], "members": [{}, {}]}, best)
    with pytest.raises(UserError, match="a run directory") as caught:
        load_weights(nn.Linear(2, 2), tmp_path)
    assert caught.value.hint == f"model.init_checkpoint={best}"
    with pytest.raises(UserError, match="an ensemble of 2 networks") as caught:
        load_weights(nn.Linear(2, 2), best)
    assert caught.value.hint.endswith(f"distillation.teacher={best}")
