"""Inference with the best checkpoint of a run: raw images to probabilities."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from pipeline.common.device import choose_device
from pipeline.ink.adapter import InputAdapter
from pipeline.preview import upright
from pipeline.transforms.build import build_transform, choose_backend
from pipeline.transforms.preprocess import Resolution
from pipeline.transforms.spec import TransformSpec
from shards import UserError
from shards.errors import errors_as_corrupt
from shards.stores.base import Store
from trainer.checkpoint.io import HINT
from trainer.checkpoint.run_dir import RunDirectory
from trainer.checkpoint.trained_model import load_trained_model
from trainer.evaluate.evaluator import model_logits, to_pixels
from trainer.evaluate.logit_adjustment import ProbabilityHead
from trainer.models.ensemble import Ensemble
from trainer.models.weights import classifier_name

_MAX_BATCH = 512


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments RUN_DIR and --device."""
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="run directory")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="device of the model")


class Predictions(NamedTuple):
    """Predictions of a batch.

    Attributes:
        probabilities: float32 [n, C], rows add up to 1.
        images: Model input as uint8 [n, H, W, channels].
        embeddings: Input of the classifier, float32 [n, F]; for an ensemble, those of its members are concatenated.
    """

    probabilities: NDArray[np.float32]
    images: NDArray[np.uint8]
    embeddings: NDArray[np.float32]


class Predictor:
    """The model of the best epoch with its transform, logit adjustment and temperature. It is not thread-safe.

    Attributes:
        classes: Class names.
        resolution: Side of a square model input in pixels, or `HEIGHTxWIDTH`.
        adapter: Converts an image file to the format that `predict` accepts.
        batch_size: Maximum batch.
        embedding_width: Length F of an embedding; 0 without `with_embeddings`.
    """

    def __init__(self, run: Path, device: str = "auto", with_embeddings: bool = False) -> None:
        """Load the best checkpoint of a run.

        Args:
            run: Run directory.
            device: `auto`, `cpu` or `cuda`.
            with_embeddings: Whether `predict` returns embeddings.

        Raises:
            UserError: The run has no best checkpoint.
        """
        self.run = run
        self._trained = trained = load_trained_model(run)
        self._config = trained.config
        self._device = choose_device(device)
        self.classes: tuple[str, ...] = trained.classes
        self.temperature: float = trained.temperature
        self._head = ProbabilityHead(**trained.posthoc_kwargs()).to(self._device)
        self.resolution: Resolution = self._config.data.final_resolution
        with errors_as_corrupt(RunDirectory(run).best, HINT):
            self.adapter = InputAdapter.from_state_dict(trained.adapter_state)
            if sorted(map(str, self.adapter.image_shape)) != sorted(map(str, trained.image_shape)):
                raise ValueError("an adapter for images of another shape")
        self.batch_size = min(self._config.loader.batch_size, _MAX_BATCH)
        self._spec = TransformSpec(
            image_shape=self.adapter.image_shape,
            transposed=False,  # the adapter returns upright images
            resolution=self.resolution,
            interpolation=self._config.data.interpolation,
            mean=trained.mean,
            std=trained.std,
            preprocessing=self._config.data.preprocessing(),
        )
        backend, _ = choose_backend(self._config.loader.backend, self._device.type, self._spec.encoded, falls_back=True)
        self._transform = build_transform(self._spec, backend, self._device, self.batch_size)
        self._model = trained.build_model(self._device).eval()
        networks = self._model.members if isinstance(self._model, Ensemble) else [self._model]
        networks = networks if with_embeddings else []
        self._embeddings = [record_embeddings(network) for network in networks]
        self.embedding_width = sum(map(embedding_width, networks))

    @torch.inference_mode()
    def predict(self, images: list[NDArray[np.uint8]]) -> Predictions:
        """Predict a batch.

        Args:
            images: Up to `batch_size` images as returned by `InputAdapter.adapt`.

        Raises:
            UndecodableImage: The transform cannot decode an image file.
        """
        batch = self._transform(images if self._spec.encoded else np.stack(images))
        logits = model_logits(self._model, batch, self._config.trainer)
        embeddings = np.empty((len(images), 0), np.float32)
        if self._embeddings:
            # Of the image itself, which is the first view of test-time augmentation.
            embeddings = torch.cat([calls[0].float() for calls in self._embeddings], dim=1).cpu().numpy()
            for calls in self._embeddings:
                calls.clear()
        pixels = to_pixels(batch, self._trained).numpy()
        return Predictions(self._head(logits).cpu().numpy(), pixels, embeddings)

    def check_store(self, store: Store, name: str) -> None:
        """Raise `UserError` if the classes or image shapes of a split are not those of the run."""
        self._trained.check_classes(store.manifest, name)
        if upright_shape(store) != self.adapter.image_shape:
            raise UserError(
                found=f"{name} with images of shape {upright_shape(store)}",
                expected=f"images of shape {self.adapter.image_shape}, as in training",
                hint="name a packed data set of this shape, or image files, which may have any size",
            )


def record_embeddings(network: nn.Module) -> list[torch.Tensor]:
    """Record the input of a network's classifier, averaged over positions if it is a convolution.

    In a timm model this is `forward_head(forward_features(images), pre_logits=True)`.

    Returns:
        A list to which each call of the network appends [n, F].
    """
    calls: list[torch.Tensor] = []

    def record(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        calls.append(inputs[0].mean(dim=(2, 3)) if inputs[0].ndim == 4 else inputs[0])

    network.get_submodule(classifier_name(network)).register_forward_pre_hook(record)
    return calls


def embedding_width(network: nn.Module) -> int:
    """Return the length of the input of a network's classifier."""
    layer = network.get_submodule(classifier_name(network))
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels


def upright_shape(store: Store) -> tuple[int | None, int | None, int]:
    """Return height, width and channels of the upright images of a split."""
    height, width, channels = store.manifest.image_shape
    return (width, height, channels) if store.manifest.transposed else (height, width, channels)


def upright_images(store: Store, samples: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
    """Read images of a split in the format that `Predictor.predict` accepts."""
    return [upright(image, store.manifest.transposed) for image in store.read(samples)]
