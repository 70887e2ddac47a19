"""Class-weighted Kullback-Leibler divergence for soft targets, and class weights."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from trainer.config.schema import LossConfig


def weighted_kl(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Compute sum_b sum_c w_c t_bc (log t_bc - log p_bc), with 0 log 0 = 0 and p the softmax of the logits.

    Divided by B and with all weights 1, it equals `torch.nn.KLDivLoss(reduction="batchmean")`.

    Args:
        logits: [B, C].
        targets: [B, C]; each row sums to 1.
        weights: Class weights [C].

    Returns:
        Scalar float32, summed over the batch.
    """
    log_probabilities = F.log_softmax(logits.float(), dim=1)
    divergence = torch.xlogy(targets, targets) - targets * log_probabilities
    return (divergence * weights).sum()


def weighted_bce(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Compute sum_b sum_c [-w_c t_bc log s_bc - (1 - t_bc) log(1 - s_bc)], with s the sigmoid of the logits.

    The logits at its minimum are logit t + log w. A weight of both terms would not change the minimum.

    With all weights 1 it equals timm's `BinaryCrossEntropy(smoothing=0, sum_classes=True)` times B (Wightman et al.
    2021, https://arxiv.org/abs/2110.00476). Arguments and result are those of `weighted_kl`.
    """
    return F.binary_cross_entropy_with_logits(logits.float(), targets, pos_weight=weights, reduction="sum")


def weighted_focal(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, gamma: float) -> torch.Tensor:
    """Compute -sum_b sum_c w_c t_bc (1 - p_bc)^gamma log p_bc, with p the softmax of the logits.

    Lin et al. 2017, https://arxiv.org/abs/1708.02002, equation 4, for several classes and soft targets. Arguments and
    result are those of `weighted_kl`.
    """
    log_probabilities = F.log_softmax(logits.float(), dim=1)
    # 1 - p from its logarithm: p rounds to 1, where a power has no gradient.
    rest = -torch.expm1(log_probabilities.clamp(max=-torch.finfo(torch.float32).tiny))
    return -(weights * targets * rest**gamma * log_probabilities).sum()


def log_priors(counts: NDArray[np.int64]) -> torch.Tensor:
    """Compute the log frequencies of the classes for logit adjustment.

    Training on logits + tau * log prior is logit adjustment (Menon et al. 2021, https://arxiv.org/abs/2007.07314,
    equation 10); tau = 1 is the balanced softmax (Ren et al. 2020, https://arxiv.org/abs/2007.10740, equation 3).

    Args:
        counts: Training samples of each class, int64 [C]. A class without samples counts as one with a single sample.

    Returns:
        float32 [C].
    """
    present = np.maximum(counts, 1).astype(np.float64)
    return torch.from_numpy(np.log(present / present.sum())).float()


def class_weights(counts: NDArray[np.int64], settings: LossConfig) -> torch.Tensor:
    """Compute class weights by `loss.class_weights`.

    inverse: total / (classes * count). minmax: the same scaled linearly to 1 .. 2. effective: (1 - beta) /
    (1 - beta^count), scaled to a mean of 1 (Cui et al. 2019, https://arxiv.org/abs/1901.05555).

    Args:
        counts: Training samples of each class, int64 [C]. A class without samples gets the weight 1 and does not
            change the others.
        settings: The settings of the loss.

    Returns:
        float32 [C].
    """
    present = counts > 0
    counts = counts[present].astype(np.float64)
    inverse = counts.sum() / (len(counts) * counts)
    weights = np.ones(len(present))
    if settings.class_weights == "effective":
        effective = (1 - settings.effective_beta) / (1 - settings.effective_beta**counts)
        weights[present] = effective / effective.mean()
    elif settings.class_weights == "inverse":
        weights[present] = inverse
    elif settings.class_weights == "minmax" and np.ptp(inverse) > 0:
        weights[present] = 1 + (inverse - inverse.min()) / np.ptp(inverse)
    return torch.from_numpy(weights).float()
