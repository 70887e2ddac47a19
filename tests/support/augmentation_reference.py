"""What augmentation and preparation must compute, in float64, image by image, from their descriptions.

It shares no code with the product: SciPy moves pixels and does the morphology.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from pipeline.transforms.augmentation import Augmentation, AugmentationParams, ParamIndex
from pipeline.transforms.preprocess import Resolution, input_size
from support.transform_reference import resize_axis

CROSS = ndimage.generate_binary_structure(2, 1)


def amount(params: AugmentationParams, image: int, number: ParamIndex, most: float) -> float:
    """Uniform in -most .. most."""
    return (2 * params.uniform[image, number] - 1) * most


def augmented(
    images: NDArray[np.uint8],
    resolution: Resolution,
    augmentation: Augmentation,
    params: AugmentationParams,
    interpolation: str = "linear",
    transposed: bool = False,
) -> NDArray[np.float64]:
    """Raw uint8 [B, H, W, C] to float64 [B, C, R, S] in 0 .. 1: colours changed, pixels moved."""
    planes = np.einsum("bhwc->bcwh" if transposed else "bhwc->bchw", images.astype(np.float64) / 255)
    shape = planes.shape[2:]
    if augmentation.has_color_jitter:
        planes = np.stack([recoloured(each, augmentation, params, number) for number, each in enumerate(planes)])
    height, width = input_size(resolution)
    # A constant fill does not enter the pixels that a resize extrapolates at the border.
    if interpolation != "linear" or height < shape[0] or width < shape[1] or augmentation.fill != "border":
        planes = resize_axis(resize_axis(planes, 2, height, interpolation), 3, width, interpolation)
    if not augmentation.has_warp:
        return resize_axis(resize_axis(planes, 2, height, "linear"), 3, width, "linear")
    return np.stack([moved(each, (height, width), shape, augmentation, params, i) for i, each in enumerate(planes)])


def moved(
    planes: NDArray[np.float64],
    output: tuple[int, int],
    shape: tuple[int, int],
    augmentation: Augmentation,
    params: AugmentationParams,
    image: int,
) -> NDArray[np.float64]:
    """One image [C, H, W] to [C, R, S]. output: (R, S). shape: (H, W) of the raw image."""
    angle = math.radians(amount(params, image, ParamIndex.ROTATION, augmentation.rotation))
    slant = math.tan(math.radians(amount(params, image, ParamIndex.SHEAR, augmentation.shear)))
    size = (1 + augmentation.scale) ** amount(params, image, ParamIndex.SCALE, 1)
    shift = [
        2 * amount(params, image, number, augmentation.translation)
        for number in (ParamIndex.TRANSLATE_X, ParamIndex.TRANSLATE_Y)
    ]
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    forward = turn @ np.array([[1, slant], [0, 1]]) * size
    down, across = ((np.arange(side) + 0.5) / side * 2 - 1 for side in output)
    x, y = np.meshgrid(across, down)
    # Lengths and angles are those of the output, in pixels.
    pixels = np.stack([(x - shift[0]) * output[1] / 2, (y - shift[1]) * output[0] / 2])
    x, y = np.einsum("ij,jrc->irc", np.linalg.inv(forward), pixels)
    x, y = x / (output[1] / 2), y / (output[0] / 2)
    if params.uniform[image, ParamIndex.FLIP] < augmentation.flip:
        x = -x
    if params.uniform[image, ParamIndex.VERTICAL_FLIP] < augmentation.vertical_flip:
        y = -y
    offsets = [
        math.floor(params.uniform[image, number] * (2 * augmentation.crop_padding + 1)) - augmentation.crop_padding
        for number in (ParamIndex.CROP_X, ParamIndex.CROP_Y)
    ]
    x, y = x + 2 * offsets[0] / shape[1], y + 2 * offsets[1] / shape[0]
    if augmentation.elastic:
        by = displacement(down, across, augmentation, params, image)
        x, y = x + by[0], y + by[1]
    height, width = planes.shape[1:]
    rows, columns = (y + 1) / 2 * height - 0.5, (x + 1) / 2 * width - 0.5
    if augmentation.fill == "border":
        outside: dict[str, object] = {"mode": "nearest"}
    else:
        outside = {"mode": "grid-constant", "cval": augmentation.fill / 255}
    return np.stack([ndimage.map_coordinates(plane, [rows, columns], order=1, **outside) for plane in planes])


def displacement(
    rows: NDArray[np.float64],
    columns: NDArray[np.float64],
    augmentation: Augmentation,
    params: AugmentationParams,
    image: int,
) -> NDArray[np.float64]:
    """[2, R, S]: noise on a lattice over the image, smoothed by a Gaussian, of one deviation everywhere."""
    count = math.ceil(1 / augmentation.elastic_sigma) + 1
    points = [-1 + 2 * number / (count - 1) for number in range(count)]
    deviation = 2 * augmentation.elastic_sigma
    found = np.zeros((2, len(rows), len(columns)))
    for row, down in enumerate(rows):
        for column, across in enumerate(columns):
            one = np.array([math.exp(-(((down - point) / deviation) ** 2) / 2) for point in points])
            other = np.array([math.exp(-(((across - point) / deviation) ** 2) / 2) for point in points])
            weights = np.outer(one, other)
            weights /= math.sqrt((weights**2).sum())
            found[:, row, column] = (params.noise[image] * weights).sum(axis=(1, 2))
    return found * 2 * augmentation.elastic


def recoloured(
    planes: NDArray[np.float64], augmentation: Augmentation, params: AugmentationParams, image: int
) -> NDArray[np.float64]:
    """One image [C, H, W]: hue, saturation, contrast, brightness, in this order."""
    if len(planes) == 3:
        red, green, blue = planes
        luminance = 0.299 * red + 0.587 * green + 0.114 * blue
        first = 0.595716 * red - 0.274453 * green - 0.321263 * blue
        second = 0.211456 * red - 0.522591 * green + 0.311135 * blue
        angle = math.radians(amount(params, image, ParamIndex.HUE, augmentation.hue))
        stretch = 1 + amount(params, image, ParamIndex.SATURATION, augmentation.saturation)
        turned = (first + 1j * second) * stretch * complex(math.cos(angle), math.sin(angle))
        back = np.linalg.inv([[0.299, 0.587, 0.114], [0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]])
        planes = np.einsum("ij,jhw->ihw", back, np.stack([luminance, turned.real, turned.imag]))
    contrast = 1 + amount(params, image, ParamIndex.CONTRAST, augmentation.contrast)
    brightness = 1 + amount(params, image, ParamIndex.BRIGHTNESS, augmentation.brightness)
    return ((planes - 0.5) * contrast + 0.5) * brightness


def change_stroke_width(plane: NDArray[np.uint8], pixels: float) -> NDArray[np.float64]:
    """One plane [H, W], thicker by so many pixels or (below 0) thinner."""
    result = plane.astype(np.float64)
    step = ndimage.grey_dilation if pixels > 0 else ndimage.grey_erosion
    for done in range(math.ceil(abs(pixels))):
        result += min(1.0, abs(pixels) - done) * (step(result, footprint=CROSS, mode="nearest") - result)
    return result


def equalize(plane: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """One plane [H, W]: each pixel by its rank among those that are not the darkest."""
    darkest = (plane == plane.min()).sum()
    if darkest == plane.size:
        return plane
    table = {value: ((plane <= value).sum() - darkest) * 255 / (plane.size - darkest) for value in np.unique(plane)}
    return np.array([[round(table[value]) for value in line] for line in plane], np.uint8)


def otsu(plane: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Ink of one plane [H, W]: above the threshold at which both sides vary least within themselves."""
    best, chosen = math.inf, np.zeros(plane.shape, bool)
    for threshold in range(255):
        ink = plane > threshold
        if ink.any() and not ink.all():
            within = plane[ink].var() * ink.mean() + plane[~ink].var() * (~ink).mean()
            if within < best - 1e-9:
                best, chosen = within, ink
    return chosen


def cropped(plane: NDArray[np.uint8], ink: NDArray[np.bool_], margin: float) -> NDArray[np.float64]:
    """The square around the ink of one plane [H, W], as large as the plane."""
    if not ink.any():
        return plane.astype(np.float64)
    rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    side = max(rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1) * (1 + 2 * margin)
    places = []
    for lines, length in ((rows, plane.shape[0]), (columns, plane.shape[1])):
        middle = (lines[0] + lines[-1] + 1) / 2
        places.append(middle - side / 2 + (np.arange(length) + 0.5) * side / length - 0.5)
    grid = np.meshgrid(*places, indexing="ij")
    return ndimage.map_coordinates(plane.astype(np.float64), grid, order=1, mode="nearest")
