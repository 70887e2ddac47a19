"""Transfer learning: frozen layers, and learning rates by depth."""

from __future__ import annotations

import difflib
import itertools
from typing import Any

from torch import nn

from shards.errors import UserError
from trainer.config.schema import ModelConfig, OptimConfig
from trainer.models.weights import classifier_tensors


def freeze(model: nn.Module, settings: ModelConfig) -> None:
    """Exclude the parameters that `model.freeze` names from training.

    Raises:
        UserError: A prefix names no parameter, the model has no layers by depth, or no parameter is left to train.
    """
    parameters = dict(model.named_parameters())
    if settings.freeze == "backbone":
        frozen = parameters.keys() - _head(model)
    elif isinstance(settings.freeze, int):
        depths = _depths(model, settings.name, coarse=True) if settings.freeze else {}
        frozen = {name for name, depth in depths.items() if depth < settings.freeze}
    else:
        frozen = {name for name in parameters if name.startswith(settings.freeze)}
        for prefix in settings.freeze:
            if not any(name.startswith(prefix) for name in parameters):
                near = difflib.get_close_matches(prefix, [name.rpartition(".")[0] for name in parameters], n=1)
                raise UserError(
                    found=f"model.freeze: no parameter of {settings.name} starts with {prefix}",
                    expected=f"prefixes of names such as {', '.join([*parameters][:3])}, ...",
                    hint=f"did you mean {near[0]}?" if near else "model.freeze=1 for the first layers",
                )
    if frozen >= parameters.keys():
        raise UserError(
            found=f"model.freeze={settings.freeze}, which freezes all {len(parameters)} parameters of {settings.name}",
            expected="parameters that are trained",
            hint="model.freeze=backbone trains the classifier only",
        )
    for name in frozen:
        parameters[name].requires_grad_(False)


def set_training_mode(model: nn.Module) -> None:
    """Set a model to training mode, except for modules whose parameters are all frozen.

    Their batch norm then uses and keeps the running statistics, and their dropout is off. So is dropout between the
    frozen layers of a sequence.
    """
    model.train()
    for module in model.modules():
        if _is_trained(module) is False:
            module.eval()
        elif isinstance(module, nn.Sequential):
            frozen = [*itertools.takewhile(lambda layer: not _is_trained(layer), module)]
            while frozen and _is_trained(frozen[-1]) is None:  # before the first trained layer
                frozen.pop()
            for layer in frozen:
                layer.eval()


def _is_trained(module: nn.Module) -> bool | None:
    """Whether any parameter is trained; None without parameters."""
    parameters = [*module.parameters()]
    return any(parameter.requires_grad for parameter in parameters) if parameters else None


def lr_scales(model: nn.Module, settings: OptimConfig) -> dict[str, tuple[int, float]]:
    """Return layer and factor of the learning rate by the name of the parameter; without an entry they are 0 and 1.

    Layer n of N has the factor `optim.layer_decay`^(N - n), as in timm's `param_groups_layer_decay` (Bao et al. 2021,
    https://arxiv.org/abs/2106.08254). The classifier has `optim.head_lr`, if it is set, and is then a layer of its own.

    Raises:
        UserError: The model has no layers by depth.
    """
    scales: dict[str, tuple[int, float]] = {}
    last = 0
    if settings.layer_decay is not None:
        depths = _depths(model, type(model).__name__, coarse=False)
        last = max(depths.values())
        scales = {name: (depth, settings.layer_decay ** (last - depth)) for name, depth in depths.items()}
    if settings.head_lr is not None:
        scales |= dict.fromkeys(_head(model), (last + 1, settings.head_lr / settings.lr))
    return scales


def _head(model: nn.Module) -> set[str]:
    """Return the names of the classifier's parameters, with those of the hidden layer of `model.head_hidden`."""
    parameters, has_hidden = dict(model.named_parameters()), "backbone" in dict(model.named_children())
    own = {name for name in parameters if has_hidden and name.startswith("head.")}
    return own or classifier_tensors(model) & parameters.keys()


def _depths(model: nn.Module, name: str, coarse: bool) -> dict[str, int]:
    """Return the number of the layer, from 0, that each parameter belongs to, by timm; our own head is the last."""
    children = dict(model.named_children())
    prefix = "backbone." if "backbone" in children else ""
    backbone: Any = children["backbone"] if prefix else model
    if not hasattr(backbone, "group_matcher"):
        raise UserError(
            found=f"model.freeze or optim.layer_decay by depth for {name}, whose layers have no numbers",
            expected="a timm model, such as efficientnet_b0",
            hint="model.freeze=[PREFIX] with prefixes of parameter names, and optim.head_lr for optim.layer_decay",
        )
    from timm.models import group_parameters  # takes a second

    depths = group_parameters(backbone, backbone.group_matcher(coarse=coarse), reverse=True)
    head = max(depths.values()) + 1
    named = {f"{prefix}{inner}": depth for inner, depth in depths.items()}
    return {parameter: named.get(parameter, head) for parameter, _ in model.named_parameters()}
