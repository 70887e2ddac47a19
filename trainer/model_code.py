"""Python text that makes a model without this package: what a model card shows, ready to run."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from trainer.model import RepeatChannels
from trainer.networks.efficientnet import efficientnet_b0
from trainer.networks.squeezenet import squeezenet1_1
from trainer.settings import OWN, Model

# Networks that are more than a sequence of torch's own layers. Their modules need torch and torchvision alone.
_BUILT = {"cifar_efficientnet": efficientnet_b0, "squeezenet1_1": squeezenet1_1}
# Of `torch.nn.functional.interpolate`; close to `transforms/ops/resize.py` inside, and at the border where images grow.
RESIZE = {
    "linear": {"mode": "bilinear", "antialias": True},
    "cubic": {"mode": "bicubic", "antialias": True},
    "nearest": {"mode": "nearest-exact"},
}


@dataclass(frozen=True)
class Construction:
    """definitions: what comes before, as whole modules and classes. model: an expression for a new model, in the names
    that they, `timm`, `torch.nn` and `collections.OrderedDict` define."""

    definitions: str
    model: str


def needs_timm(settings: Model) -> bool:
    return settings.name not in OWN


def construction(settings: Model, model: nn.Module, channels: int, classes: int) -> Construction:
    """How to make a new model of a run's form. model: one that was made by the same settings."""
    definitions = []
    if settings.name in _BUILT:
        # First, as a module may begin with an import from the future.
        definitions.append(inspect.getsource(sys.modules[_BUILT[settings.name].__module__]))
    parts = dict(model.named_children())
    repeats = isinstance(parts.get("repeat"), RepeatChannels)
    if not settings.head_hidden and not repeats:
        return Construction("".join(definitions), _backbone(settings, model, channels, classes))
    lines = {}
    if repeats:
        channels = parts["repeat"].channels
        definitions.append(f"import torch\nfrom torch import nn\n\n\n{inspect.getsource(RepeatChannels)}")
        lines["repeat"] = f"RepeatChannels({channels})"
    lines["backbone"] = _backbone(settings, parts["backbone"], channels, 0 if settings.head_hidden else classes)
    if settings.head_hidden:
        lines["head"] = _sequential(parts["head"])
    inner = "".join(f'        ("{name}", {_indented(code, 8)}),\n' for name, code in lines.items())
    return Construction("\n\n".join(definitions), f"nn.Sequential(\n    OrderedDict([\n{inner}    ])\n)")


def _backbone(settings: Model, backbone: nn.Module, channels: int, classes: int) -> str:
    if needs_timm(settings):
        return f'timm.create_model("{settings.name}", in_chans={channels}, num_classes={classes})'
    if settings.name in _BUILT:
        return f"{_BUILT[settings.name].__name__}({channels}, {classes}, drop_rate=0.0)[0]"
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
