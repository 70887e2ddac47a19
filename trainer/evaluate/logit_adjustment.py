"""Post-hoc logit adjustment: undo class weights at prediction time by a factor tau, tuned for accuracy or macro F1.

A model trained with class weights w predicts p_c proportional to w_c times the probability of class c. `argmax z` is
then biased towards classes of large weight, and `argmax(z - log w)` is the most probable class. A factor tau in
`argmax(z - tau log w)` trades accuracy against macro F1.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from pipeline.loader import Loader
from trainer.config.schema import LossConfig
from trainer.evaluate.calibration import fit_temperature
from trainer.evaluate.metrics import MAX_MATRIX_CLASSES, ClassificationMetrics, confusion_matrix
from trainer.optim.losses import class_weights, log_priors

log = logging.getLogger(__name__)

_MAX_LOGITS = 2**26  # of the fit, 256 MB; more than 50,000 samples of 1,000 classes have
_ENOUGH_LOGITS, _ENOUGH_SAMPLES = 2**23, 50_000  # more samples need more memory and do not improve the fit
_TAUS = np.linspace(-2, 2, 81)  # candidates of `auto`
_SMOOTHING = 5  # candidates over which a metric is averaged: on few images a single one can be best by chance
_CURVE_STEP = 5  # every fifth candidate is a point of the curve


@dataclass(frozen=True)
class PosthocCalibration:
    """Offsets and temperature that turn logits into probabilities, and their metrics on the validation split."""

    tau: float
    offsets: NDArray[np.float32]
    """[C], tau log w, subtracted from the logits."""
    temperature: float
    """Divides the logits after the subtraction."""
    validation: ClassificationMetrics
    as_learned: ClassificationMetrics
    """The metrics without offsets."""
    curve: list[dict[str, float]]
    """Accuracy and macro F1 by tau."""
    confusion: NDArray[np.int64] | None = None
    """[C, C], the confusion matrix of the validation split; None above `MAX_MATRIX_CLASSES`."""

    def summary(self) -> dict[str, Any]:
        """Return the field `decision` of `summary.json`."""
        return {
            "tau": self.tau,
            "validation": self.validation.summary(),
            "validation_as_learned": self.as_learned.summary(),
            "curve": self.curve,
        }


class ProbabilityHead(nn.Module):
    """Convert logits [N, C] to probabilities [N, C], by the offsets and temperature of a post-hoc calibration."""

    offsets: torch.Tensor

    def __init__(self, offsets: NDArray[np.float32], temperature: float) -> None:
        super().__init__()
        self.register_buffer("offsets", torch.from_numpy(offsets))
        self._temperature = temperature

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        return ((logits - self.offsets) / self._temperature).softmax(dim=1)


def log_class_weights(
    counts: NDArray[np.int64], settings: LossConfig, drawn: NDArray[np.int64] | None = None
) -> NDArray[np.float32]:
    """Compute the log w of `posthoc.tau`.

    This is the logit bias of training (`training_logit_bias`). If it is equal for all classes, w is 1 / prior: tau=0 is
    then best for accuracy, and tau=-1 is the post-hoc logit adjustment of Menon et al. 2021, https://arxiv.org/abs/2007.07314,
    equation 9.

    Returns:
        float32 [C].
    """
    logit_bias = training_logit_bias(counts, settings, drawn)
    return logit_bias if np.ptp(logit_bias) > 0 else -log_priors(counts).numpy()


def training_logit_bias(
    counts: NDArray[np.int64], settings: LossConfig, drawn: NDArray[np.int64] | None = None
) -> NDArray[np.float32]:
    """Compute the logit bias log w: the logits at the optimum of the loss are log p + log w.

    w = class weight * prior^-a * drawn / counts, where a is `loss.logit_adjustment`. Class weight and prior are
    computed from `drawn`.

    Args:
        counts: [C], training samples of each class.
        settings: The loss.
        drawn: [C], samples of each class in an epoch; None for `counts`.

    Returns:
        float32 [C].
    """
    drawn = counts if drawn is None else drawn
    weights = class_weights(drawn, settings).log() - settings.logit_adjustment * log_priors(drawn)
    weights += torch.from_numpy(np.log(np.maximum(drawn, 1) / np.maximum(counts, 1))).float()
    return weights.numpy()


def limit_samples(loader: Loader, classes: int) -> Loader:
    """Return a loader of the samples that tau and temperature are fitted on.

    They are all samples, or evenly spaced ones if there are more than the fit needs or than 256 MB of logits hold.
    """
    samples, enough = loader.sampler.samples, max(_ENOUGH_SAMPLES, _ENOUGH_LOGITS // classes)
    limit = max(1, min(_MAX_LOGITS // classes, enough))
    if len(samples) <= limit:
        return loader
    log.warning(
        "tau and temperature are fitted on %d of %d validation images, evenly spaced (%d classes)",
        limit,
        len(samples),
        classes,
    )
    bounded = copy.copy(loader)
    bounded.sampler = replace(loader.sampler, samples=samples[np.linspace(0, len(samples) - 1, limit).astype(np.int64)])
    return bounded


def fit_posthoc(
    logits: NDArray[np.float32],
    labels: NDArray[np.int64],
    log_class_weights: NDArray[np.float32],
    tau: float | Literal["auto"],
    monitor: Literal["accuracy", "macro_f1", "loss"],
) -> PosthocCalibration:
    """Fit tau and temperature on a validation split.

    Args:
        logits: [N, C].
        labels: [N].
        log_class_weights: [C], see `log_class_weights`.
        tau: The value of tau, or `auto` for the one with the best metric.
        monitor: The metric for `auto`, which a loss cannot be.
    """

    def metrics(tau: float) -> ClassificationMetrics:
        predicted = (logits - np.float32(tau) * log_class_weights).argmax(axis=1)
        return ClassificationMetrics.of(labels, predicted, logits.shape[1])

    if tau == "auto":
        tau = best_tau([getattr(metrics(value), monitor) for value in _TAUS])
    offsets = np.float32(tau) * log_class_weights
    points = [(float(round(value, 6)), metrics(value)) for value in _TAUS[::_CURVE_STEP]]
    return PosthocCalibration(
        tau=float(tau),
        offsets=offsets,
        temperature=fit_temperature(logits - offsets, labels),
        validation=metrics(tau),
        as_learned=metrics(0.0),
        curve=[{"tau": value, "accuracy": each.accuracy, "macro_f1": each.macro_f1} for value, each in points],
        confusion=confusion_matrix(labels, (logits - offsets).argmax(axis=1), logits.shape[1])
        if logits.shape[1] <= MAX_MATRIX_CLASSES
        else None,
    )


def best_tau(metrics: list[float]) -> float:
    """Return the candidate with the highest metric, smoothed over neighbours; on ties the smallest in magnitude."""
    padded = np.pad(metrics, _SMOOTHING // 2, mode="edge")
    smooth = np.round(np.lib.stride_tricks.sliding_window_view(padded, _SMOOTHING).mean(axis=1), 12)
    best = np.flatnonzero(smooth == smooth.max())
    return float(round(_TAUS[best[np.argmin(np.abs(_TAUS[best]))]], 6))
