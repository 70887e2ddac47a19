"""What a graph must compute, in float64 and slowly, written from the description in `pipeline.transforms.ops.resize`.

It shares no code with the product and uses no matrix: one output pixel after another, along one axis at a time.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from pipeline.transforms.preprocess import Resolution, input_size

_STEPS = 32  # DALI tabulates its cubic and Lanczos kernels at steps of 1/32 of a pixel
_REACH = {"linear": 1, "cubic": 2, "lanczos": 3}


def model_input(
    images: NDArray[np.uint8],
    resolution: Resolution,
    interpolation: str = "linear",
    transposed: bool = False,
    mean: tuple[float, ...] = (0.0,),
    std: tuple[float, ...] = (1.0,),
) -> NDArray[np.float64]:
    """Raw uint8 [B, H, W, C] to upright, resized, normalised float64 [B, C, R, S]."""
    planes = images.astype(np.float64) / 255
    planes = np.einsum("bhwc->bcwh" if transposed else "bhwc->bchw", planes)
    height, width = input_size(resolution)
    planes = resize_axis(planes, 2, height, interpolation)
    planes = resize_axis(planes, 3, width, interpolation)
    for channel in range(planes.shape[1]):
        planes[:, channel] = (planes[:, channel] - mean[channel]) / std[channel]
    return planes


def resize_axis(planes: NDArray[np.float64], axis: int, target: int, interpolation: str) -> NDArray[np.float64]:
    """Resize one axis to `target` pixels."""
    lines = np.moveaxis(planes, axis, 0)
    source = len(lines)
    resized = np.zeros((target, *lines.shape[1:]))
    for pixel in range(target):
        if interpolation == "nearest":
            # In whole numbers: the pixel in which (pixel + 1/2) * source / target lies.
            resized[pixel] = lines[(2 * pixel + 1) * source // (2 * target)]
            continue
        centre = (pixel + 0.5) * source / target - 0.5
        widening = max(1.0, source / target)
        reach = _REACH[interpolation] * widening
        total = 0.0
        for tap in range(math.floor(centre - reach), math.ceil(centre + reach) + 1):
            weight = kernel(abs(tap - centre) / widening, interpolation)
            resized[pixel] += weight * lines[min(max(tap, 0), source - 1)]
            total += weight
        resized[pixel] /= total
    return np.moveaxis(resized, 0, axis)


def kernel(distance: float, interpolation: str) -> float:
    """Weight of a pixel at a distance >= 0 from the centre."""
    if interpolation == "linear":
        return max(0.0, 1.0 - distance)
    exact = catmull_rom if interpolation == "cubic" else lanczos
    node = math.floor(distance * _STEPS)
    share = distance * _STEPS - node
    return (1 - share) * exact(node / _STEPS) + share * exact((node + 1) / _STEPS)


def catmull_rom(distance: float) -> float:
    """Keys 1981 with a = -1/2: the cubic through 1, 0, 0 at 0, 1, 2 with the central differences as slopes."""
    if distance >= 2:
        return 0.0
    if distance >= 1:
        return ((5 - distance) * distance - 8) * distance / 2 + 2
    return (3 * distance - 5) * distance * distance / 2 + 1


def lanczos(distance: float) -> float:
    """Duchon 1979: sin(pi x) / (pi x) under the middle arch of the same three times as wide."""
    if distance == 0:
        return 1.0
    if distance >= 3:
        return 0.0
    angle = math.pi * distance
    return 3 * math.sin(angle) * math.sin(angle / 3) / angle**2
