"""Lion in five passes an update, however many tensors a model has."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


class Lion(torch.optim.Optimizer):
    """Sign of a momentum: Chen et al. 2023, https://arxiv.org/abs/2302.06675, algorithm 2.

    update = sign(beta1 m + (1 - beta1) g); w <- (1 - lr decay) w - lr update; m <- beta2 m + (1 - beta2) g.
    The multi-tensor functions of torch compute each line for all parameters of a group at once; weights and state are
    those of `timm.optim.Lion` to the last bit.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if not weights:
                continue
            gradients = [weight.grad for weight in weights]
            for weight in weights:
                if not self.state[weight]:
                    self.state[weight]["exp_avg"] = torch.zeros_like(weight)
            momenta = [self.state[weight]["exp_avg"] for weight in weights]
            beta1, beta2 = group["betas"]
            update = torch._foreach_lerp(momenta, gradients, weight=1 - beta1)
            torch._foreach_sign_(update)
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(weights, update, alpha=-group["lr"])
            torch._foreach_lerp_(momenta, gradients, weight=1 - beta2)
