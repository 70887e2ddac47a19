"""Random augmentation of training images: its strength, and the random parameters of each image.

The parameters are a pure function of (seed, epoch, step) and the image's position in the global batch, independent of
the number of ranks. The transform is a pure function of images and parameters.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum, auto

import numpy as np
from numpy.typing import NDArray

from pipeline.common.rng import AUGMENTATION_STREAM, ELASTIC_STREAM, POLICY_STREAM, random_keys
from pipeline.transforms.augment_settings import AugmentSettings


class ParamIndex(IntEnum):
    """Column of `AugmentationParams.uniform` that each operation uses."""

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
    VERTICAL_FLIP = auto()


_NUMBERS = 20  # random numbers of an image: a multiple of four, with one in reserve
_CROP_TRIALS = 10  # boxes drawn for a random-resized crop, of which the first that fits is taken, as in torchvision
NOISE_RANGE = np.float32(math.sqrt(12))  # of a uniform number with std 1
_MAX_ASPECT = 10 / 3  # of erased boxes (Zhong et al. 2017)
_MAX_CROP_ASPECT = 4 / 3  # of random-resized crops (Szegedy et al. 2015)

# RGB to luminance and two chrominance axes (YIQ, NTSC 1953).
_TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]])


@dataclass(frozen=True)
class AugmentationParams:
    """Random parameters of each image of a batch.

    Attributes:
        uniform: float64 [B, 20 + N], uniform in 0 .. 1; see `ParamIndex`. The last N are those of
            `Augmentation.auto_augment` and `Augmentation.random_resized_crop`.
        noise_keys: uint64 [B, 3], seed, stream and block of the generator from which the noise of the elastic
            distortion starts.
        noise_grid_size: Noise points K along an axis; 0 without elastic distortion.
    """

    uniform: NDArray[np.float64]
    noise_keys: NDArray[np.uint64]
    noise_grid_size: int

    def __len__(self) -> int:
        return len(self.uniform)

    def __getitem__(self, images: slice) -> AugmentationParams:
        return AugmentationParams(self.uniform[images], self.noise_keys[images], self.noise_grid_size)

    @classmethod
    def concatenate(cls, batches: Sequence[AugmentationParams]) -> AugmentationParams:
        """Concatenate the parameters of several batches of the same augmentation."""
        if len(batches) == 1:
            return batches[0]
        uniform, keys = (np.concatenate([getattr(b, name) for b in batches]) for name in ("uniform", "noise_keys"))
        return cls(uniform, keys, batches[0].noise_grid_size)

    @property
    def noise(self) -> NDArray[np.float32] | None:
        """float32 [B, 2, K, K], uniform with mean 0 and std 1, for the displacements (x, y) of the elastic distortion.

        None without elastic distortion. `elastic_noise` computes the same on a GPU.
        """
        size = self.noise_grid_size
        if not size:
            return None
        words = np.empty((len(self), noise_words(size)), np.uint64)
        # Images of a step follow each other in one stream.
        steps = np.diff(self.noise_keys[:, 1:].astype(np.int64), axis=0) == (0, words.shape[1] // 4)
        bounds = [0, *(np.flatnonzero(~steps.all(axis=1)) + 1), len(self)]
        for start, stop in itertools.pairwise(bounds if len(self) else []):
            seed, stream, block = map(int, self.noise_keys[start])
            words[start:stop].reshape(-1)[:] = random_keys(seed, stream, words[start:stop].size, 4 * block)
        # The centres of 2^23 equal intervals are exact in float32 and have mean 1/2.
        levels = ((words[:, : 2 * size**2] >> np.uint64(41)).astype(np.float32) + 0.5) * 2.0**-23
        return ((levels - 0.5) * NOISE_RANGE).reshape(len(self), 2, size, size)


def noise_words(grid_size: int) -> int:
    """Return how many random words an image's noise takes: one a point, rounded up to a block of four."""
    return -(-2 * grid_size**2 // 4) * 4


class Augmentation(AugmentSettings):
    """Strength of each random change of training images, with the random parameters and maps that follow from it.

    Angles are in degrees. Lengths are fractions of the image's side, except `stroke` and `crop_padding`, which are in
    raw pixels. Each amount is drawn uniformly between minus and plus the attribute's value, for each image. `flip`,
    `vertical_flip` and `erase` are probabilities. `AugmentSettings` documents each attribute.
    """

    def __bool__(self) -> bool:
        """Whether any image is changed."""
        changes = (self.random_resized_crop, self.stroke, self.erase, self.auto_augment_rounds)
        return self.has_warp or self.has_color_jitter or any(changes)

    @property
    def has_warp(self) -> bool:
        """Whether pixels are moved."""
        amounts = (self.rotation, self.shear, self.translation, self.scale, self.crop_padding, self.elastic)
        return any((*amounts, self.flip, self.vertical_flip))

    @property
    def has_color_jitter(self) -> bool:
        """Whether colours are changed."""
        return any((self.brightness, self.contrast, self.saturation, self.hue))

    def fill_value(self, mean: tuple[float, ...]) -> tuple[float, ...]:
        """Return the level 0 .. 1 of each channel that must be 0 while pixels are moved.

        With a constant fill it is the fill value, because the warp fills with zeros. With `border`, or without a warp,
        any level works; the mean needs no shift afterwards.
        """
        return mean if self.fill == "border" or not self.has_warp else (self.fill / 255,) * len(mean)

    @property
    def auto_augment_rounds(self) -> int:
        """Operations that TrivialAugment or RandAugment apply to an image; 0 without them."""
        return {"none": 0, "trivial_augment": 1, "rand_augment": self.rand_augment_ops}[self.auto_augment]

    @property
    def noise_grid_size(self) -> int:
        """Noise points along an axis; their distance is at most the std of the Gaussian that smooths them."""
        return math.ceil(1 / self.elastic_sigma) + 1

    def sample_params(self, seed: int, epoch: int, step: int, images: slice) -> AugmentationParams:
        """Sample the parameters of some images of a step.

        Args:
            seed: Seed of the run.
            epoch: Epoch, from 0.
            step: Step within the epoch, from 0.
            images: Start and stop within the global batch.
        """
        count, position = images.stop - images.start, (epoch << 32) + step
        uniform = _uniform(seed, AUGMENTATION_STREAM + position, images, _NUMBERS)
        # Further numbers have a stream of their own, so that they do not change those of other operations.
        if more := 4 * (self.auto_augment_rounds + (_CROP_TRIALS if self.random_resized_crop else 0)):
            uniform = np.hstack([uniform, _uniform(seed, POLICY_STREAM + position, images, more)])
        grid_size = self.noise_grid_size if self.elastic else 0
        keys = np.empty((count, 3), np.uint64)
        keys[:, :2] = seed, ELASTIC_STREAM + position
        keys[:, 2] = np.arange(images.start, images.stop, dtype=np.uint64) * np.uint64(noise_words(grid_size) // 4)
        return AugmentationParams(uniform, keys, grid_size)

    def affine_matrices(
        self, params: AugmentationParams, shape: tuple[int, int], aspect: float = 1.0
    ) -> NDArray[np.float64]:
        """Compute the inverse affine map of each image.

        In this order, the image is cropped from its padded copy, flipped, scaled, sheared along x, rotated and
        translated. All but the crop refer to the output.

        Args:
            params: Random parameters of B images.
            shape: (H, W) of the raw, upright image.
            aspect: Width of the output divided by its height.

        Returns:
            [B, 2, 3]; maps (x, y, 1) of the output to (x, y) of the input, both -1 .. 1 from edge to edge.
        """
        angle = np.deg2rad(self._spread(params, ParamIndex.ROTATION, self.rotation))
        shear = np.tan(np.deg2rad(self._spread(params, ParamIndex.SHEAR, self.shear)))
        scale = np.exp(self._spread(params, ParamIndex.SCALE, math.log1p(self.scale)))
        x = 2 * self._spread(params, ParamIndex.TRANSLATE_X, self.translation)
        y = 2 * self._spread(params, ParamIndex.TRANSLATE_Y, self.translation)
        sine, cosine = np.sin(angle) / scale, np.cos(angle) / scale
        linear = np.empty((len(params), 2, 3))
        # Inverse of rotation @ (1 shear; 0 1) @ scale, applied to positions minus the translation.
        linear[:, 0, 0], linear[:, 0, 1] = cosine + shear * sine, sine - shear * cosine
        linear[:, 1, 0], linear[:, 1, 1] = -sine, cosine
        linear[:, 0, 1] /= aspect
        linear[:, 1, 0] *= aspect
        linear[:, 0, 2] = -(linear[:, 0, 0] * x + linear[:, 0, 1] * y)
        linear[:, 1, 2] = -(linear[:, 1, 0] * x + linear[:, 1, 1] * y)
        linear[params.uniform[:, ParamIndex.FLIP] < self.flip, 0] *= -1
        linear[params.uniform[:, ParamIndex.VERTICAL_FLIP] < self.vertical_flip, 1] *= -1
        for axis, index, length in ((0, ParamIndex.CROP_X, shape[1]), (1, ParamIndex.CROP_Y, shape[0])):
            offset = np.floor(params.uniform[:, index] * (2 * self.crop_padding + 1)) - self.crop_padding
            linear[:, axis, 2] += 2 * offset / length
        return linear

    def color_matrices(self, params: AugmentationParams, channels: int) -> NDArray[np.float64]:
        """Compute the affine map of each image's colours.

        Hue rotates and saturation scales the chrominance plane without a change of luminance. Contrast scales around
        mid-grey; brightness scales all channels. Hue and saturation apply to images with three channels only.

        Returns:
            [B, C, C + 1]; maps (channels, 1) of colours 0 .. 1 to channels.
        """
        contrast = 1 + self._spread(params, ParamIndex.CONTRAST, self.contrast)
        brightness = 1 + self._spread(params, ParamIndex.BRIGHTNESS, self.brightness)
        matrices = np.zeros((len(params), channels, channels + 1))
        matrices[:, :, :channels] = np.eye(channels) if channels != 3 else self._chrominance_matrices(params)
        matrices[:, :, :channels] *= (contrast * brightness)[:, None, None]
        matrices[:, :, channels] = (0.5 * (1 - contrast) * brightness)[:, None]
        return matrices

    def _chrominance_matrices(self, params: AugmentationParams) -> NDArray[np.float64]:
        """Hue and saturation as maps of RGB, [B, 3, 3]."""
        angle = np.deg2rad(self._spread(params, ParamIndex.HUE, self.hue))
        saturation = 1 + self._spread(params, ParamIndex.SATURATION, self.saturation)
        yiq = np.zeros((len(params), 3, 3))
        yiq[:, 0, 0] = 1
        yiq[:, 1, 1] = yiq[:, 2, 2] = saturation * np.cos(angle)
        yiq[:, 2, 1] = saturation * np.sin(angle)
        yiq[:, 1, 2] = -yiq[:, 2, 1]
        return np.linalg.inv(_TO_YIQ) @ yiq @ _TO_YIQ

    def stroke_amounts(self, params: AugmentationParams) -> NDArray[np.float64]:
        """Return the pixels by which strokes become thicker on each side, [B]."""
        return self._spread(params, ParamIndex.STROKE, self.stroke)

    def erase_boxes(self, params: AugmentationParams) -> NDArray[np.float64]:
        """Return the box to erase in each image.

        Returns:
            [B, 4]: position (y, x) as a number 0 .. 1, height and width as fractions of the image's; height and width
            are 0 if nothing is erased.
        """
        uniform = params.uniform
        area = self.erase_area_min + (self.erase_area_max - self.erase_area_min) * uniform[:, ParamIndex.ERASE_AREA]
        aspect = _MAX_ASPECT ** (2 * uniform[:, ParamIndex.ERASE_ASPECT] - 1)
        sides = np.sqrt(np.stack([area * aspect, area / aspect], axis=1)).clip(max=1)
        sides[uniform[:, ParamIndex.ERASE] >= self.erase] = 0
        return np.concatenate([uniform[:, [ParamIndex.ERASE_Y, ParamIndex.ERASE_X]], sides], axis=1)

    def crop_boxes(self, params: AugmentationParams, sizes: NDArray[np.int64]) -> NDArray[np.int64]:
        """Compute the box of each image's random-resized crop (Szegedy et al. 2015, https://arxiv.org/abs/1409.4842).

        Area and aspect ratio are drawn until a box fits into the image, ten times at most. If none does, the box is the
        largest one in the centre with an allowed aspect ratio.

        Args:
            params: Random parameters of B images.
            sizes: [B, 2], height and width of the upright images in pixels.

        Returns:
            [B, 4]: top, left, height and width in pixels.
        """
        assert self.random_resized_crop is not None
        smallest, largest = self.random_resized_crop
        area, aspect, y, x = params.uniform[:, -4 * _CROP_TRIALS :].reshape(-1, _CROP_TRIALS, 4).transpose(2, 0, 1)
        area = (smallest + (largest - smallest) * area) * sizes.prod(axis=1, keepdims=True)
        aspect = _MAX_CROP_ASPECT ** (2 * aspect - 1)
        boxes = np.rint(np.sqrt(np.stack([area / aspect, area * aspect], axis=2)))  # [B, 10, 2]
        fits = ((boxes >= 1) & (boxes <= sizes[:, None])).all(axis=2)
        image, trial = np.arange(len(sizes)), fits.argmax(axis=1)
        box, place = boxes[image, trial], np.stack([y, x], axis=2)[image, trial]
        top_left = np.floor(place * (sizes - box + 1))
        central = np.minimum(sizes, np.rint(sizes[:, ::-1] * _MAX_CROP_ASPECT))
        has_box = fits.any(axis=1, keepdims=True)
        top_left, box = np.where(has_box, top_left, (sizes - central) // 2), np.where(has_box, box, central)
        return np.concatenate([top_left, box], axis=1).astype(np.int64)

    def auto_augment_numbers(
        self, params: AugmentationParams
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Return the numbers 0 .. 1 that select operation, magnitude and sign, [B, rounds] each."""
        numbers = params.uniform[:, _NUMBERS : _NUMBERS + 4 * self.auto_augment_rounds]
        return numbers[:, ::4], numbers[:, 1::4], numbers[:, 2::4]

    def _spread(self, params: AugmentationParams, index: ParamIndex, limit: float) -> NDArray[np.float64]:
        return (2 * params.uniform[:, index] - 1) * limit


def _uniform(seed: int, stream: int, images: slice, numbers: int) -> NDArray[np.float64]:
    """Draw numbers uniform in 0 .. 1 for each image, [B, numbers]; `numbers` is a multiple of four."""
    count = images.stop - images.start
    words = random_keys(seed, stream, count * numbers, images.start * numbers)
    return (words >> np.uint64(11)).reshape(count, numbers) * np.float64(2.0**-53)


NO_AUGMENTATION = Augmentation()
