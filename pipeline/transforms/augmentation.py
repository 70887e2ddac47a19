"""Random changes of training images: how strong they are, and what is drawn for each image.

What is drawn is a pure function of (seed, epoch, step) and the image's place in the global batch, whatever the number
of ranks; what becomes of it is up to the transform, which is a pure function of images and params.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum, auto
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.common.rng import AUGMENTATION_STREAM, ELASTIC_STREAM, random_keys


class ParamIndex(IntEnum):
    """Which of an image's numbers decides what."""

    ROTATION = 0
    SHEAR = auto()
    TRANSLATE_X = auto()
    TRANSLATE_Y = auto()
    SCALE = auto()
    FLIP = auto()
    CROP_X = auto()
    CROP_Y = auto()
    STROKE = auto()
    BRIGHTNESS = auto()
    CONTRAST = auto()
    SATURATION = auto()
    HUE = auto()
    ERASE = auto()
    ERASE_AREA = auto()
    ERASE_ASPECT = auto()
    ERASE_X = auto()
    ERASE_Y = auto()


_NUMBERS = 20  # drawn for an image: a multiple of four, and some to spare
_ASPECT = 10 / 3  # of erased boxes, at most: Zhong et al. 2017

# From RGB to luminance and two axes of colour (YIQ, NTSC 1953).
_TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]])


@dataclass(frozen=True)
class AugmentationParams:
    """What was drawn for each image of a batch.

    uniform: float64 [B, 20], uniform in 0 .. 1. noise: float32 [B, 2, K, K] of mean 0 and deviation 1, uniform, from
    which displacements (x, y) are made; None without elastic distortion.
    """

    uniform: NDArray[np.float64]
    noise: NDArray[np.float32] | None

    def __len__(self) -> int:
        return len(self.uniform)

    def __getitem__(self, part: slice) -> AugmentationParams:
        return AugmentationParams(self.uniform[part], None if self.noise is None else self.noise[part])

    @classmethod
    def concatenate(cls, parts: Sequence[AugmentationParams]) -> AugmentationParams:
        """The params of several batches of one augmentation, one after another."""
        if len(parts) == 1:
            return parts[0]
        noise = [part.noise for part in parts if part.noise is not None]
        return cls(np.concatenate([part.uniform for part in parts]), np.concatenate(noise) if noise else None)


@dataclass(frozen=True)
class Augmentation:
    """How strongly training images are changed at random; the default changes nothing.

    Angles in degrees; lengths as shares of the image's side, but stroke and crop_padding in raw pixels. Amounts are
    drawn uniformly from both directions up to the one given, for each image; flip and erase are probabilities.
    `trainer.config.schema.Augment` says what each of them does.
    """

    rotation: float = 0.0
    shear: float = 0.0
    translation: float = 0.0
    scale: float = 0.0
    flip: float = 0.0
    crop_padding: int = 0
    elastic: float = 0.0
    elastic_sigma: float = 0.14
    fill: Literal["border"] | int = "border"
    stroke: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    erase: float = 0.0
    erase_area_min: float = 0.02
    erase_area_max: float = 0.2
    erase_at: Literal["anywhere", "contour"] = "anywhere"
    erase_value: int = 0

    def __bool__(self) -> bool:
        """Whether it changes anything."""
        return self.has_warp or self.has_color_jitter or self.stroke > 0 or self.erase > 0

    @property
    def has_warp(self) -> bool:
        """Whether pixels move."""
        moves = (self.rotation, self.shear, self.translation, self.scale, self.flip, self.crop_padding, self.elastic)
        return any(moves)

    @property
    def has_color_jitter(self) -> bool:
        """Whether colours change."""
        return any((self.brightness, self.contrast, self.saturation, self.hue))

    def fill_value(self, mean: tuple[float, ...]) -> tuple[float, ...]:
        """For each channel, the grey 0 .. 1 that has to be 0 when pixels are moved: what fills in from outside, or, as
        the border repeats itself whatever it is, the mean, so that nothing has to be shifted afterwards."""
        return mean if self.fill == "border" else (self.fill / 255,) * len(mean)

    @property
    def noise_grid_size(self) -> int:
        """Points of the noise along an axis, no further apart than the deviation of the Gaussian that smooths it."""
        return math.ceil(1 / self.elastic_sigma) + 1

    def sample_params(self, seed: int, epoch: int, step: int, images: slice) -> AugmentationParams:
        """The params for some images (start and stop within the global batch) of a step."""
        count, place = images.stop - images.start, (epoch << 32) + step
        words = random_keys(seed, AUGMENTATION_STREAM + place, count * _NUMBERS, images.start * _NUMBERS)
        numbers = (words >> np.uint64(11)).reshape(count, _NUMBERS) * 2.0**-53
        if not self.elastic:
            return AugmentationParams(numbers, None)
        own = 2 * self.noise_grid_size**2
        drawn = own + -own % 4
        words = random_keys(seed, ELASTIC_STREAM + place, count * drawn, images.start * drawn)
        # The middles of 2^23 equal steps: exact in float32, and of mean 0.
        uniform = ((words >> np.uint64(41)).astype(np.float32) + 0.5) * 2.0**-23
        noise = (uniform.reshape(count, drawn)[:, :own] - 0.5) * np.float32(math.sqrt(12))
        return AugmentationParams(numbers, noise.reshape(count, 2, self.noise_grid_size, self.noise_grid_size))

    def affine_matrices(self, params: AugmentationParams, shape: tuple[int, int]) -> NDArray[np.float64]:
        """Where each image's pixels come from: [B, 2, 3], which take (x, y, 1) in the output to (x, y) in the input,
        both -1 .. 1 from edge to edge.

        An image is scaled and sheared (along x), turned and moved, as it is seen in the square output; before that
        mirrored, and before that cropped out of its own, padded on all sides. shape: (H, W) of the raw, upright image.
        """
        angle = np.deg2rad(self._spread(params, ParamIndex.ROTATION, self.rotation))
        shear = np.tan(np.deg2rad(self._spread(params, ParamIndex.SHEAR, self.shear)))
        scale = np.exp(self._spread(params, ParamIndex.SCALE, math.log1p(self.scale)))
        across = 2 * self._spread(params, ParamIndex.TRANSLATE_X, self.translation)
        down = 2 * self._spread(params, ParamIndex.TRANSLATE_Y, self.translation)
        sine, cosine = np.sin(angle) / scale, np.cos(angle) / scale
        linear = np.empty((len(params), 2, 3))
        # The inverse of (turn)(1 shear; 0 1)(scale), of positions less the translation.
        linear[:, 0, 0], linear[:, 0, 1] = cosine + shear * sine, sine - shear * cosine
        linear[:, 1, 0], linear[:, 1, 1] = -sine, cosine
        linear[:, 0, 2] = -(linear[:, 0, 0] * across + linear[:, 0, 1] * down)
        linear[:, 1, 2] = -(linear[:, 1, 0] * across + linear[:, 1, 1] * down)
        linear[params.uniform[:, ParamIndex.FLIP] < self.flip, 0] *= -1
        for axis, number, length in ((0, ParamIndex.CROP_X, shape[1]), (1, ParamIndex.CROP_Y, shape[0])):
            offset = np.floor(params.uniform[:, number] * (2 * self.crop_padding + 1)) - self.crop_padding
            linear[:, axis, 2] += 2 * offset / length
        return linear

    def color_matrices(self, params: AugmentationParams, channels: int) -> NDArray[np.float64]:
        """How each image's colours (0 .. 1) are mixed: [B, C, C + 1], for channels and 1.

        Hue turns and saturation stretches the plane of colour, luminance stays; contrast stretches about mid-grey;
        brightness multiplies all. Images of one channel only know the last two.
        """
        contrast = 1 + self._spread(params, ParamIndex.CONTRAST, self.contrast)
        brightness = 1 + self._spread(params, ParamIndex.BRIGHTNESS, self.brightness)
        mixed = np.zeros((len(params), channels, channels + 1))
        mixed[:, :, :channels] = np.eye(channels) if channels != 3 else self._turned(params)
        mixed[:, :, :channels] *= (contrast * brightness)[:, None, None]
        mixed[:, :, channels] = (0.5 * (1 - contrast) * brightness)[:, None]
        return mixed

    def _turned(self, params: AugmentationParams) -> NDArray[np.float64]:
        """Hue and saturation, [B, 3, 3]."""
        angle = np.deg2rad(self._spread(params, ParamIndex.HUE, self.hue))
        saturation = 1 + self._spread(params, ParamIndex.SATURATION, self.saturation)
        inner = np.zeros((len(params), 3, 3))
        inner[:, 0, 0] = 1
        inner[:, 1, 1] = inner[:, 2, 2] = saturation * np.cos(angle)
        inner[:, 2, 1] = saturation * np.sin(angle)
        inner[:, 1, 2] = -inner[:, 2, 1]
        return np.linalg.inv(_TO_YIQ) @ inner @ _TO_YIQ

    def stroke_amounts(self, params: AugmentationParams) -> NDArray[np.float64]:
        """By how many pixels each image's strokes become thicker on each side: [B]."""
        return self._spread(params, ParamIndex.STROKE, self.stroke)

    def erase_boxes(self, params: AugmentationParams) -> NDArray[np.float64]:
        """What is erased in each image: [B, 4], two numbers 0 .. 1 that say where (down, across) and the box's height
        and width as shares of the image's; height and width 0 for nothing."""
        numbers = params.uniform
        area = self.erase_area_min + (self.erase_area_max - self.erase_area_min) * numbers[:, ParamIndex.ERASE_AREA]
        aspect = _ASPECT ** (2 * numbers[:, ParamIndex.ERASE_ASPECT] - 1)
        sides = np.sqrt(np.stack([area * aspect, area / aspect], axis=1)).clip(max=1)
        sides[numbers[:, ParamIndex.ERASE] >= self.erase] = 0
        return np.concatenate([numbers[:, [ParamIndex.ERASE_Y, ParamIndex.ERASE_X]], sides], axis=1)

    def _spread(self, params: AugmentationParams, number: ParamIndex, most: float) -> NDArray[np.float64]:
        return (2 * params.uniform[:, number] - 1) * most


NO_AUGMENTATION = Augmentation()
