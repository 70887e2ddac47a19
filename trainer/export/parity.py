"""Does an exported model say what the trainer says? Held on real samples before a file is left anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from pipeline.transforms.build import build_transform, choose_backend
from pipeline.transforms.spec import TransformSpec
from shards.errors import UserError
from shards.stores.base import Images, Store
from trainer.config.schema import Config
from trainer.data.training_data import evaluation_loader
from trainer.evaluate.evaluator import model_logits
from trainer.evaluate.logit_adjustment import ProbabilityHead
from trainer.runtime.distributed import World

TOLERANCE = 1e-4  # of a probability
_SAMPLES = 512  # of the test part, whose packed order is a random one
_FIRST = (1, 2)  # images of the first batches: a graph that is made for one number of images does not take another


@dataclass(frozen=True)
class Reference:
    """What the trainer answers. images: raw, as at rest. inputs: float32 [n, C, R, R], of the trainer's graph.
    probabilities: float32 [n, classes], computed in fp32. rows: int64 [n], in the raw source."""

    images: Images
    inputs: torch.Tensor
    probabilities: NDArray[np.float32]
    rows: NDArray[np.int64]


@dataclass(frozen=True)
class Parity:
    """samples: compared. same: of them, with the same most probable class. difference: the largest of a probability."""

    samples: int
    same: int
    difference: float


@torch.inference_mode()
def reference(
    config: Config, spec: TransformSpec, model: nn.Module, decided: ProbabilityHead, store: Store
) -> Reference:
    """Answers of the trainer's own graph and evaluation, on the first samples of a part, on this processor in fp32."""
    cpu = World(rank=0, size=1, device=torch.device("cpu"))
    settings = config.trainer.model_copy(update={"precision": "fp32"})
    samples = np.arange(min(len(store), _SAMPLES))
    graph = build_transform(spec, choose_backend(config.loader.backend, cpu.device, spec)[0], cpu.device, len(samples))
    inputs, probabilities, rows = [], [], []
    for batch in evaluation_loader(store, samples, graph, config, cpu).batches():
        inputs.append(batch.images.clone(memory_format=torch.contiguous_format))
        probabilities.append(decided(model_logits(model.eval(), batch, settings, cpu)))
        rows.append(batch.source_index)
    return Reference(store.read(samples), torch.cat(inputs), torch.cat(probabilities).numpy(), torch.cat(rows).numpy())


def parts(samples: int) -> Iterator[slice]:
    """Batches of different sizes that cover some samples."""
    stops = [stop for stop in np.cumsum(_FIRST).tolist() if stop < samples] + [samples]
    return map(slice, [0, *stops[:-1]], stops)


def compare(expected: NDArray[np.float32], found: NDArray[np.float32]) -> Parity:
    """expected, found: probabilities [n, classes]. Raises `UserError` if they are not the same within the tolerance."""
    difference = float(np.abs(expected - found).max())
    top, other = expected.argmax(axis=1), found.argmax(axis=1)
    parity = Parity(len(expected), int((top == other).sum()), difference)
    if not difference <= TOLERANCE:  # also where it is not a number
        raise UserError(
            found=f"an exported model whose probabilities differ from the trainer's by up to {difference:.2g}, with "
            f"another most probable class for {parity.samples - parity.same} of {parity.samples} test images",
            expected=f"the same within {TOLERANCE:g}; nothing was written",
            hint="try another --format, and tell us about it, with the run's config.yaml and env.json",
        )
    return parity
