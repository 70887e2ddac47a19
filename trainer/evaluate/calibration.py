"""Temperature scaling of logits, and the calibration error of confidences."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

_BINS = 15
_MAX_TEMPERATURE = 20.0
_TOLERANCE = 1e-7  # of the logarithm of the temperature
_LOGITS_AT_ONCE = 2**20  # 8 MB in float64


def fit_temperature(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """Fit the temperature T that minimizes the cross-entropy of softmax(logits / T).

    Guo et al. 2017, https://arxiv.org/abs/1706.04599, section 4.2. The cross-entropy is a convex function of 1/T, so
    it has one minimum over log T.

    Args:
        logits: [N, C].
        labels: [N].

    Returns:
        A temperature of 0.05 .. 20; 1 if all labels are predicted, as the minimum is then at 0 for any model.
    """
    if (logits.argmax(axis=1) == labels).all():
        return 1.0
    size = max(1, _LOGITS_AT_ONCE // logits.shape[1])
    parts = list(zip(torch.from_numpy(logits).split(size), torch.from_numpy(labels).split(size), strict=True))

    def cross_entropy(log_temperature: float) -> float:
        temperature = np.exp(log_temperature)
        losses = (F.cross_entropy(part.double().div_(temperature), each, reduction="sum") for part, each in parts)
        return float(sum(losses)) / len(labels)

    limit = np.log(_MAX_TEMPERATURE)
    fit = minimize_scalar(cross_entropy, bounds=(-limit, limit), method="bounded", options={"xatol": _TOLERANCE})
    return float(np.exp(fit.x))


@dataclass(frozen=True)
class Reliability:
    """Statistics of 15 equal-width bins of confidence, each an array [15]; 0 in an empty bin."""

    samples: NDArray[np.int64]
    confidence: NDArray[np.float64]
    """Mean confidence."""
    accuracy: NDArray[np.float64]


def reliability(confidence: NDArray[np.float32], is_correct: NDArray[np.bool_]) -> Reliability:
    """Compute a reliability diagram with bins ((b - 1) / 15, b / 15]; Guo et al. 2017, section 2.

    Args:
        confidence: [N], probability of the predicted class, 0 .. 1.
        is_correct: [N], whether the predicted class is the true one.
    """
    bins = np.clip(np.ceil(confidence.astype(np.float64) * _BINS).astype(np.int64) - 1, 0, _BINS - 1)
    samples = np.bincount(bins, minlength=_BINS)
    sums = (np.bincount(bins, values, _BINS) for values in (confidence, is_correct))
    return Reliability(samples, *(total / np.maximum(samples, 1) for total in sums))


def calibration_error(confidence: NDArray[np.float32], is_correct: NDArray[np.bool_]) -> float:
    """Compute the expected calibration error: sum_b n_b / N * |accuracy_b - confidence_b| over 15 bins.

    Guo et al. 2017, equation 3.

    Args:
        confidence: [N], probability of the predicted class, 0 .. 1.
        is_correct: [N], whether the predicted class is the true one.
    """
    bins = reliability(confidence, is_correct)
    return float((bins.samples * np.abs(bins.accuracy - bins.confidence)).sum() / len(confidence))
