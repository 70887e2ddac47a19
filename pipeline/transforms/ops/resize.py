"""Weights of a resize along one axis: output = weights @ input.

The weights equal those of DALI's `fn.resize`, so both backends compute the same result. Pixel r of the output is
sampled at position (r + 0.5) * source / target - 0.5 of the input. Positions outside the image take the border pixel.
For downsampling, the kernel is widened by source / target (anti-aliasing).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Kernel = Callable[[NDArray[np.float64]], NDArray[np.float64]]
TABLE_STEPS = 32  # nodes of a tabulated kernel per pixel


def nearest_nudge(target: int) -> float:
    """Return a shift of 1 / (8 * target) input pixels that rounds ties between two nearest pixels up.

    Positions are multiples of 1 / (2 * target), so the shift changes ties only. Without it, rounding errors of float32
    would decide, which differ between x and y in DALI.
    """
    return 1 / (8 * target)


def resize_weights(source: int, target: int, interpolation: str) -> NDArray[np.float64]:
    """Compute the weights of a resize along one axis.

    Args:
        source: Pixels of the input.
        target: Pixels of the output.
        interpolation: `linear`, `cubic`, `lanczos` or `nearest`.

    Returns:
        float64 [target, source]; each row sums to 1.
    """
    weights = np.zeros((target, source))
    positions = (np.arange(target) + 0.5) * (source / target)
    if interpolation == "nearest":
        weights[np.arange(target), np.floor(positions + nearest_nudge(target)).astype(int)] = 1
        return weights
    kernel, radius = _KERNELS[interpolation]
    widening = max(1.0, source / target)
    for row, position in enumerate(positions - 0.5):
        reach = radius * widening
        taps = np.arange(np.floor(position - reach), np.ceil(position + reach) + 1).astype(int)
        values = kernel((taps - position) / widening)
        np.add.at(weights[row], np.clip(taps, 0, source - 1), values / values.sum())
    return weights


def _triangle(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.maximum(0, 1 - np.abs(x))


def _catmull_rom(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Cubic kernel of Keys with a = -0.5 (1981, https://doi.org/10.1109/TASSP.1981.1163711)."""
    x = np.abs(x)
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0))


def _lanczos(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """sinc(x) * sinc(x / 3) for |x| < 3, with sinc(x) = sin(pi x) / (pi x).

    Duchon 1979, https://doi.org/10.1175/1520-0450(1979)018<1016:LFIOAT>2.0.CO;2, with three lobes on either side.
    """
    return np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0)


def _tabulated(kernel: Kernel, radius: int) -> Kernel:
    """Tabulate a kernel at steps of 1/32 with linear interpolation in between, as DALI does."""
    nodes = np.linspace(-radius, radius, 2 * radius * TABLE_STEPS + 1)
    values = kernel(nodes)
    return lambda x: np.interp(x, nodes, values, left=0, right=0)


_KERNELS: dict[str, tuple[Kernel, int]] = {
    "linear": (_triangle, 1),
    "cubic": (_tabulated(_catmull_rom, 2), 2),
    "lanczos": (_tabulated(_lanczos, 3), 3),
}


def kernel_table(interpolation: str) -> NDArray[np.float64]:
    """Return a kernel at distances 0, 1/32, 2/32, ..., between which it is linear; it ends with two zeros."""
    kernel, radius = _KERNELS[interpolation]
    return np.concatenate([kernel(np.arange(radius * TABLE_STEPS + 1) / TABLE_STEPS), np.zeros(1)])
