"""Resizing as a matrix: along one axis, output = weights @ input.

These are the weights of DALI's `fn.resize`, so that both backends compute the same thing:
pixel r of the output looks at position (r + 0.5) * source / target - 0.5 of the input; positions outside
take the border pixel; the kernel is widened by source / target when reducing (anti-aliasing).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Kernel = Callable[[NDArray[np.float64]], NDArray[np.float64]]


def nearest_nudge(target: int) -> float:
    """A shift of 1 / (8 * target) input pixels that settles ties of the nearest pixel upwards.

    Positions are multiples of 1 / (2 * target), so nothing else is changed by it, while rounding errors of
    float32 (which fall differently along x and y in DALI) no longer decide.
    """
    return 1 / (8 * target)


def resize_weights(source: int, target: int, interpolation: str) -> NDArray[np.float64]:
    """The matrix float64 [target, source] that resizes one axis; its rows add up to 1."""
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
    """Keys' cubic with a = -0.5 (1981, https://doi.org/10.1109/TASSP.1981.1163711)."""
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
    """DALI tabulates these kernels at steps of 1/32 and interpolates linearly between them; so do we."""
    nodes = np.linspace(-radius, radius, 2 * radius * 32 + 1)
    values = kernel(nodes)
    return lambda x: np.interp(x, nodes, values, left=0, right=0)


_KERNELS: dict[str, tuple[Kernel, int]] = {
    "linear": (_triangle, 1),
    "cubic": (_tabulated(_catmull_rom, 2), 2),
    "lanczos": (_tabulated(_lanczos, 3), 3),
}
