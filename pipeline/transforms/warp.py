"""Moving the pixels of a batch, each image in its own way: turned, sheared, scaled, shifted, mirrored and distorted, in
one interpolation from the raw size to the resolution."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from pipeline.common.buffer_pool import Buffers
from pipeline.transforms.augmentation import Augmentation, AugmentationParams
from pipeline.transforms.spec import TransformSpec

# Pixels of the output whose positions (8 bytes each) are worked on at a time, so that they stay in a core's cache.
_AT_ONCE = 1 << 18


class Warp:
    """Where each pixel of the output comes from, and its value there.

    Elastic distortion (Simard et al. 2003, https://doi.org/10.1109/ICDAR.2003.1227801) displaces each pixel by noise
    that a Gaussian has smoothed. Here the noise lies on a lattice and is scaled to the same deviation everywhere. Its
    positions are, like the affine ones, products of functions of the row and of the column:
    rows [R, K + 2] @ coefficients [K + 2, K + 2] @ columns [K + 2, R], where the last two functions are the place
    itself and 1.
    """

    def __init__(self, augmentation: Augmentation, spec: TransformSpec, device: torch.device) -> None:
        resolution = spec.resolution
        self._device = device
        self._shifts = fill_to_mean_shifts(augmentation, spec)
        self._padding = "border" if augmentation.fill == "border" else "zeros"
        self._buffers = Buffers()
        places = (np.arange(resolution) + 0.5) * (2 / resolution) - 1
        functions = [places[:, None], np.ones((resolution, 1))]
        self._amplitude = 2 * augmentation.elastic
        if self._amplitude:
            functions.insert(0, gaussian_weights(places, augmentation.noise_grid_size, augmentation.elastic_sigma))
        self._rows = torch.from_numpy(np.concatenate(functions, axis=1)).float().to(device)
        self._columns = self._rows.T.contiguous()

    def __call__(self, pixels: torch.Tensor, matrices: NDArray[np.float64], params: AugmentationParams) -> torch.Tensor:
        """Move the pixels of a batch, with linear interpolation.

        Args:
            pixels: float32 [B, C, H, W] on the device, (x / 255 - fill_value) / std.
            matrices: float64 [B, 2, 3] of `Augmentation.matrices`.
            params: Augmentation parameters of the batch; their noise drives the elastic distortion.

        Returns:
            Normalised images, float32 [B, C, R, R].
        """
        coefficients = torch.from_numpy(self._coefficients(matrices, params)).to(self._device, non_blocking=True)
        resolution = len(self._rows)
        batch, channels = pixels.shape[:2]
        output = self._empty(batch, channels, resolution, resolution)
        step = max(1, _AT_ONCE * torch.get_num_threads() // resolution**2) if self._device.type == "cpu" else batch
        for first in range(0, batch, step):
            part = slice(first, first + step)
            output[part] = F.grid_sample(
                pixels[part],
                self._positions(coefficients[part]).permute(0, 2, 3, 1),
                mode="bilinear",
                padding_mode=self._padding,
                align_corners=False,
            )
        for channel, shift in enumerate(self._shifts):
            output[:, channel] += shift
        return output

    def _coefficients(self, matrices: NDArray[np.float64], params: AugmentationParams) -> NDArray[np.float32]:
        """Of the functions of row and column, float32 [B, 2, K + 2, K + 2]."""
        functions = self._rows.shape[1]
        found = np.zeros((len(matrices), 2, functions, functions), np.float32)
        if self._amplitude:
            np.multiply(params.noise, np.float32(self._amplitude), out=found[:, :, :-2, :-2])
        found[:, :, -1, -2] = matrices[:, :, 0]  # across
        found[:, :, -2, -1] = matrices[:, :, 1]  # down
        found[:, :, -1, -1] = matrices[:, :, 2]
        return found

    def _positions(self, coefficients: torch.Tensor) -> torch.Tensor:
        """float32 [B, 2, R, R]: x and y of each pixel of the output, -1 .. 1 from edge to edge of the input."""
        batch, _, functions, _ = coefficients.shape
        resolution = len(self._rows)
        # The first is one large product for all images together.
        wide = torch.matmul(coefficients, self._columns, out=self._empty(batch, 2, functions, resolution))
        return torch.matmul(self._rows, wide, out=self._empty(batch, 2, resolution, resolution))

    def _empty(self, *shape: int) -> torch.Tensor:
        if self._device.type == "cuda":
            return torch.empty(shape, device=self._device)
        return self._buffers.tensor(shape)


def fill_to_mean_shifts(augmentation: Augmentation, spec: TransformSpec) -> list[float]:
    """Offsets that turn (x / 255 - fill_value) / std into (x / 255 - mean) / std, by channel; empty for none."""
    fill_value = augmentation.fill_value(spec.mean)
    each = [(level - mean) / std for level, mean, std in zip(fill_value, spec.mean, spec.std, strict=True)]
    return each if any(each) else []


def gaussian_weights(places: NDArray[np.float64], lattice: int, smoothness: float) -> NDArray[np.float64]:
    """What each lattice point counts at each place: a Gaussian, float64 [places, lattice], of rows of length 1.

    places: -1 .. 1. smoothness: the Gaussian's deviation as a share of the side. Independent noise of deviation 1 on
    the points has deviation 1 at every place.
    """
    distances = (places[:, None] - np.linspace(-1, 1, lattice)) / (2 * smoothness)
    weights = np.exp(-0.5 * distances**2)
    return weights / np.sqrt((weights**2).sum(axis=1, keepdims=True))
