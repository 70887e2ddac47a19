"""Optimizers by name."""

from __future__ import annotations

from collections.abc import Collection
from fnmatch import fnmatch
from typing import Any

import torch

from trainer.config.schema import OptimConfig


def make_optimizer(model: torch.nn.Module, settings: OptimConfig) -> torch.optim.Optimizer:
    """Build the optimizer of a model's parameters, without weight decay of biases and norms."""
    # timm's models name further parameters without weight decay.
    no_decay: Collection[str] = getattr(model, "no_weight_decay", tuple)()
    decayed: list[torch.Tensor] = []
    others: list[torch.Tensor] = []
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            exempt = weight.ndim <= 1 or name.endswith(".bias") or any(fnmatch(name, pattern) for pattern in no_decay)
            (others if exempt else decayed).append(weight)
    groups = [{"params": others, "weight_decay": 0.0}, {"params": decayed, "weight_decay": settings.weight_decay}]
    groups = [group for group in groups if group["params"]]
    if settings.name == "lion":
        from trainer.optim.skippable import Lion  # the import of timm takes a second

        return Lion(groups, lr=settings.lr, foreach=True)
    if settings.name == "sgd":
        return _sgd(groups, settings, nesterov=False)
    if settings.name == "sgd_lookahead":
        from trainer.optim.skippable import Lookahead

        return Lookahead(_sgd(groups, settings, nesterov=True))
    optimizer = torch.optim.Adam if settings.name == "adam" else torch.optim.AdamW
    return optimizer(groups, settings.lr, fused=True)


def _sgd(groups: list[dict[str, Any]], settings: OptimConfig, nesterov: bool) -> torch.optim.SGD:
    optimizer = torch.optim.SGD(groups, settings.lr, settings.momentum, nesterov=nesterov, fused=True)

    def create_momentum(optimizer: torch.optim.Optimizer, *_: object) -> None:
        """Create the momentum before a first step that may be skipped, which would leave torch's uninitialized."""
        if getattr(optimizer, "found_inf", None) is not None and not optimizer.state:
            for weight in (weight for group in optimizer.param_groups for weight in group["params"]):
                optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight)

    optimizer.register_step_pre_hook(create_momentum)
    return optimizer
