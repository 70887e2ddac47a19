"""Removal of the shading of photographs of paper, on which light falls unevenly."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_LEAST_SIDE = 64  # pixels; smaller pictures are drawn or cut out, and ink may cover most of them
_LEAST_SHADING = 16  # gray levels, below which nothing is done
_GRID = 64  # points along the longer side that the shading is fitted to
_ROUNDS = 8
_FAR = 3.0  # times the median distance from the fit: what is further off is ink


def remove_shading(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A picture of gray levels [H, W] without the shading of its background; itself where that is even.

    The shading is a polynomial of second degree in the place, fitted to the levels by least squares again and again
    without those that lie far from it, so that the background, of which there is most, decides.
    """
    height, width = picture.shape
    if min(height, width) < _LEAST_SIDE:
        return picture
    step = -(-max(height, width) // _GRID)
    rows, columns = np.arange(0, height, step), np.arange(0, width, step)
    levels = picture[::step, ::step].reshape(-1).astype(np.float64)
    basis = _basis(rows / height, columns / width)
    factors = np.array([np.median(levels), 0, 0, 0, 0, 0])
    for _ in range(_ROUNDS):
        distance = np.abs(levels - basis @ factors)
        near = distance <= max(_FAR * np.median(distance), 1)
        factors = np.linalg.lstsq(basis[near], levels[near], rcond=None)[0]
    shading = (_basis(np.arange(height) / height, np.arange(width) / width) @ factors).reshape(height, width)
    if np.ptp(shading) < _LEAST_SHADING:
        return picture
    return np.rint(picture - shading + np.median(shading)).clip(0, 255).astype(np.uint8)


def _basis(y: NDArray[np.float64], x: NDArray[np.float64]) -> NDArray[np.float64]:
    """The six terms of the polynomial at all places of a grid: float64 [len(y) * len(x), 6]."""
    down, across = (one.reshape(-1) - 0.5 for one in np.meshgrid(y, x, indexing="ij"))
    return np.stack([np.ones_like(down), down, across, down**2, down * across, across**2], axis=1)
