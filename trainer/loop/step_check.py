"""Checks before the first step: batch norm takes every batch, and a step fits in memory."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import nn

from pipeline.common.device import free_memory
from pipeline.sampler import equal_batch_size
from pipeline.transforms.preprocess import format_size
from shards.errors import UserError, first_line
from trainer.config.schema import Config
from trainer.loop.state import Training
from trainer.models.compile import compile_mode
from trainer.runtime.memory import available_memory

log = logging.getLogger(__name__)


class StepMemoryError(UserError):
    """A training step does not fit in memory."""


_MARGIN = 1.5  # measured peak memory of a step of common networks over the tensors kept for the backward pass
_MULTIPLE = 8  # images; a suggested batch size is a multiple


def saved_tensor_bytes(model: nn.Module, shape: tuple[int, int, int, int]) -> int:
    """Compute the bytes that autograd keeps between the forward and the backward pass of a training step.

    The model is called on the meta device, which computes shapes only. The result is a lower bound of the memory of the
    step in float32, besides weights and gradients.

    Args:
        model: The model.
        shape: Shape of the images [n, channels, H, W].

    Returns:
        The bytes; 0 if the model has operations without a shape function.

    Raises:
        ValueError: A batch norm gets one value per channel.
    """
    memo = {id(each): nn.Parameter(each.detach().to("meta"), each.requires_grad) for each in model.parameters()}
    on_meta = copy.deepcopy(model, memo).to("meta").train()
    weights = {tensor.untyped_storage()._cdata for tensor in [*on_meta.parameters(), *on_meta.buffers()]}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    def fused_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_: Any) -> torch.Tensor:
        """Keep what the fused kernels of devices keep; the meta device has none, and keeps all attention weights."""
        return query * value

    try:
        with (
            mock.patch.object(nn.functional, "scaled_dot_product_attention", fused_attention),
            mock.patch.object(torch.distributed, "is_initialized", lambda: False),  # SyncBatchNorm needs a GPU then
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            on_meta(torch.empty(shape, device="meta"))
    except Exception as error:  # operations without a shape function raise many types of exceptions
        if isinstance(error, ValueError) and "more than 1 value per channel" in str(error):
            raise
        return 0
    return sum(storage.nbytes() for storage in kept.values())


def check_batch_sizes(training: Training) -> None:
    """Check that each rank has images in every batch of every epoch, and enough of them for batch norm.

    The batches of a stage have one size, and the ranks' slices differ by at most one image. A warning
    is logged if the batch of a rank is so small that MixUp or CutMix mixes an image with its own copy.

    Raises:
        UserError: A batch is too small.
    """
    config, data, world = training.config, training.data, training.world
    samples, channels = len(data.train.samples), data.spec.image_shape[2]
    for stage in data.train.stages:
        images = equal_batch_size(samples, stage.batch_size)
        smallest = images // world.size
        repeats = config.loader.repeated_augmentation
        if config.mixup.prob and repeats > 1 and smallest < 2 * repeats:
            log.warning(
                "loader.repeated_augmentation=%d with %d images per rank: MixUp and CutMix mix some images with copies "
                "of themselves; raise loader.batch_size",
                repeats,
                smallest,
            )
        if smallest > 1:
            continue
        reason = "one image for each rank"
        if smallest == 1:
            try:
                saved_tensor_bytes(training.state.model, (1, channels, *stage.input_size))
                continue
            except ValueError:
                reason = (
                    f"two images for each rank, which the batch norm of model.name={config.model.name} needs at "
                    f"{format_size(stage.resolution)}"
                )
        raise UserError(
            found=f"{samples} training images in batches of {images} for {world.size} rank(s): the smallest batch of a "
            f"rank has {smallest}",
            expected=f"batches with at least {reason}",
            hint=_larger_batches(config, samples, world.size),
        )


def _larger_batches(config: Config, samples: int, ranks: int) -> str:
    # The stage of the largest resolution has the smallest batches, of `loader.batch_size` images.
    for size in range(config.loader.batch_size + 1, samples + 1):
        if equal_batch_size(samples, size) >= 2 * ranks:
            return f"loader.batch_size={size}"
    if config.data.train_fraction < 1:
        return "data.train_fraction=1"
    return f"start at most {samples // 2} processes" if samples > 1 else "pack a data set of more images"


@dataclass(frozen=True)
class StepMemory:
    """Memory of the largest training step of a rank, in bytes."""

    images: int
    """Images of the global batch."""
    needed: float
    """A lower bound."""
    available: float
    fitting: int
    """The largest `loader.batch_size` that fits with a margin; 0 if none does."""

    fits: bool
    """Whether `loader.batch_size` fits with a margin."""

    def __str__(self) -> str:
        return (
            f"a step of {self.images:,} images needs at least {self.needed / 1e9:.1f} GB for each rank, and "
            f"{self.available / 1e9:.1f} GB are available"
        )


def estimate_memory(training: Training) -> StepMemory:
    """Estimate the memory of the largest training step from the shapes of the tensors that autograd keeps."""
    config, data, world, model = training.config, training.data, training.world, training.state.model
    samples, channels = len(data.train.samples), data.spec.image_shape[2]
    images, kept = 0, 0.0
    for stage in data.train.stages:
        size = equal_batch_size(samples, stage.batch_size)
        shape = (-(-size // world.size), channels, *stage.input_size)
        if (stage_kept := float(saved_tensor_bytes(model, shape))) >= kept:
            images, kept = size, stage_kept
    if config.trainer.precision != "fp32":
        kept /= 2
    if compile_mode(config.trainer, world.device) != "off":
        kept /= 2  # fused operations keep fewer tensors
    gradients = sum(parameter.nbytes for parameter in model.parameters())
    available = min(world.all_gather(lambda: _available(world.device)))
    fraction = max(0.0, available - 3 * gradients) / _MARGIN / max(kept, 1.0)
    fitting = min(config.loader.batch_size, samples)
    if fraction < 1:
        fitting = int(fitting * fraction)
        fitting -= fitting % _MULTIPLE if fitting > _MULTIPLE else 0
    return StepMemory(images, kept + gradients, available, fitting if fitting >= world.size else 0, fraction >= 1)


def check_memory(training: Training) -> None:
    """Check that a training step fits in memory.

    Raises:
        StepMemoryError: It cannot fit.
    """
    memory = estimate_memory(training)
    if memory.needed > memory.available:
        raise memory_error(str(memory), training, memory.fitting)


def memory_error(found: str, training: Training, fitting: int) -> StepMemoryError:
    """Return the error for a step that does not fit in memory, with a batch size that does; 0 if there is none."""
    config, samples = training.config, len(training.data.train.samples)
    accumulation = -(-min(config.loader.batch_size, samples) // max(fitting, 1)) * config.optim.grad_accumulation
    return StepMemoryError(
        found=found,
        expected="a training step that fits in memory",
        hint=f"loader.batch_size={fitting} optim.grad_accumulation={accumulation}"
        if fitting
        else "choose a smaller model.name or data.resolution",
    )


@contextlib.contextmanager
def explain_out_of_memory(training: Training) -> Iterator[None]:
    """Replace the error of a GPU without free memory by one with a smaller batch size.

    Raises:
        StepMemoryError: A step does not fit.
    """
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        images = min(training.config.loader.batch_size, len(training.data.train.samples))
        raise memory_error(first_line(error), training, images // 2) from None


def _available(device: torch.device) -> float:
    """Return how many bytes a rank can allocate on its device."""
    if device.type == "cuda":
        return float(free_memory(device))
    return available_memory() / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
