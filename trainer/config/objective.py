"""Settings of the objective: loss, post-hoc calibration, distillation, MixUp and CutMix."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from pipeline.transforms.augment_settings import Fraction
from trainer.config.base import BaseConfig


class LossConfig(BaseConfig):
    """The loss."""

    name: Literal["kl_divergence", "bce", "focal"] = "kl_divergence"
    """kl_divergence is cross-entropy minus the entropy of the targets; bce is binary cross-entropy of each class
    against the others, summed over the classes; focal reduces the weight of samples that are already right."""
    focal_gamma: Annotated[float, Field(ge=0, le=100)] = 2.0
    """focal: exponent of 1 - p, where p is the probability of a class; 0 is cross-entropy."""

    class_weights: Literal["none", "inverse", "minmax", "effective"] = "none"
    """Class weights: inverse frequency, inverse frequency scaled to 1 .. 2 (minmax), or effective number of samples."""
    effective_beta: Annotated[float, Field(gt=0, lt=1)] = 0.999
    """Beta of the effective number of samples, (1 - beta^n) / (1 - beta)."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Label smoothing: fraction of the target spread evenly over all classes."""
    logit_adjustment: Annotated[float, Field(ge=0, le=100)] = 0.0
    """Logit adjustment: this factor times log(class frequency) is added to the logits; 1 is the balanced softmax."""


class PosthocConfig(BaseConfig):
    """Post-hoc logit adjustment."""

    tau: Annotated[float, Field(ge=-4, le=4)] | Literal["auto"] = 0.0
    """Factor that undoes the class weights w of the loss in predictions, argmax(z - tau * log w): 0 keeps them, 1
    removes them. auto tunes it on the validation split for trainer.monitor. Without class weights, w is the inverse
    class frequency, and negative values favor rare classes."""


class DistillationConfig(BaseConfig):
    """Distillation from an earlier run."""

    teacher: Path | None = None
    """Run directory or best.pt of the teacher, which sees the student's augmented and mixed images; null for none."""
    weight: Fraction = 0.5
    """Weight of the distillation loss (KL divergence from the teacher); the loss on the labels gets 1 - weight."""
    temperature: Annotated[float, Field(ge=0.01, le=1000)] = 2.0
    """Temperature of the student's and the teacher's logits in the divergence."""


class MixupConfig(BaseConfig):
    """MixUp and CutMix."""

    prob: Fraction = 0.0
    """Probability that a batch is mixed."""
    mixup_alpha: Annotated[float, Field(ge=0, le=1000)] = 0.2
    """Alpha of MixUp's Beta distribution; 0 for no MixUp."""
    cutmix_alpha: Annotated[float, Field(ge=0, le=1000)] = 1.0
    """Alpha of CutMix's Beta distribution; 0 for no CutMix."""
    switch_prob: Fraction = 0.5
    """Probability of CutMix instead of MixUp for a mixed batch, if both are on."""
    off_last_epochs: Annotated[int, Field(ge=0, le=10**6)] = 0
    """Number of final epochs without mixing."""

    def at(self, epoch: int, epochs: int) -> MixupConfig:
        """Return the settings of an epoch, from 0, out of `epochs`."""
        is_off = self.off_last_epochs > 0 and epoch >= epochs - self.off_last_epochs
        return self.model_copy(update={"prob": 0.0}) if is_off else self
