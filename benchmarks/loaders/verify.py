"""Is what a loader gives right? Held against float64, computed from the raw images."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.loaders.baselines.peer import Rows, Source, Task, Variant
from pipeline.transforms.ops.resize import resize_weights

IMAGES = 64  # of a batch, from its beginning and its end
_FLOAT32 = 2e-5  # of pixels in 0 .. 1: sums of four products of float32, some in a lower precision's accumulators


class WrongOutput(Exception):
    """A loader gave something else than was asked for; its speed means nothing."""


def model_input(pixels: NDArray[np.uint8], task: Task) -> NDArray[np.float64]:
    """Upright uint8 [B, H, W, C] to the model input float64 [B, C, R, R], linear interpolation."""
    height, width, _ = pixels.shape[1:]
    rows = resize_weights(height, task.resolution, "linear")
    columns = resize_weights(width, task.resolution, "linear")
    resized = np.einsum("rh,bhwc,sw->bcrs", rows, pixels / 255, columns, optimize=True)
    return (resized - np.reshape(task.mean, (-1, 1, 1))) / np.reshape(task.std, (-1, 1, 1))


def tolerance(variant: Variant, task: Task) -> float:
    """How far an output may be off, in the units of the model input."""
    return (_FLOAT32 + variant.levels / 255) / min(task.std)


def check(images: torch.Tensor, rows: Rows, variant: Variant, task: Task, source: Source) -> float:
    """The largest error of a batch (of `IMAGES` of its images). Raises `WrongOutput` if it is too large."""
    rows = np.asarray(rows.cpu() if isinstance(rows, torch.Tensor) else rows)
    channels, side = task.image_shape[2], task.resolution
    shape = source.pixels.shape[1:] if variant.raw else (channels, side, side)
    kind = torch.uint8 if variant.raw else torch.float32
    if images.dtype != kind or tuple(images.shape) != (len(rows), *shape) or images.device.type != task.device.type:
        raise WrongOutput(
            f"{images.dtype} {list(images.shape)} on {images.device}, not {kind} {[len(rows), *shape]} on {task.device}"
        )
    if rows.min() < 0 or rows.max() >= task.samples:
        raise WrongOutput(f"rows {rows.min()} .. {rows.max()} of {task.samples}")
    chosen = np.unique(np.r_[: min(IMAGES // 2, len(rows)), max(0, len(rows) - IMAGES // 2) : len(rows)])
    given = images[torch.from_numpy(chosen).to(images.device)].cpu().numpy()
    if variant.raw:
        if not np.array_equal(given, source.pixels[rows[chosen]]):
            raise WrongOutput("other bytes than the source holds")
        return 0.0
    error = float(np.abs(given - model_input(source.upright_rows(rows[chosen]), task)).max())
    if not error <= tolerance(variant, task):  # so that a NaN is an error too
        raise WrongOutput(f"off by {error:.2g}, where {tolerance(variant, task):.2g} is allowed")
    return error


def check_no_repeats(rows: NDArray[np.int64]) -> None:
    """Raise `WrongOutput` if an epoch (or a part of one) gave a sample twice. rows: int64 [n]."""
    repeats = len(rows) - len(np.unique(rows))
    if repeats:
        raise WrongOutput(f"{repeats} of {len(rows)} samples of an epoch were given twice")


def reach(rows: Rows, samples: int) -> float:
    """How far a batch reaches over the source: the range that holds the middle 90 % of its rows, as a share of all.

    0.9 for a full shuffle.
    """
    rows = np.asarray(rows.cpu() if isinstance(rows, torch.Tensor) else rows)
    low, high = np.percentile(rows, [5, 95])
    return float(high - low) / samples
