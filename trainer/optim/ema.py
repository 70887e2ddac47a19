"""Exponential moving average of a model's weights."""

from __future__ import annotations

import copy

import torch
from torch import nn

_WARMUP_POWER = 2 / 3


class ModelEma:
    """Exponential moving average of a model's weights and buffers (Polyak and Juditsky 1992).

    The decay warms up as 1 - step^(-2/3), so that the initial weights do not dominate short runs, as in timm's
    `ModelEmaV3`, https://github.com/huggingface/pytorch-image-models/blob/main/timm/utils/model_ema.py. An update is
    one pass over all tensors.

    Attributes:
        module: The model with the averaged weights, in evaluation mode.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Start from the weights of a model, whose tensors must not be replaced later.

        Args:
            model: The model that is trained.
            decay: Decay after the warm-up, in (0, 1).
        """
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self._decay = decay
        # Collected once: for hundreds of tensors this takes longer than starting the kernels.
        pairs = list(zip(_tensors(self.module), _tensors(model), strict=True))
        self._averaged = _unzip([pair for pair in pairs if pair[0].is_floating_point()])
        self._copied = _unzip([pair for pair in pairs if not pair[0].is_floating_point()])

    def decay(self, step: int) -> float:
        """Return the decay of an update, counted from 1."""
        return min(1 - max(1, step) ** -_WARMUP_POWER, self._decay)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Average in the model's weights after an optimizer step, counted from 1."""
        torch._foreach_lerp_(*self._averaged, weight=1 - self.decay(step))
        if self._copied[0]:
            torch._foreach_copy_(*self._copied)


def _unzip(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]
