"""Settings of the objective: loss, post-hoc calibration, distillation, MixUp and CutMix."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from trainer.config.base import BaseConfig, Fraction


class LossConfig(BaseConfig):
    class_weights: Literal["none", "inverse", "minmax", "effective"] = "none"
    """Weights by class: inverse frequency, that scaled to 1 .. 2, or by effective number of samples."""
    effective_beta: Annotated[float, Field(gt=0, lt=1)] = 0.999
    """Beta of the effective number of samples, (1 - beta^n) / (1 - beta)."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the target spread evenly over all classes."""
    logit_adjustment: Annotated[float, Field(ge=0)] = 0.0
    """Train on logits raised by this many times the logarithm of the class frequencies, so that rare classes count as
    much as others; 1 is the balanced softmax."""


class PosthocConfig(BaseConfig):
    tau: Annotated[float, Field(ge=-4, le=4)] | Literal["auto"] = 0.0
    """How far the class weights w of the loss are undone to predict, argmax(z - tau log w): 0 not at all, 1 wholly,
    which suits accuracy; below that macro F1. auto is what suits trainer.monitor on the validation part. Where the loss
    has no weights they are inverse frequencies: 0 suits accuracy, down to -1 macro F1."""


class DistillationConfig(BaseConfig):
    teacher: Path | None = None
    """A run to learn from beside the labels: its directory, or a best.pt. It sees the same images, mixed as they are;
    null for none."""
    weight: Fraction = 0.5
    """Share of the loss that is the divergence from the teacher's probabilities."""
    temperature: Annotated[float, Field(gt=0)] = 2.0
    """By which the logits of both are divided for that divergence."""


class MixupConfig(BaseConfig):
    prob: Fraction = 0.0
    """Share of batches that are mixed."""
    mixup_alpha: Annotated[float, Field(ge=0)] = 0.2
    """MixUp: parameter of the Beta distribution of the weight; 0 for none."""
    cutmix_alpha: Annotated[float, Field(ge=0)] = 1.0
    """CutMix: parameter of the Beta distribution of the area; 0 for none."""
    switch_prob: Fraction = 0.5
    """Share of mixed batches that take CutMix, where both are on."""
    off_last_epochs: Annotated[int, Field(ge=0)] = 0
    """Epochs at the end of the training whose batches are not mixed."""

    def at(self, epoch: int, epochs: int) -> MixupConfig:
        """What holds in an epoch (from 0) of so many."""
        return self.model_copy(update={"prob": 0.0}) if epoch >= epochs - self.off_last_epochs else self
