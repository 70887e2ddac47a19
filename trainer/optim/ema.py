"""A moving average of a model's weights, kept in one pass over all of them."""

from __future__ import annotations

import copy

import torch
from torch import nn

_WARM_UP_POWER = 2 / 3


class ModelEma:
    """An exponential moving average of a model's weights and buffers (Polyak and Juditsky 1992).

    The decay rises to its value as 1 - step^(-2/3), so that short runs are not held back by their first weights: the
    warm-up of timm's `ModelEmaV3`, which has it from Katherine Crowson,
    https://github.com/huggingface/pytorch-image-models/blob/main/timm/utils/model_ema.py.
    module: the model with the averaged weights, in evaluation mode. The model's tensors have to stay where they are.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self._decay = decay
        # Looked up once: for a model of hundreds of tensors that takes longer than starting the kernels.
        pairs = list(zip(_tensors(self.module), _tensors(model), strict=True))
        self._averaged = _columns([pair for pair in pairs if pair[0].is_floating_point()])
        self._counted = _columns([pair for pair in pairs if not pair[0].is_floating_point()])

    def decay(self, step: int) -> float:
        """The decay at an update, counted from 1."""
        return min(1 - max(1, step) ** -_WARM_UP_POWER, self._decay)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the model's weights after an update, counted from 1."""
        torch._foreach_lerp_(*self._averaged, weight=1 - self.decay(step))
        if self._counted[0]:
            torch._foreach_copy_(*self._counted)


def _columns(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]
