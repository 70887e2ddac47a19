"""Probabilities that mean what they say: a temperature for the logits, and how far confidence is from accuracy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_BINS = 15
_MOST = 20.0  # temperatures lie between 1 / _MOST and _MOST
_STEPS = 60
_CLOSE = 1e-10  # of the derivative, in nats


def fit_temperature(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """The temperature T that minimises the cross-entropy of softmax(logits / T), 0.05 .. 20.

    logits: [N, C]; labels: [N]. Guo et al. 2017, https://arxiv.org/abs/1706.04599, section 4.2. The cross-entropy is a
    convex function of 1/T, so Newton's method within a bracket finds its minimum. Labels that are all predicted rightly
    would call for a temperature of 0, whatever the model deserves; then it is 1.
    """
    if (logits.argmax(axis=1) == labels).all():
        return 1.0
    centred = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    true = np.take_along_axis(centred, labels[:, None], axis=1)[:, 0]
    low, high, inverse = 1 / _MOST, _MOST, 1.0
    for _ in range(_STEPS):
        weights = np.exp(inverse * centred)
        weights /= weights.sum(axis=1, keepdims=True)
        mean = (weights * centred).sum(axis=1)
        slope = float((mean - true).mean())
        if abs(slope) < _CLOSE:
            break
        low, high = (low, inverse) if slope > 0 else (inverse, high)
        curvature = float(((weights * centred**2).sum(axis=1) - mean**2).mean())
        newton = inverse - slope / curvature if curvature > 0 else low
        inverse = newton if low < newton < high else (low * high) ** 0.5
    return float(1 / inverse)


@dataclass(frozen=True)
class Reliability:
    """Over bins of equal width of the confidence: samples (int64), mean confidence and accuracy (float64, 0 in an empty
    bin), each [15]."""

    samples: NDArray[np.int64]
    confidence: NDArray[np.float64]
    accuracy: NDArray[np.float64]


def reliability(confidence: NDArray[np.float32], correct: NDArray[np.bool_]) -> Reliability:
    """What a reliability diagram shows. confidence: [N], 0 .. 1, of the predicted class; correct: [N].

    Guo et al. 2017, section 2, with bins ((b - 1) / 15, b / 15].
    """
    bins = np.clip(np.ceil(confidence.astype(np.float64) * _BINS).astype(np.int64) - 1, 0, _BINS - 1)
    samples = np.bincount(bins, minlength=_BINS)
    sure, right = np.bincount(bins, confidence, _BINS), np.bincount(bins, correct, _BINS)
    return Reliability(samples, sure / np.maximum(samples, 1), right / np.maximum(samples, 1))


def calibration_error(confidence: NDArray[np.float32], correct: NDArray[np.bool_]) -> float:
    """Expected calibration error: the mean distance between confidence and accuracy over 15 bins of equal width.

    confidence, correct: as in `reliability`. Guo et al. 2017, equation 3: sum_b n_b / N * |accuracy_b - confidence_b|.
    """
    bins = reliability(confidence, correct)
    return float((bins.samples * np.abs(bins.accuracy - bins.confidence)).sum() / len(confidence))
