"""A finished run put to use: images as its set has them in, probabilities out."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.common.device import choose_device
from pipeline.ink.adapter import InputAdapter
from pipeline.transforms.build import build_transform, choose_backend
from pipeline.transforms.spec import TransformSpec
from shards import UserError
from shards.stores.base import Store
from trainer.checkpoint.trained_model import load_trained_model
from trainer.evaluate.logit_adjustment import ProbabilityHead
from trainer.evaluate.tta import mean_logits
from trainer.models.precision import autocast, to_memory_format

_MOST_AT_ONCE = 512


class Seen(NamedTuple):
    """probabilities: float32 [n, classes], each row adding up to 1. images: uint8 [n, R, R, C], what the model saw."""

    probabilities: NDArray[np.float32]
    images: NDArray[np.uint8]


class Predictor:
    """The best checkpoint of a run with the graph that it was trained through, by its decision and temperature.

    adapter: how pictures are brought to the images that `predict` takes. Not to be called from two threads at once.
    """

    def __init__(self, run: Path, device: str = "auto") -> None:
        """Raises `UserError` for a run that has no best checkpoint."""
        self.run = run
        trained = load_trained_model(run)
        self._config = trained.config
        self._device = choose_device(device)
        self.classes: tuple[str, ...] = trained.classes
        self.temperature: float = trained.temperature
        self._decided = ProbabilityHead(**trained.posthoc_kwargs()).to(self._device)
        self.resolution: int = self._config.data.final_resolution
        self.adapter = InputAdapter.from_state_dict(trained.adapter_state)
        self.batch_size = min(self._config.loader.batch_size, _MOST_AT_ONCE)
        # The adapter returns upright images, whichever way round those of the set lie.
        self._spec = TransformSpec(
            image_shape=self.adapter.image_shape,
            transposed=False,
            resolution=self.resolution,
            interpolation=self._config.data.interpolation,
            mean=trained.mean,
            std=trained.std,
            preprocessing=self._config.data.preprocessing(),
        )
        backend, _ = choose_backend(self._config.loader.backend, self._device, self._spec)
        self._graph = build_transform(self._spec, backend, self._device, self.batch_size)
        self._model = trained.build_model(self._device).eval()

    @torch.inference_mode()
    def predict(self, images: list[NDArray[np.uint8]]) -> Seen:
        """Up to `batch_size` images as `InputAdapter.adapt` gives them.

        Raises `pipeline.transforms.spec.UndecodableImage` for a picture file that the graph cannot decode.
        """
        batch = images if self._spec.encoded else np.stack(images)
        model_input = self._graph(batch)
        pixels = self._pixels(model_input)
        with autocast(self._config.trainer, self._device):
            logits = mean_logits(
                self._model,
                to_memory_format(model_input, self._config.trainer),
                self._config.trainer.test_time_augmentation,
            )
        return Seen(self._decided(logits).cpu().numpy(), pixels)

    def _pixels(self, model_input: torch.Tensor) -> NDArray[np.uint8]:
        """Model input [n, C, R, R] as pictures, uint8 [n, R, R, C]."""
        mean, std = (
            torch.tensor(values, device=model_input.device).view(-1, 1, 1)
            for values in (self._spec.mean, self._spec.std)
        )
        pixels = (model_input * std + mean).clamp(0, 1).mul(255).round().byte()
        return pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()

    def check_store(self, store: Store, place: str) -> None:
        """Raise `UserError` for a packed part whose images or classes are not those of the run."""
        if store.manifest.classes != self.classes:
            raise UserError(
                found=f"{place} with classes {' '.join(store.manifest.classes)}",
                expected=f"the classes of the run: {' '.join(self.classes)}",
                hint="name a packed set of the same data set and split",
            )
        if upright_shape(store) != self.adapter.image_shape:
            raise UserError(
                found=f"{place} with images of shape {upright_shape(store)}",
                expected=f"{self.adapter.image_shape}, as the run was trained on",
                hint="name a packed set of such images, or picture files, which may have any size",
            )


def upright_shape(store: Store) -> tuple[int | None, int | None, int]:
    height, width, channels = store.manifest.image_shape
    return (width, height, channels) if store.manifest.transposed else (height, width, channels)


def upright_images(store: Store, samples: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
    """Images of a part as `Predictor.predict` takes them."""
    images = list(store.read(samples))
    return [image.swapaxes(0, 1) for image in images] if store.manifest.transposed else images
