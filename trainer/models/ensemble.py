"""Several networks as one: the mean of their probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn


class Ensemble(nn.Module):
    """The logarithm of the mean probability of several networks with the same input and classes."""

    offsets: torch.Tensor

    def __init__(
        self, members: Sequence[nn.Module], offsets: Sequence[NDArray[np.float32]], temperatures: Sequence[float]
    ) -> None:
        """Combine networks.

        Args:
            members: From images to logits [N, C].
            offsets: float32 [C] of each network, subtracted from its logits.
            temperatures: Temperature of each network, which divides its logits after that.
        """
        super().__init__()
        self.members = nn.ModuleList(members)
        self.register_buffer("offsets", torch.from_numpy(np.stack(offsets)))
        self._temperatures = tuple(temperatures)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return float32 [N, C]; its softmax is the mean probability."""
        return self.combine([member(images) for member in self.members])

    def combine(self, logits: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the result of `forward` for the logits [N, C] of each network."""
        parts = zip(logits, self.offsets, self._temperatures, strict=True)
        log_probabilities = [
            ((each.float() - offsets) / temperature).log_softmax(dim=1) for each, offsets, temperature in parts
        ]
        return torch.stack(log_probabilities).logsumexp(dim=0) - math.log(len(log_probabilities))
