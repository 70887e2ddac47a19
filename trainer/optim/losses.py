"""Class-weighted Kullback-Leibler divergence for soft targets, and the weights."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from trainer.config.schema import LossConfig


def weighted_kl(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """sum_b sum_c w_c t_bc (log t_bc - log p_bc), with 0 log 0 = 0; p is the softmax of the logits.

    logits: [B, C]. targets: [B, C], rows add up to 1. weights: [C]. Returns a scalar float32, the sum over the
    batch; divided by B and with all weights 1 it is `torch.nn.KLDivLoss(reduction="batchmean")`.
    """
    log_probabilities = F.log_softmax(logits.float(), dim=1)
    divergence = torch.xlogy(targets, targets) - targets * log_probabilities
    return (divergence * weights).sum()


def log_priors(counts: NDArray[np.int64]) -> torch.Tensor:
    """Logarithms float32 [C] of the classes' shares of the training samples, int64 [C].

    Added to the logits in training, tau times, they make logit adjustment (Menon et al. 2021,
    https://arxiv.org/abs/2007.07314, equation 10), once the balanced softmax (Ren et al. 2020,
    https://arxiv.org/abs/2007.10740, equation 3): the model then learns what it would of equally frequent classes.
    A class without samples counts as one with a single sample.
    """
    present = np.maximum(counts, 1).astype(np.float64)
    return torch.from_numpy(np.log(present / present.sum())).float()


def class_weights(counts: NDArray[np.int64], settings: LossConfig) -> torch.Tensor:
    """Weights float32 [C] from the training samples of each class, int64 [C].

    inverse: total / (classes * count). minmax: those scaled linearly to 1 .. 2. effective: (1 - beta) /
    (1 - beta^count), scaled to a mean of 1 (Cui et al. 2019, https://arxiv.org/abs/1901.05555).
    A class without samples takes no part and is weighted 1.
    """
    present = counts > 0
    counts = counts[present].astype(np.float64)
    if settings.class_weights == "none":
        found = np.ones_like(counts)
    elif settings.class_weights == "effective":
        found = (1 - settings.effective_beta) / (1 - settings.effective_beta**counts)
        found /= found.mean()
    else:
        found = counts.sum() / (len(counts) * counts)
        if settings.class_weights == "minmax":
            spread = found.max() - found.min()
            found = 1 + (found - found.min()) / spread if spread > 0 else np.ones_like(found)
    weights = np.ones(len(present))
    weights[present] = found
    return torch.from_numpy(weights).float()
