"""Verification of loader outputs against a float64 reference computed from the raw images."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.loaders.baselines.base import Indices, Source, Task, Variant
from pipeline.transforms.ops.resize import resize_weights

IMAGES = 64  # verified images of a batch, at its start and end
_FLOAT32_TOLERANCE = 2e-5  # of pixels in 0 .. 1: sums of four products, some with reduced-precision accumulators


class WrongOutputError(Exception):
    """A loader returned a wrong batch, so its speed is meaningless."""


def model_input(pixels: NDArray[np.uint8], task: Task) -> NDArray[np.float64]:
    """Convert upright images to model input by linear interpolation and normalization.

    Args:
        pixels: uint8 [B, H, W, C].
        task: Resolution R, mean and std.

    Returns:
        float64 [B, C, R, R].
    """
    height, width, _ = pixels.shape[1:]
    vertical = resize_weights(height, task.resolution, "linear")
    horizontal = resize_weights(width, task.resolution, "linear")
    resized = np.einsum("rh,bhwc,sw->bcrs", vertical, pixels / 255, horizontal, optimize=True)
    return (resized - np.reshape(task.mean, (-1, 1, 1))) / np.reshape(task.std, (-1, 1, 1))


def tolerance(variant: Variant, task: Task) -> float:
    """Return the largest valid error in units of the model input."""
    return (_FLOAT32_TOLERANCE + variant.tolerance_levels / 255) / min(task.std)


def check_batch(images: torch.Tensor, indices: Indices, variant: Variant, task: Task, source: Source) -> float:
    """Verify a batch.

    Args:
        images: The batch, as `base.Batch` describes it.
        indices: Source index of each image, int64 [B].
        variant: Variant of the loader.
        task: Expected output.
        source: Raw images.

    Returns:
        The largest error of `IMAGES` images.

    Raises:
        WrongOutputError: Type, shape, device, indices or values are wrong.
    """
    indices = to_numpy(indices)
    channels, side = task.image_shape[2], task.resolution
    shape = source.pixels.shape[1:] if variant.is_raw else (channels, side, side)
    dtype = torch.uint8 if variant.is_raw else torch.float32
    expected = (len(indices), *shape)
    if images.dtype != dtype or tuple(images.shape) != expected or images.device.type != task.device.type:
        raise WrongOutputError(
            f"{images.dtype} {list(images.shape)} on {images.device}, not {dtype} {list(expected)} on {task.device}"
        )
    if indices.min() < 0 or indices.max() >= task.samples:
        raise WrongOutputError(f"source indices {indices.min()} .. {indices.max()} of {task.samples} samples")
    half = IMAGES // 2
    chosen = np.unique(np.r_[: min(half, len(indices)), max(0, len(indices) - half) : len(indices)])
    values = images[torch.from_numpy(chosen).to(images.device)].cpu().numpy()
    if variant.is_raw:
        if not np.array_equal(values, source.pixels[indices[chosen]]):
            raise WrongOutputError("bytes differ from the source")
        return 0.0
    error = float(np.abs(values - model_input(source.upright_images(indices[chosen]), task)).max())
    if not error <= tolerance(variant, task):  # NaN is an error as well
        raise WrongOutputError(f"error {error:.2g}, tolerance {tolerance(variant, task):.2g}")
    return error


def check_no_repeats(indices: NDArray[np.int64]) -> None:
    """Verify that an epoch or a part of it contains no sample twice.

    Args:
        indices: Source indices, int64 [n].

    Raises:
        WrongOutputError: A sample is repeated.
    """
    repeats = len(indices) - len(np.unique(indices))
    if repeats:
        raise WrongOutputError(f"{repeats} of {len(indices)} samples of an epoch are repeated")


def reach(indices: Indices, samples: int) -> float:
    """Return the range of the middle 90% of the indices of a batch as a fraction of the source; 0.9 if uniform."""
    low, high = np.percentile(to_numpy(indices), [5, 95])
    return float(high - low) / samples


def to_numpy(indices: Indices) -> NDArray[np.int64]:
    """Convert indices to an array in main memory."""
    return np.asarray(indices.cpu() if isinstance(indices, torch.Tensor) else indices)
