"""Distillation: the best model of an earlier run as the teacher."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from pipeline.transforms.preprocess import Preprocessing, input_size
from shards.errors import UserError
from trainer.checkpoint.compat import list_classes
from trainer.checkpoint.io import BEST
from trainer.checkpoint.trained_model import TrainedModel
from trainer.config.schema import Config
from trainer.models.precision import autocast, to_memory_format
from trainer.optim.losses import weighted_kl

log = logging.getLogger(__name__)

_OTHER_DATA = "use a run on the same data set; model.init_checkpoint takes the weights of another"
_OTHER_PREPROCESSING = "set " + ", ".join(f"data.{field.name}" for field in fields(Preprocessing)) + " as in that run"


class DistillationTeacher:
    """The best model of a run, applied to the augmented and mixed images of a student.

    Teacher and student see the same images, as in Beyer et al. 2022, https://arxiv.org/abs/2106.05237.
    """

    def __init__(
        self,
        student: Config,
        classes: tuple[str, ...],
        statistics: Mapping[tuple[int, int], tuple[Sequence[float], Sequence[float]]],
        logit_bias: NDArray[np.float32],
        device: torch.device,
    ) -> None:
        """Load the model of `distillation.teacher`.

        Args:
            student: Settings of the student.
            classes: Class names of the student.
            statistics: Mean and std by which the student's input is normalized, by its height and width.
            logit_bias: [C], log of the weights that loss and sampling of the student give the classes.
            device: Device of both models.

        Raises:
            UserError: The teacher has other classes, channels or preprocessing.
        """
        path = student.distillation.teacher
        assert path is not None
        trained = TrainedModel.load(path if path.suffix == ".pt" else path / "checkpoints" / BEST)
        for attribute, value, expected, hint in (
            ("classes", trained.classes, classes, _OTHER_DATA),
            ("channels", trained.channels, len(next(iter(statistics.values()))[0]), _OTHER_DATA),
            ("preprocessing", trained.config.data.preprocessing(), student.data.preprocessing(), _OTHER_PREPROCESSING),
        ):
            if value != expected:
                texts: tuple[object, object] = (value, expected)
                if attribute == "classes":
                    texts = list_classes(trained.classes, classes), list_classes(classes, trained.classes)
                raise UserError(
                    found=f"distillation.teacher={path} with {attribute} {texts[0]}",
                    expected=f"the {attribute} of this run: {texts[1]}",
                    hint=hint,
                )
        trained = _remove_bias(trained, student, logit_bias)
        self._model = trained.build_model(device).eval().requires_grad_(False)
        self._input_size = input_size(trained.config.data.final_resolution)
        self._trainer = student.trainer
        self._settings = student.distillation
        self._device = device
        own = torch.tensor([trained.mean, trained.std], device=device)[..., None, None]
        self._scale_and_shift = {}  # from the student's normalization to the teacher's
        for size, values in statistics.items():
            mean, std = torch.tensor(values, device=device)[..., None, None]
            self._scale_and_shift[size] = std / own[1], (mean - own[0]) / own[1]
        self._offsets = torch.from_numpy(trained.offsets - logit_bias).to(device)

    @torch.no_grad()
    def probabilities(self, images: torch.Tensor) -> torch.Tensor:
        """Predict the student's input [B, channels, H, W], resized to the teacher's resolution.

        Returns:
            Probabilities float32 [B, C] at `distillation.temperature`, with the class weights of the student instead of
            the teacher's. A teacher without class weights is used with its post-hoc logit adjustment.
        """
        scale, shift = self._scale_and_shift[images.shape[2], images.shape[3]]
        images = images * scale + shift
        if images.shape[2:] != self._input_size:
            images = F.interpolate(images, size=self._input_size, mode="bilinear", antialias=True)
        with autocast(self._trainer, self._device):
            logits = self._model(to_memory_format(images, self._trainer))
        return ((logits.float() - self._offsets) / self._settings.temperature).softmax(dim=1)

    def distillation_loss(self, loss: torch.Tensor, logits: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """Compute (1 - weight) * loss + weight * temperature^2 * divergence from the teacher's probabilities.

        Hinton et al. 2015, https://arxiv.org/abs/1503.02531, section 2. The divergence has no class weights. They are
        in the teacher's probabilities, so that its minimum is that of the loss on the labels at any temperature.

        Args:
            loss: Loss on the labels, summed over the batch.
            logits: Logits of the student [B, C], without logit adjustment.
            images: Input of the student [B, channels, H, W].
        """
        temperature, weight = self._settings.temperature, self._settings.weight
        ones = torch.ones_like(self._offsets)
        divergence = weighted_kl(logits.float() / temperature, self.probabilities(images), ones)
        return (1 - weight) * loss + weight * temperature**2 * divergence


def _remove_bias(teacher: TrainedModel, student: Config, logit_bias: NDArray[np.float32]) -> TrainedModel:
    """Return the teacher with offsets that remove its logit bias, unchanged if the bias is equal for all classes.

    A `best.pt` of an earlier version lacks the bias. It is then 0 if the teacher's settings weight all classes equally,
    else offsets / tau, else that of a student with the same settings. Otherwise it stays, with a warning.
    """
    if teacher.members:
        members = (_remove_bias(member, student, logit_bias) for member in teacher.members)
        return replace(teacher, members=tuple(members))
    config, own = teacher.config, teacher.logit_bias
    if own is None:
        settings, of_student = ((each.loss, each.data.class_balance) for each in (config, student))
        if config.loss.class_weights == "none" and not (config.loss.logit_adjustment or config.data.class_balance):
            own = np.zeros_like(logit_bias)
        elif teacher.tau:
            own = teacher.offsets / np.float32(teacher.tau)
        elif settings == of_student:
            own = logit_bias
        else:
            log.warning("the class weights of the teacher stay in its predictions: its best.pt does not state them")
            own = np.zeros_like(logit_bias)
    return replace(teacher, offsets=own) if np.ptp(own) > 0 else teacher
