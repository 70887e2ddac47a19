"""A run that is over teaches another: its probabilities for the very images that the student learns from."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from shards.errors import UserError
from trainer.checkpoint.io import BEST
from trainer.checkpoint.trained_model import TrainedModel
from trainer.config.schema import Config
from trainer.models.precision import autocast, to_memory_format
from trainer.optim.losses import weighted_kl


class DistillationTeacher:
    """The best model of a run, looking at a student's images: augmented, mixed, at the student's resolution or its own.

    A teacher that sees what the student sees is the consistent one of Beyer et al. 2022,
    https://arxiv.org/abs/2106.05237.
    """

    def __init__(
        self,
        trained: TrainedModel,
        student: Config,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        device: torch.device,
    ) -> None:
        """trained: the teacher. student: its settings; mean, std: of its model input."""
        self._model = trained.build_model(device).eval().requires_grad_(False)
        self._resolution = trained.config.data.final_resolution
        self._trainer = student.trainer
        self._settings = student.distillation
        self._device = device
        theirs, spread, own, own_spread = (
            torch.tensor(values, dtype=torch.float32, device=device).reshape(1, -1, 1, 1)
            for values in (mean, std, trained.mean, trained.std)
        )
        # From the student's normalisation to the teacher's.
        self._scale, self._shift = spread / own_spread, (theirs - own) / own_spread
        self._offsets = torch.from_numpy(trained.posthoc_kwargs()["offsets"]).to(device)

    @torch.no_grad()
    def probabilities(self, images: torch.Tensor) -> torch.Tensor:
        """float32 [B, C], at `distillation.temperature`, of the student's input [B, channels, R, R].

        They are those of the logits that the teacher decides by (see `trainer.evaluate.logit_adjustment`).
        """
        images = images * self._scale + self._shift
        if images.shape[3] != self._resolution:
            images = F.interpolate(images, size=[self._resolution] * 2, mode="bilinear", antialias=True)
        with autocast(self._trainer, self._device):
            logits = self._model(to_memory_format(images, self._trainer))
        return ((logits.float() - self._offsets) / self._settings.temperature).softmax(dim=1)

    def distillation_loss(
        self, loss: torch.Tensor, logits: torch.Tensor, images: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """A share of the loss on the targets, and for the rest the divergence from the teacher, times temperature^2.

        Hinton et al. 2015, https://arxiv.org/abs/1503.02531, section 2. loss: the sum over the batch. logits, weights:
        as `weighted_kl` takes them.
        """
        temperature, share = self._settings.temperature, self._settings.weight
        distance = weighted_kl(logits.float() / temperature, self.probabilities(images), weights)
        return (1 - share) * loss + share * temperature**2 * distance


def load_teacher(
    student: Config,
    classes: tuple[str, ...],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    device: torch.device,
) -> DistillationTeacher | None:
    """The teacher that the settings name, None if they name none. Raises `UserError` if it teaches something else.

    student, mean, std: as in `Teacher`. classes: what is learned.
    """
    place = student.distillation.teacher
    if place is None:
        return None
    path = place if place.suffix == ".pt" else place / "checkpoints" / BEST
    trained = TrainedModel.load(path)
    for what, has, needed in (
        ("classes", trained.classes, classes),
        ("channels", trained.channels, len(mean)),
    ):
        if has != needed:
            raise UserError(
                found=f"distillation.teacher={place} with {what} {has if what == 'channels' else ' '.join(has)}",
                expected=f"those that are learned here: {needed if what == 'channels' else ' '.join(needed)}",
                hint="name a run on the same data set and split; for the weights of another, model.init_checkpoint",
            )
    if trained.config.data.preprocessing() != student.data.preprocessing():
        raise UserError(
            found=f"distillation.teacher={place} that learned from {trained.config.data.preprocessing()}",
            expected=f"images prepared as here: {student.data.preprocessing()}",
            hint="set data.invert, opening_radius, crop_to_foreground and equalize as that run had them",
        )
    return DistillationTeacher(trained, student, mean, std, device)
