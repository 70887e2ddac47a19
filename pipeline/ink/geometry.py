"""Segmentation of the ink in an image and its placement as in the images of a data set.

EMNIST (Cohen et al. 2017, https://arxiv.org/abs/1702.05373, section II-A) blurs a scan with a Gaussian of sigma 1,
crops the ink, centres it in a square with two pixels of margin and the same aspect ratio, and resizes the square to
28x28 by cubic interpolation. This module does the same at the size of those scans. The size of the ink, and whether its
bounding box or its centre of mass is centred, are measured on images of the data set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from pipeline.transforms.ops.foreground import foreground_mask
from pipeline.transforms.ops.resize import resize_weights

SCAN_SIDE = 40
"""Longer side of the ink in a scan, in pixels, at which the blur has sigma 1. With 3 pixels of blur and 2 of margin on
each side the ink covers 40 of 50 pixels, thus 22.4 of 28, as in EMNIST."""
_SIGMA = 1.0
_BLUR_RADIUS = 4  # pixels, truncation of the Gaussian
_MAX_SIDE = 1024  # pixels; larger images are downsampled first
_MIN_CONTRAST = 32  # gray levels between ink and background
_NOISE = 0.15  # fraction of the contrast that is clipped at both ends, as noise of background and ink
_IS_INK = 0.5  # value
_SPECK = 0.005  # fraction of the ink; smaller components are dust
# Fraction of the border; if the smaller class has more, the background is the larger class of the image.
_UNCLEAR = 0.35
_MIN_PLAIN = 0.7  # minimum fraction of the border of images with ink that is background
_MAX_REACH = 0.25  # fraction of the side; with a larger variance of its position, ink has no usual place
_OUTLIERS = 0.5  # percent of the images, at each end


class NoInkError(Exception):
    """An image has no ink. The message states the reason."""


class Ink(NamedTuple):
    """The ink of an image.

    Attributes:
        values: float64 [H, W], 0 (background) .. 1 (ink).
        box: (top, bottom, left, right) of values of at least 0.5, in pixels, ends exclusive.
        is_light: Whether ink is lighter than the background.
        plain: Fraction of the border that is background.
    """

    values: NDArray[np.float64]
    box: tuple[int, int, int, int]
    is_light: bool
    plain: float

    @property
    def side(self) -> int:
        """Longer side of the box in pixels."""
        top, bottom, left, right = self.box
        return max(bottom - top, right - left)

    def centre(self, by_mass: bool) -> tuple[float, float]:
        """Return the centre (y, x) of the mass or of the box, in pixels from the corner of the image.

        A pale smudge, which is outside the box, has no mass: only values of at least 0.5 and their neighbours have.
        """
        if by_mass:
            y, x = ndimage.center_of_mass(self.values * ndimage.maximum_filter(self.values >= _IS_INK, 3))
            return y + 0.5, x + 0.5
        top, bottom, left, right = self.box
        return (top + bottom) / 2, (left + right) / 2

    def offset(self, by_mass: bool) -> tuple[float, float]:
        """Return the offset (y, x) of the centre from the centre of the image, in pixels."""
        y, x = self.centre(by_mass)
        return y - self.values.shape[0] / 2, x - self.values.shape[1] / 2


@dataclass(frozen=True)
class InkFrame:
    """Placement of the ink in the upright images of a data set. Lengths are in pixels.

    Attributes:
        is_light: Whether ink is lighter than the background.
        by_mass: Whether the centre is the centre of mass, else of the bounding box.
        side: Mean of the longer side of the bounding box.
        centre: Median offset (y, x) of the centre from the centre of the image.
        min_side: Minimum of `side`, without outliers.
        max_side: Maximum of `side`, without outliers.
        reach: Maximum distance from `centre` along an axis, without outliers.
    """

    is_light: bool
    by_mass: bool
    side: float
    centre: tuple[float, float]
    min_side: float
    max_side: float
    reach: float

    @classmethod
    def measure(cls, images: NDArray[np.uint8]) -> InkFrame | None:
        """Measure the placement of ink.

        Args:
            images: uint8 [N, H, W], upright images of a data set.

        Returns:
            The placement; None if the images are not ink on a plain background, or if its position varies too much.
        """
        inks = []
        for image in images:
            try:
                inks.append(find_ink(image))
            except NoInkError:
                continue
        if len(inks) < max(1, len(images) // 2) or np.median([ink.plain for ink in inks]) < _MIN_PLAIN:
            return None
        is_light = sum(ink.is_light for ink in inks) * 2 >= len(inks)
        if sum(ink.is_light == is_light for ink in inks) < 0.9 * len(inks):
            return None  # light and dark backgrounds
        candidates = []
        for by_mass in (False, True):
            offsets = np.array([ink.offset(by_mass) for ink in inks])
            centre = np.median(offsets, axis=0)
            reach = float(np.percentile(np.abs(offsets - centre).max(axis=1), 100 - _OUTLIERS))
            candidates.append((reach, by_mass, tuple(centre.tolist())))
        reach, by_mass, centre = min(candidates)
        if reach > _MAX_REACH * max(images.shape[1:]):
            return None
        sides = [ink.side for ink in inks]
        min_side, max_side = np.percentile(sides, [_OUTLIERS, 100 - _OUTLIERS]).tolist()
        return cls(is_light, by_mass, float(np.mean(sides)), centre, min_side, max_side, reach)

    def contains(self, ink: Ink) -> bool:
        """Return whether the ink of an image of the data set's size is placed as in the data set, within a pixel."""
        distance = np.abs(np.subtract(ink.offset(self.by_mass), self.centre)).max()
        has_side = self.min_side - 1 <= ink.side <= self.max_side + 1
        return bool(ink.is_light == self.is_light and has_side and distance <= self.reach + 1)


def find_ink(picture: NDArray[np.uint8]) -> Ink:
    """Separate ink from background by Otsu's threshold (1979, https://doi.org/10.1109/TSMC.1979.4310076).

    The background is the class of most border pixels. If the border is mixed, it is the class of most pixels.

    Args:
        picture: uint8 [H, W], gray.

    Raises:
        NoInkError: The contrast is low, or all ink is specks.
    """
    is_bright = foreground_mask(torch.tensor(picture)[None, ..., None])[0].numpy()
    dark, bright = (float(picture[mask].mean()) if mask.any() else 0.0 for mask in (~is_bright, is_bright))
    if bright - dark < _MIN_CONTRAST:
        raise NoInkError(f"low contrast: {max(bright - dark, 0):.0f} of 255 gray levels between background and ink")
    edge = np.concatenate([is_bright[0], is_bright[-1], is_bright[1:-1, 0], is_bright[1:-1, -1]])
    dark_border = 1 - float(edge.mean())  # fraction
    is_clear = min(dark_border, 1 - dark_border) < _UNCLEAR
    is_light = dark_border > 0.5 if is_clear else is_bright.mean() < 0.5
    background, ink = (dark, bright) if is_light else (bright, dark)
    values: NDArray[np.float64] = (picture.astype(np.float64) - background) / (ink - background)
    values = ((values - _NOISE) / (1 - 2 * _NOISE)).clip(0, 1)
    _remove_specks(values)
    mask = values >= _IS_INK
    if not mask.any():
        raise NoInkError("only specks")
    rows, columns = ndimage.find_objects(mask.view(np.uint8))[0]
    box = rows.start, rows.stop, columns.start, columns.stop
    return Ink(values, box, bool(is_light), dark_border if is_light else 1 - dark_border)


def frame_ink(ink: Ink, frame: InkFrame, shape: tuple[int, int]) -> NDArray[np.uint8]:
    """Place ink as in a data set, with the data set's polarity.

    Args:
        ink: Ink of an image.
        frame: Placement in the data set.
        shape: (H, W) of the result.

    Returns:
        uint8 [H, W].
    """
    axes = [
        _axis_weights(length, size, centre, offset, frame.side / ink.side, SCAN_SIDE / frame.side)
        for length, size, centre, offset in zip(
            ink.values.shape, shape, ink.centre(frame.by_mass), frame.centre, strict=True
        )
    ]
    values = (axes[0] @ ink.values @ axes[1].T).clip(0, None)
    levels = np.rint(values * (255 / values.max())).astype(np.uint8)
    return levels if frame.is_light else 255 - levels


def limit_size(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Downsample a gray image uint8 [H, W] whose longer side exceeds 1,024 pixels."""
    image = Image.fromarray(picture)
    image.thumbnail((_MAX_SIDE, _MAX_SIDE), Image.Resampling.BILINEAR, reducing_gap=None)
    return np.asarray(image)


def _axis_weights(
    length: int, size: int, centre: float, offset: float, scale: float, scan: float
) -> NDArray[np.float64]:
    """Weights float64 [size, length] from the input to the output along one axis, with background outside the input.

    Args:
        length: Pixels of the input.
        size: Pixels of the output.
        centre: Centre of the ink in the input.
        offset: Offset of the centre from the centre of the output.
        scale: Output pixels per input pixel.
        scan: Scan pixels per output pixel.
    """
    scan_size = round(size * scan)
    scan = scan_size / size
    positions = centre + ((np.arange(scan_size, dtype=np.float64) + 0.5 - scan_size / 2) / scan - offset) / scale
    scaled = _triangle_weights(positions, length, max(1.0, 1 / (scale * scan)))
    blurred = ndimage.gaussian_filter1d(scaled, _SIGMA, axis=0, mode="constant", radius=_BLUR_RADIUS)
    return resize_weights(scan_size, size, "cubic") @ blurred


def _triangle_weights(positions: NDArray[np.float64], length: int, width: float) -> NDArray[np.float64]:
    """Weights float64 [N, length] of the pixels around N positions, which fall linearly to 0 at distance `width`."""
    first, last = min(0, int(positions.min() - width) - 1), max(length, int(positions.max() + width) + 2)
    distances = np.abs(np.arange(first, last) + 0.5 - positions[:, None])
    weights = np.maximum(0, 1 - distances / width)
    return (weights / weights.sum(axis=1, keepdims=True))[:, -first : length - first]


def _remove_specks(values: NDArray[np.float64]) -> None:
    """Set components to 0, in place, that are too small to be part of a character."""
    labels, count = ndimage.label(values > 0, structure=np.ones((3, 3)))
    if count > 1:
        areas = np.bincount(labels.reshape(-1), weights=values.reshape(-1), minlength=count + 1)
        areas[0] = 0
        values[(areas < _SPECK * areas.sum())[labels]] = 0
