"""Optimizers by name."""

from __future__ import annotations

from collections.abc import Collection
from fnmatch import fnmatch
from typing import Any

import torch

from shards.errors import UserError, first_line
from trainer.config.schema import OptimConfig
from trainer.models.transfer import lr_scales
from trainer.optim.schedule_free import ScheduleFreeAdamW


def make_optimizer(model: torch.nn.Module, settings: OptimConfig) -> torch.optim.Optimizer:
    """Build the optimizer of a model's trainable parameters, without weight decay of biases and norms.

    Raises:
        UserError: `optim.options` has an argument that the optimizer does not take.
    """
    options = dict(settings.options)
    fallback = options.pop("fallback_list", ())
    try:
        if options:
            _try_step(settings, options, next(model.parameters()).device)
        optimizer = _build(_param_groups(model, settings, fallback), settings, options)
    except (TypeError, ValueError, AssertionError, ImportError, LookupError, RuntimeError) as error:
        raise UserError(
            found=f"optim.name={settings.name} optim.options={settings.options}, which raises: {first_line(error)}",
            expected="arguments that the optimizer takes",
            hint="change optim.options or optim.name",
        ) from None
    # timm's Lookahead has no hooks of its own and loads its state into the optimizer that it wraps.
    holder: torch.optim.Optimizer = getattr(optimizer, "_base_optimizer", optimizer)
    holder.register_load_state_dict_post_hook(_match_layouts)
    return optimizer


def _try_step(settings: OptimConfig, options: dict[str, Any], device: torch.device) -> None:
    """Make a step on two small weights: many options are used, and checked, only in a step."""
    weights = [torch.nn.Parameter(torch.ones(shape, device=device)) for shape in ((2, 2), (2,))]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    _build([{"params": weights, "weight_decay": settings.weight_decay}], settings, options).step()


def _param_groups(model: torch.nn.Module, settings: OptimConfig, fallback: Collection[str]) -> list[dict[str, Any]]:
    """Group parameters by weight decay, the fallback of hybrid optimizers such as Muon, and layer.

    The groups do not depend on the learning rates, which a resumed run may change.
    """
    scales = lr_scales(model, settings)
    # timm's models name further parameters without weight decay. Ours may wrap one of them.
    backbone, prefix = (inner, "backbone.") if (inner := getattr(model, "backbone", None)) else (model, "")
    no_decay = {f"{prefix}{name}" for name in getattr(backbone, "no_weight_decay", tuple)()}
    groups: dict[tuple[bool, bool, int], dict[str, Any]] = {}
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            exempt = weight.ndim <= 1 or name.endswith(".bias") or any(fnmatch(name, pattern) for pattern in no_decay)
            is_fallback = any(fnmatch(name, pattern) for pattern in fallback)
            decay = 0.0 if exempt else settings.weight_decay
            group = {"params": [], "weight_decay": decay} | ({"use_fallback": True} if is_fallback else {})
            layer, scale = scales.get(name, (0, 1.0))
            if scales:
                group["lr_scale"] = scale
            groups.setdefault((not exempt, is_fallback, layer), group)["params"].append(weight)
    return [groups[key] for key in sorted(groups)]


def _build(groups: list[dict[str, Any]], settings: OptimConfig, options: dict[str, Any]) -> torch.optim.Optimizer:
    name, lr, decay = settings.name, settings.lr, settings.weight_decay
    if name in ("adam", "adamw"):
        adam = torch.optim.Adam if name == "adam" else torch.optim.AdamW
        return adam(groups, lr, weight_decay=decay, **{"fused": True} | options)
    if name == "sgd":
        return _sgd(groups, settings, options)
    from trainer.optim import skippable  # the import of timm takes a second

    if name == "sgd_lookahead":
        return skippable.Lookahead(_sgd(groups, settings, {"nesterov": True} | options))
    if name == "lion":
        return skippable.Lion(groups, lr, weight_decay=decay, **{"foreach": True} | options)
    if name == "schedule_free_adamw":
        return skippable.skip_overflows(ScheduleFreeAdamW(groups, lr, weight_decay=decay, **options))
    from timm.optim import create_optimizer_v2

    inner = create_optimizer_v2(groups, name.removeprefix("lookahead_"), lr, decay, settings.momentum, **options)
    # timm's Lookahead does not call the hooks that skip a step.
    skipping = skippable.skip_overflows(inner)
    return skippable.Lookahead(skipping) if name.startswith("lookahead_") else skipping


def _sgd(groups: list[dict[str, Any]], settings: OptimConfig, options: dict[str, Any]) -> torch.optim.SGD:
    lr, momentum, decay = settings.lr, settings.momentum, settings.weight_decay
    optimizer = torch.optim.SGD(groups, lr, momentum, weight_decay=decay, **{"fused": True} | options)

    def create_momentum(optimizer: torch.optim.Optimizer, *_: object) -> None:
        """Create the momentum before a first step that may be skipped, which would leave torch's uninitialized."""
        if getattr(optimizer, "found_inf", None) is not None and not optimizer.state:
            for weight in (weight for group in optimizer.param_groups for weight in group["params"]):
                optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight)

    optimizer.register_step_pre_hook(create_momentum)
    return optimizer


def _match_layouts(optimizer: torch.optim.Optimizer) -> None:
    """Store moments in the memory format of their weights.

    A resumed run may have another `trainer.channels_last`. Fused kernels of a CPU read weights and moments in the order
    of memory, without a check. Those of a GPU refuse different formats.
    """
    for weight, values in optimizer.state.items():
        for name, value in values.items():
            is_moment = isinstance(value, torch.Tensor) and value.shape == weight.shape
            if is_moment and value.stride() != weight.stride():
                values[name] = torch.empty_like(weight, dtype=value.dtype).copy_(value)
