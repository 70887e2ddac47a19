"""Python text that makes a model without this package: what a model card shows, ready to run."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator

from torch import nn

from trainer.model import SMALL_CNN
from trainer.settings import Config

# Of `torch.nn.functional.interpolate`; close to `pipeline/resample.py` inside, and at the border where images grow.
RESIZE = {
    "linear": {"mode": "bilinear", "antialias": True},
    "cubic": {"mode": "bicubic", "antialias": True},
    "nearest": {"mode": "nearest-exact"},
}


def needs_timm(config: Config) -> bool:
    return config.model.name != SMALL_CNN


def construction(config: Config, model: nn.Module, channels: int, classes: int) -> str:
    """An expression for a new model of a run's form, in the names of `timm`, `torch` and `torch.nn` alone.

    model: one that was made by the same settings.
    """
    hidden = config.model.head_hidden
    if not hidden:
        return _backbone(config, model, channels, classes)
    backbone, head = model.get_submodule("backbone"), model.get_submodule("head")
    parts = {"backbone": _backbone(config, backbone, channels, 0), "head": _sequential(head)}
    inner = "".join(f'        ("{name}", {_indented(code, 8)}),\n' for name, code in parts.items())
    return f"nn.Sequential(\n    OrderedDict([\n{inner}    ])\n)"


def _backbone(config: Config, backbone: nn.Module, channels: int, classes: int) -> str:
    if needs_timm(config):
        return f'timm.create_model("{config.model.name}", in_chans={channels}, num_classes={classes})'
    return _sequential(backbone)


def _sequential(layers: nn.Module) -> str:
    """Plain layers describe themselves by what they are made with."""
    return "nn.Sequential(\n" + "".join(f"    nn.{line},\n" for line in _described(layers)) + ")"


def _described(layers: nn.Module) -> Iterator[str]:
    for layer in layers.children():
        assert type(layer).__module__.startswith("torch.nn") and not list(layer.children()), layer
        call = ast.parse(repr(layer), mode="eval").body
        assert isinstance(call, ast.Call)
        usual = inspect.signature(type(layer)).parameters
        call.keywords = [
            word for word in call.keywords if word.arg and usual[word.arg].default != ast.literal_eval(word.value)
        ]
        yield ast.unparse(call)


def _indented(code: str, by: int) -> str:
    return code.replace("\n", "\n" + " " * by)
