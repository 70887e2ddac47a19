"""Removal of uneven lighting from photographs of paper."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_MIN_SIDE = 64  # pixels; smaller images are drawings or crops, which ink may cover almost completely
_MIN_SHADING = 16  # gray levels; a smaller range is not corrected
_GRID = 64  # points of the fit along the longer side
_ITERATIONS = 8
_OUTLIER_RATIO = 3.0  # points further from the fit than this multiple of the median distance are ink


def remove_shading(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Remove the shading of the background; an evenly lit image is returned as it is.

    The shading is a quadratic polynomial of the position. It is fitted by iterated least squares, each time without the
    outliers of the previous fit, so the background dominates as the largest part of the image.

    Args:
        picture: uint8 [H, W], gray.

    Returns:
        uint8 [H, W].
    """
    height, width = picture.shape
    if min(height, width) < _MIN_SIDE:
        return picture
    step = -(-max(height, width) // _GRID)
    rows, columns = np.arange(0, height, step), np.arange(0, width, step)
    levels = picture[::step, ::step].reshape(-1).astype(np.float64)
    basis = _basis(rows / height, columns / width)
    coefficients = np.array([np.median(levels), 0, 0, 0, 0, 0])
    for _ in range(_ITERATIONS):
        distance = np.abs(levels - basis @ coefficients)
        is_inlier = distance <= max(_OUTLIER_RATIO * np.median(distance), 1)
        coefficients = np.linalg.lstsq(basis[is_inlier], levels[is_inlier], rcond=None)[0]
    shading = (_basis(np.arange(height) / height, np.arange(width) / width) @ coefficients).reshape(height, width)
    if np.ptp(shading) < _MIN_SHADING:
        return picture
    return np.rint(picture - shading + np.median(shading)).clip(0, 255).astype(np.uint8)


def _basis(y: NDArray[np.float64], x: NDArray[np.float64]) -> NDArray[np.float64]:
    """The six terms of the polynomial at all points of a grid, float64 [len(y) * len(x), 6]."""
    y, x = (axis.reshape(-1) - 0.5 for axis in np.meshgrid(y, x, indexing="ij"))
    return np.stack([np.ones_like(y), y, x, y**2, y * x, x**2], axis=1)
