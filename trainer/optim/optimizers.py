"""Optimizers by name."""

from __future__ import annotations

from collections.abc import Collection
from fnmatch import fnmatch

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
        import timm.optim

        return timm.optim.Lion(groups, lr=settings.lr, foreach=True)
    if settings.name == "sgd":
        return torch.optim.SGD(groups, settings.lr, settings.momentum, fused=True)
    if settings.name == "sgd_lookahead":
        import timm.optim

        return timm.optim.Lookahead(torch.optim.SGD(groups, settings.lr, settings.momentum, nesterov=True, fused=True))
    optimizer = torch.optim.Adam if settings.name == "adam" else torch.optim.AdamW
    return optimizer(groups, settings.lr, fused=True)
