"""Schedule-free AdamW, and the averaged weights that it evaluates."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from trainer.optim.ema import ModelEma


class ScheduleFreeAdamW(torch.optim.Optimizer):
    """AdamW that averages its iterates instead of lowering the learning rate.

    Defazio et al. 2024, https://arxiv.org/abs/2405.15682, algorithm 1. The gradient is taken at y = (1 - beta1) z +
    beta1 x, which are the weights of the model. Adam steps change z, and x is the average of z weighted by the squared
    learning rate; x is what is evaluated (`ScheduleFreeWeights`). A warm-up and a constant rate are all that it needs.

    Args:
        params: Parameters or groups of them.
        lr: Learning rate.
        betas: Interpolation between z and x, and decay of the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decay of z by the learning rate times y.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.0025,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        beta1, beta2 = betas
        if not (0 < beta1 <= 1 and 0 <= beta2 < 1):
            raise ValueError(f"betas {beta1}, {beta2}")
        options = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, options | {"step": 0, "weight_sum": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take a step; parameters without a gradient stay as they are."""
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if not weights:
                continue
            for weight in weights:
                if not self.state[weight]:
                    self.state[weight] = {
                        "z": weight.clone(),
                        "x": weight.clone(),
                        "exp_avg_sq": torch.zeros_like(weight),
                    }
            z, x, second = ([self.state[weight][name] for weight in weights] for name in ("z", "x", "exp_avg_sq"))
            gradients, lr, beta2 = [weight.grad for weight in weights], group["lr"], group["beta2"]
            group["step"] += 1
            group["weight_sum"] += lr**2
            average = lr**2 / group["weight_sum"] if group["weight_sum"] else 0.0
            torch._foreach_mul_(second, beta2)
            torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
            root = torch._foreach_div(second, 1 - beta2 ** group["step"])
            torch._foreach_sqrt_(root)
            torch._foreach_add_(root, group["eps"])
            if group["weight_decay"]:
                torch._foreach_add_(z, weights, alpha=-lr * group["weight_decay"])
            torch._foreach_addcdiv_(z, gradients, root, -lr)
            torch._foreach_lerp_(x, z, average)
            torch._foreach_copy_(weights, torch._foreach_lerp(z, x, group["beta1"]))


class ScheduleFreeWeights(ModelEma):
    """The averaged weights x of `ScheduleFreeAdamW`, in place of a moving average.

    Attributes:
        module: The model with the weights x of the last `refresh`.
    """

    def __init__(self, model: nn.Module, optimizer: ScheduleFreeAdamW) -> None:
        """Start from the weights of a model."""
        super().__init__(model, decay=0.5)
        self._model, self._optimizer = model, optimizer

    def update(self, step: int) -> None:
        """Do nothing: the optimizer averages."""

    @torch.no_grad()
    def refresh(self, images: Iterable[torch.Tensor], autocast: AbstractContextManager[Any]) -> None:
        """Copy x, the averaged weights, and compute its running statistics of batch norm as torch's `update_bn` does.

        Batch norm in evaluation mode, as in frozen layers, keeps its statistics, which `update_bn` would replace.

        Args:
            images: Batches of model input, which are used if the model has batch norm.
            autocast: Context of the forward passes. `images` is iterated outside of it, so that transforms are float32.
        """
        for averaged, weight in zip(self.module.parameters(), self._model.parameters(), strict=True):
            averaged.copy_(self._optimizer.state.get(weight, {}).get("x", weight))
        for averaged_buffer, buffer in zip(self.module.buffers(), self._model.buffers(), strict=True):
            averaged_buffer.copy_(buffer)
        norms: list[_BatchNorm] = []
        for averaged_module, module in zip(self.module.modules(), self._model.modules(), strict=True):
            averaged_module.training = module.training
            if isinstance(averaged_module, _BatchNorm) and module.training:
                norms.append(averaged_module)
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean over all batches
        for batch in images if norms else ():
            with autocast:
                self.module(batch)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        self.module.eval()


def make_average(model: nn.Module, optimizer: torch.optim.Optimizer, decay: float | None) -> ModelEma | None:
    """Return the average of the weights that is evaluated; None for the weights themselves."""
    if isinstance(optimizer, ScheduleFreeAdamW):
        return ScheduleFreeWeights(model, optimizer)
    return ModelEma(model, decay) if decay else None
