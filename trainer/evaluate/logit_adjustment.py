"""Which class a model's logits stand for: the weights of the classes undone, as far as it serves the figure asked for.

A model that learned with class weights w says p_c proportional to w_c times the probability of c, so `argmax z` errs
towards the classes of large weight, and `argmax(z - log w)` is the most probable class. Between and beyond both lies
the trade-off between accuracy and macro F1, `argmax(z - tau log w)`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from trainer.config.schema import LossConfig
from trainer.evaluate.calibration import fit_temperature
from trainer.evaluate.metrics import ConfusionMatrix
from trainer.optim.losses import class_weights, log_priors

_TAUS = np.linspace(-2, 2, 81)  # that `auto` tries
_NEIGHBOURS = 2  # on each side, that a tau is judged with: on few images a single one stands out by chance
_CURVE_STEP = 5  # of the taus, in what is written down


@dataclass(frozen=True)
class PosthocCalibration:
    """How logits become a class and a confidence, and what that is worth on the validation part.

    offsets: float32 [C], tau log w, which is taken from the logits before all else. temperature: by which the rest is
    divided. validation, as_learned: the confusion with these offsets and without. curve: accuracy and macro F1 by tau.
    """

    tau: float
    offsets: NDArray[np.float32]
    temperature: float
    validation: ConfusionMatrix
    as_learned: ConfusionMatrix
    curve: list[dict[str, float]]

    def summary(self) -> dict[str, Any]:
        return {
            "tau": self.tau,
            "validation": self.validation.summary(),
            "validation_as_learned": self.as_learned.summary(),
            "curve": self.curve,
        }


class ProbabilityHead(nn.Module):
    """Logits [N, C] to probabilities [N, C], by the offsets and the temperature of a decision."""

    def __init__(self, offsets: NDArray[np.float32], temperature: float) -> None:
        super().__init__()
        self.register_buffer("offsets", torch.from_numpy(offsets))
        self._temperature = temperature

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        return ((logits - self.offsets) / self._temperature).softmax(dim=1)


def log_weights(counts: NDArray[np.int64], settings: LossConfig) -> NDArray[np.float32]:
    """log w, float32 [C], of the weights that a loss gives the classes, from their training samples int64 [C].

    Those are the class weights, and 1 / prior^a by logit adjustment a. Where a loss treats all classes alike they are
    1 / prior: then tau=0 suits accuracy, and tau=-1 is the post-hoc logit adjustment of Menon et al. 2021,
    https://arxiv.org/abs/2007.07314, equation 9.
    """
    given = class_weights(counts, settings).log() - settings.logit_adjustment * log_priors(counts)
    found = given if bool((given != given[0]).any()) else -log_priors(counts)
    return found.numpy()


def fit_posthoc(
    logits: NDArray[np.float32],
    labels: NDArray[np.int64],
    log_weights: NDArray[np.float32],
    tau: float | Literal["auto"],
    select: Literal["accuracy", "macro_f1"],
) -> PosthocCalibration:
    """The decision for a model with logits [N, C] on validation images of labels [N].

    tau: how far the weights are undone, or `auto` for what suits the figure best; of equals the smallest in size.
    """

    def confusion(tau: float) -> ConfusionMatrix:
        return ConfusionMatrix.of(labels, (logits - np.float32(tau) * log_weights).argmax(axis=1), logits.shape[1])

    if tau == "auto":
        tried = [confusion(value) for value in _TAUS]
        chosen = best_tau([getattr(one, select) for one in tried])
    else:
        chosen = float(tau)
    offsets = np.float32(chosen) * log_weights
    return PosthocCalibration(
        tau=chosen,
        offsets=offsets,
        temperature=fit_temperature(logits - offsets, labels),
        validation=confusion(chosen),
        as_learned=confusion(0.0),
        curve=_curve(confusion),
    )


def best_tau(figures: list[float]) -> float:
    """The tau whose figure is the highest, each averaged with its neighbours; of equals the smallest in size."""
    padded = np.pad(figures, _NEIGHBOURS, mode="edge")
    width = 2 * _NEIGHBOURS + 1
    smooth = np.round(np.lib.stride_tricks.sliding_window_view(padded, width).mean(axis=1), 12)
    best = np.flatnonzero(smooth == smooth.max())
    return float(round(_TAUS[best[np.argmin(np.abs(_TAUS[best]))]], 6))


def _curve(confusion: Callable[[float], ConfusionMatrix]) -> list[dict[str, float]]:
    points = [(float(round(tau, 6)), confusion(tau)) for tau in _TAUS[::_CURVE_STEP]]
    return [{"tau": tau, "accuracy": one.accuracy, "macro_f1": one.macro_f1} for tau, one in points]
