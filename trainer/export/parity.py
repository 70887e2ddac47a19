"""Comparison of an exported model with the trainer on test images, before a file is written."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from shards.errors import UserError
from shards.stores.base import Images, Store
from trainer.checkpoint.trained_model import TrainedModel
from trainer.evaluate.evaluator import loader_for, model_logits
from trainer.evaluate.logit_adjustment import ProbabilityHead
from trainer.runtime.distributed import World

TOLERANCE = 1e-4  # of a probability
_SAMPLES = 512  # of the test split, which is packed in random order


@dataclass(frozen=True)
class Reference:
    """Predictions of the trainer.

    Attributes:
        images: Raw images as stored on disk.
        inputs: Input of the model, float32 [n, C, R, R].
        probabilities: Probabilities float32 [n, classes], computed in fp32.
    """

    images: Images
    inputs: torch.Tensor
    probabilities: NDArray[np.float32]


@dataclass(frozen=True)
class Parity:
    """Result of a comparison.

    Attributes:
        samples: Number of images.
        same: Number of images with the same most probable class.
        difference: Largest absolute difference of a probability.
    """

    samples: int
    same: int
    difference: float

    @classmethod
    def of(cls, expected: NDArray[np.float32], actual: NDArray[np.float32]) -> Parity:
        """Compare probabilities [n, classes]."""
        same = int((expected.argmax(axis=1) == actual.argmax(axis=1)).sum())
        return cls(len(expected), same, float(np.abs(expected - actual).max()))


@torch.inference_mode()
def compute_reference(trained: TrainedModel, model: nn.Module, store: Store) -> Reference:
    """Predict the first samples of a store with the loader of evaluation, on the CPU in fp32.

    Args:
        trained: The run: settings, input transform, offsets and temperature.
        model: Its network.
        store: The test split.
    """
    settings = trained.config.trainer.model_copy(update={"precision": "fp32"})
    head = ProbabilityHead(**trained.posthoc_kwargs())
    samples = np.arange(min(len(store), _SAMPLES))
    inputs, probabilities = [], []
    for batch in loader_for(store, trained, World(), samples).batches():
        inputs.append(batch.images.clone(memory_format=torch.contiguous_format))
        probabilities.append(head(model_logits(model.eval(), batch.images, settings)))
    return Reference(store.read(samples), torch.cat(inputs), torch.cat(probabilities).numpy())


def compare(expected: NDArray[np.float32], actual: NDArray[np.float32]) -> Parity:
    """Compare probabilities [n, classes] of the trainer and of the exported model.

    Raises:
        UserError: They differ by more than the tolerance.
    """
    parity = Parity.of(expected, actual)
    if not parity.difference <= TOLERANCE:  # also for NaN
        raise UserError(
            found=f"an exported model whose probabilities differ from the trainer's by up to {parity.difference:.2g}, "
            f"with another most probable class for {parity.samples - parity.same} of {parity.samples} images",
            expected=f"a difference of at most {TOLERANCE:g}; no file was written",
            hint="try another --format, and report it with the run's config.yaml and env.json",
        )
    return parity
