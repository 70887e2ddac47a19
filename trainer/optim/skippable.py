"""timm's optimizers with the interface of `torch.amp.GradScaler` that skips a step without reading a value.

The scaler sets `found_inf`, a scalar on the device that is 1 if a gradient is not finite. torch's fused optimizers then
change nothing.
"""

from __future__ import annotations

from typing import Any

import timm.optim
import torch


class Lion(timm.optim.Lion):
    """Lion whose step is undone on the device if `found_inf` is set."""

    _step_supports_amp_scaling = True

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Step, and restore weights and momentum if a gradient was not finite."""
        found_inf = getattr(self, "found_inf", None)
        if found_inf is None:
            return super().step(closure)
        weights = [weight for group in self.param_groups for weight in group["params"] if weight.grad is not None]
        for weight in weights:
            if not self.state[weight]:
                self.state[weight]["exp_avg"] = torch.zeros_like(weight)
        changed = [tensor for weight in weights for tensor in (weight, self.state[weight]["exp_avg"])]
        before = [tensor.clone() for tensor in changed]
        loss = super().step(closure)
        for tensor, old in zip(changed, before, strict=True):
            tensor.copy_(torch.where(found_inf > 0, old, tensor))
        return loss


class Lookahead(timm.optim.Lookahead):
    """Lookahead around an optimizer that skips its step if `found_inf` is set."""

    _step_supports_amp_scaling = True

    def step(self, closure: Any = None) -> Any:
        """Step the inner optimizer, and every few steps the slow weights."""
        self._base_optimizer.found_inf = getattr(self, "found_inf", None)
        return super().step(closure)


def skip_overflows(optimizer: Any) -> torch.optim.Optimizer:
    """Let the weights of an optimizer that calls its hooks stay as they are if `found_inf` is set.

    The step takes place with gradients of zero, so its moments decay and its counter advances.
    """
    held: list[tuple[torch.Tensor, list[torch.Tensor]]] = []  # `found_inf` and the weights before the step

    def weights() -> list[Any]:
        return [each for group in optimizer.param_groups for each in group["params"] if each.grad is not None]

    def clear_gradients(*_: object) -> None:
        if (found_inf := getattr(optimizer, "found_inf", None)) is not None:
            held.append((found_inf, [weight.detach().clone() for weight in weights()]))
            for gradient in (weight.grad for weight in weights()):
                gradient.masked_fill_(found_inf > 0, 0.0)
            optimizer.found_inf = None  # torch's optimizers refuse it unless they are fused

    def restore_weights(*_: object) -> None:
        if held:
            found_inf, before = held.pop()
            with torch.no_grad():
                for weight, old in zip(weights(), before, strict=True):
                    weight.copy_(torch.where(found_inf > 0, old, weight))
            optimizer.found_inf = found_inf  # which the scaler deletes

    optimizer.register_step_pre_hook(clear_gradients)
    optimizer.register_step_post_hook(restore_weights)
    optimizer._step_supports_amp_scaling = True
    return optimizer
