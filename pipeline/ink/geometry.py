"""Find the ink in a picture and lay it as the images of a set have it.

EMNIST (Cohen et al. 2017, https://arxiv.org/abs/1702.05373, section II-A) blurs a scan with a Gaussian of sigma 1, cuts
out the ink, centres it in a square with its proportions kept and two pixels of the scan around it, and resizes that to
28x28 by cubic interpolation. The same is done here at the size that its scans have. How large the ink then is, and
whether its box or its centre of mass lies in the middle, is measured on images of the set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from pipeline.transforms.ops.resize import resize_weights

SCAN_SIDE = 40
"""Pixels of the longer side of the ink in a scan, at which its blur has sigma 1: with 3 pixels of blur and 2 of border
on either side it fills 40 of 50 pixels, and so 22.4 of 28, as the ink of EMNIST does."""
_SIGMA = 1.0
_BLUR_RADIUS = 4  # pixels, beyond which the Gaussian is cut off
_LARGEST = 1024  # pixels of a side that is looked at; larger pictures are made smaller first
_LEAST_CONTRAST = 32  # gray levels between ink and background
_CLEAN = 0.15  # of the contrast: so much noise of the background, or of the ink, is levelled
_SPECK = 0.005  # of the ink: what is smaller and lies apart is dust
_UNCLEAR = 0.35  # of the border: if the smaller class has more of it, the larger one of the whole is the background
_PLAIN = 0.7  # of the border of images of ink is background
_ASTRAY = 0.25  # of the side: ink that lies further from its usual place lies anywhere
_OUTLIERS = 0.5  # percent of the images of a set at either end


class NoInkError(Exception):
    """A picture without ink; the text says why."""


class Ink(NamedTuple):
    """The ink of a picture.

    Attributes:
        values: float64 [H, W], 0 (background) .. 1 (ink).
        box: top, bottom, left, right of what is at least half ink, in pixels, the ends exclusive.
        light: whether ink is lighter than the background.
        plain: fraction of the border that is background.
    """

    values: NDArray[np.float64]
    box: tuple[int, int, int, int]
    light: bool
    plain: float

    @property
    def side(self) -> int:
        """Pixels of the longer side of the box."""
        top, bottom, left, right = self.box
        return max(bottom - top, right - left)

    def centre(self, by_mass: bool) -> tuple[float, float]:
        """The middle of the box, or of the mass: y, x in pixels from the picture's corner."""
        if by_mass:
            y, x = ndimage.center_of_mass(self.values)
            return y + 0.5, x + 0.5
        top, bottom, left, right = self.box
        return (top + bottom) / 2, (left + right) / 2

    def off_middle(self, by_mass: bool) -> tuple[float, float]:
        """How far the centre lies below and right of the picture's middle, in pixels."""
        y, x = self.centre(by_mass)
        return y - self.values.shape[0] / 2, x - self.values.shape[1] / 2


@dataclass(frozen=True)
class InkFrame:
    """How ink lies in the upright images of a set, in their pixels.

    Attributes:
        light: whether ink is lighter than the background.
        by_mass: whether the centre is that of the mass, else of the box.
        side: mean length of the longer side of the ink's box.
        centre: mean position of the centre, down and right of the image's middle.
        least, most: lengths of `side` that occur.
        reach: largest distance from `centre` that occurs, along either axis.
    """

    light: bool
    by_mass: bool
    side: float
    centre: tuple[float, float]
    least: float
    most: float
    reach: float

    @classmethod
    def measure(cls, images: NDArray[np.uint8]) -> InkFrame | None:
        """The frame of some images of a set, upright, [N, H, W]; None if they are not ink on a plain
        background, in one place."""
        found = []
        for image in images:
            try:
                found.append(find_ink(image))
            except NoInkError:
                continue
        if len(found) < max(1, len(images) // 2) or np.median([ink.plain for ink in found]) < _PLAIN:
            return None
        light = sum(ink.light for ink in found) * 2 >= len(found)
        if sum(ink.light == light for ink in found) < 0.9 * len(found):
            return None  # pictures on light and on dark
        ways = []
        for by_mass in (False, True):
            off = np.array([ink.off_middle(by_mass) for ink in found])
            centre = np.median(off, axis=0)
            reach = float(np.percentile(np.abs(off - centre).max(axis=1), 100 - _OUTLIERS))
            ways.append((reach, by_mass, tuple(centre.tolist())))
        reach, by_mass, centre = min(ways)
        if reach > _ASTRAY * max(images.shape[1:]):
            return None
        sides = [ink.side for ink in found]
        least, most = np.percentile(sides, [_OUTLIERS, 100 - _OUTLIERS]).tolist()
        return cls(light, by_mass, float(np.mean(sides)), centre, least, most, reach)

    def holds(self, ink: Ink) -> bool:
        """Whether ink in an image of the set's size lies as it does in the set, to a pixel."""
        off = np.abs(np.subtract(ink.off_middle(self.by_mass), self.centre)).max()
        return ink.light == self.light and self.least - 1 <= ink.side <= self.most + 1 and off <= self.reach + 1


def find_ink(picture: NDArray[np.uint8]) -> Ink:
    """Separate ink from background in a picture of gray levels, uint8 [H, W].

    Otsu's threshold (1979, https://doi.org/10.1109/TSMC.1979.4310076) splits the levels. The background is the class of
    most of the border, or, where that is not clear, of most of the picture.

    Raises:
        NoInkError: if the contrast is low, or all ink is specks.
    """
    counts = np.bincount(picture.reshape(-1), minlength=256).astype(np.float64)
    threshold, dark, bright = _otsu(counts)
    if bright - dark < _LEAST_CONTRAST:
        raise NoInkError(
            f"nothing stands out: {bright - dark:.0f} of 255 gray levels between the darkest and the brightest"
        )
    edge = np.concatenate([picture[0], picture[-1], picture[1:-1, 0], picture[1:-1, -1]])
    dark_border = float((edge <= threshold).mean())  # fraction
    clear = min(dark_border, 1 - dark_border) < _UNCLEAR
    light = dark_border > 0.5 if clear else counts[: threshold + 1].sum() * 2 > picture.size
    background, ink = (dark, bright) if light else (bright, dark)
    values = (picture - background) / (ink - background)
    values = ((values - _CLEAN) / (1 - 2 * _CLEAN)).clip(0, 1)
    _remove_specks(values)
    mask = values >= 0.5
    if not mask.any():
        raise NoInkError("nothing but specks")
    rows, columns = ndimage.find_objects(mask.view(np.uint8))[0]
    box = rows.start, rows.stop, columns.start, columns.stop
    return Ink(values, box, bool(light), dark_border if light else 1 - dark_border)


def frame_ink(ink: Ink, frame: InkFrame, shape: tuple[int, int]) -> NDArray[np.uint8]:
    """Lay ink as a frame says, in the polarity of the set: uint8 of this shape [H, W]."""
    axes = [
        _axis_weights(length, size, centre, offset, frame.side / ink.side, SCAN_SIDE / frame.side)
        for length, size, centre, offset in zip(
            ink.values.shape, shape, ink.centre(frame.by_mass), frame.centre, strict=True
        )
    ]
    laid = (axes[0] @ ink.values @ axes[1].T).clip(0, None)
    levels = np.rint(laid * (255 / laid.max())).astype(np.uint8)
    return levels if frame.light else 255 - levels


def limit_size(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A picture of gray levels [H, W], made smaller if a side has more than 1,024 pixels."""
    image = Image.fromarray(picture)
    image.thumbnail((_LARGEST, _LARGEST), Image.Resampling.BILINEAR, reducing_gap=None)
    return np.asarray(image)


def _axis_weights(
    length: int, size: int, centre: float, offset: float, scale: float, scan: float
) -> NDArray[np.float64]:
    """Weights float64 [size, length] from a picture to the image along one axis; beyond the picture is background.

    Args:
        length: of the picture, pixels.
        size: of the image, pixels.
        centre: of the ink in the picture.
        offset: of the centre from the image's middle.
        scale: pixels of the image in one of the picture's.
        scan: pixels of the scan in one of the image's.
    """
    scan_size = round(size * scan)
    scan = scan_size / size
    places = centre + ((np.arange(scan_size) + 0.5 - scan_size / 2) / scan - offset) / scale
    scaled = _triangles(places, length, max(1.0, 1 / (scale * scan)))
    blurred = ndimage.gaussian_filter1d(scaled, _SIGMA, axis=0, mode="constant", radius=_BLUR_RADIUS)
    return resize_weights(scan_size, size, "cubic") @ blurred


def _triangles(places: NDArray[np.float64], length: int, width: float) -> NDArray[np.float64]:
    """Weights float64 [N, length] of pixels around N places, falling linearly to 0 at this distance."""
    first, last = min(0, int(places.min() - width) - 1), max(length, int(places.max() + width) + 2)
    distances = np.abs(np.arange(first, last) + 0.5 - places[:, None])
    weights = np.maximum(0, 1 - distances / width)
    return (weights / weights.sum(axis=1, keepdims=True))[:, -first : length - first]


def _otsu(counts: NDArray[np.float64]) -> tuple[int, float, float]:
    """Otsu's threshold of a histogram, and the mean levels up to it and above it."""
    levels = np.arange(len(counts))
    below = counts.cumsum()
    sums = (counts * levels).cumsum()
    above = below[-1] - below
    with np.errstate(divide="ignore", invalid="ignore"):
        dark, bright = sums / below, (sums[-1] - sums) / above
        spread = np.nan_to_num(below * above * (bright - dark) ** 2, nan=-1.0)
    threshold = int(spread.argmax())
    if spread[threshold] <= 0:  # one level alone
        return threshold, threshold, threshold
    return threshold, float(dark[threshold]), float(bright[threshold])


def _remove_specks(values: NDArray[np.float64]) -> None:
    """Set to 0 what lies apart and is too small to be part of a character, in place."""
    labels, found = ndimage.label(values > 0, structure=np.ones((3, 3)))
    if found > 1:
        areas = np.bincount(labels.reshape(-1), weights=values.reshape(-1), minlength=found + 1)
        areas[0] = 0
        values[(areas < _SPECK * areas.sum())[labels]] = 0
