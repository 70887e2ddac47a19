"""Affine and elastic warp of each image of a batch, in one interpolation from the raw size to the resolution."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from pipeline.common.buffer_pool import BufferPool
from pipeline.transforms.augmentation import Augmentation, AugmentationParams
from pipeline.transforms.spec import TransformSpec

# Output pixels per chunk and thread: their positions (8 bytes each) then stay in the cache of a core.
_CHUNK_PIXELS = 1 << 18


class Warp:
    """Computes the source position of each output pixel and samples the image there.

    Elastic distortion (Simard et al. 2003, https://doi.org/10.1109/ICDAR.2003.1227801) displaces each pixel by noise
    smoothed with a Gaussian. Here the noise is given on a grid and scaled to the same std at every pixel. Affine and
    elastic positions are then one product of functions of the row and of the column: rows [R, K + 2] @ coefficients
    [K + 2, K + 2] @ columns [K + 2, R], where the last two functions are the coordinate itself and 1.
    """

    def __init__(self, augmentation: Augmentation, spec: TransformSpec, device: torch.device) -> None:
        resolution = spec.resolution
        self._augmentation = augmentation
        self._input_shape = (resolution, resolution) if spec.encoded else spec.upright_size
        self._device = device
        # From (x / 255 - fill_value) / std to (x / 255 - mean) / std.
        fill_value = augmentation.fill_value(spec.mean)
        self._shifts = [(level - mean) / std for level, mean, std in zip(fill_value, spec.mean, spec.std, strict=True)]
        self._padding = "border" if augmentation.fill == "border" else "zeros"
        self._buffers = BufferPool(device)
        coordinates = (np.arange(resolution, dtype=np.float64) + 0.5) * (2 / resolution) - 1
        functions = [coordinates[:, None], np.ones((resolution, 1))]
        self._amplitude = 2 * augmentation.elastic
        if self._amplitude:
            functions.insert(0, gaussian_weights(coordinates, augmentation.noise_grid_size, augmentation.elastic_sigma))
        self._rows = torch.from_numpy(np.concatenate(functions, axis=1)).float().to(device)
        self._columns = self._rows.T.contiguous()

    def __call__(self, pixels: torch.Tensor, params: AugmentationParams) -> torch.Tensor:
        """Move the pixels of a batch, with linear interpolation.

        Args:
            pixels: float32 [B, C, H, W] on the device, (x / 255 - fill_value) / std.
            params: Augmentation parameters of the batch; their noise drives the elastic distortion.

        Returns:
            Normalised images, float32 [B, C, R, R].
        """
        coefficients = torch.from_numpy(self._coefficients(params)).to(self._device, non_blocking=True)
        resolution = len(self._rows)
        batch, channels = pixels.shape[:2]
        output = self._buffers.empty(batch, channels, resolution, resolution)
        step = max(1, _CHUNK_PIXELS * torch.get_num_threads() // resolution**2) if self._device.type == "cpu" else batch
        for first in range(0, batch, step):
            chunk = slice(first, first + step)
            output[chunk] = F.grid_sample(
                pixels[chunk],
                self._positions(coefficients[chunk]).permute(0, 2, 3, 1),
                mode="bilinear",
                padding_mode=self._padding,
                align_corners=False,
            )
        for channel, shift in enumerate(self._shifts):
            if shift:
                output[:, channel] += shift
        return output

    def _coefficients(self, params: AugmentationParams) -> NDArray[np.float32]:
        """Coefficients of the functions of row and column, float32 [B, 2, K + 2, K + 2]."""
        matrices = self._augmentation.affine_matrices(params, self._input_shape)
        functions = self._rows.shape[1]
        coefficients = np.zeros((len(matrices), 2, functions, functions), np.float32)
        if params.noise is not None:
            np.multiply(params.noise, np.float32(self._amplitude), out=coefficients[:, :, :-2, :-2])
        coefficients[:, :, -1, -2] = matrices[:, :, 0]  # x
        coefficients[:, :, -2, -1] = matrices[:, :, 1]  # y
        coefficients[:, :, -1, -1] = matrices[:, :, 2]
        return coefficients

    def _positions(self, coefficients: torch.Tensor) -> torch.Tensor:
        """Source (x, y) of each output pixel, -1 .. 1 from edge to edge of the input: float32 [B, 2, R, R]."""
        batch, _, functions, _ = coefficients.shape
        resolution = len(self._rows)
        # The first product is one large product for all images.
        wide = torch.matmul(coefficients, self._columns, out=self._buffers.empty(batch, 2, functions, resolution))
        return torch.matmul(self._rows, wide, out=self._buffers.empty(batch, 2, resolution, resolution))


def gaussian_weights(coordinates: NDArray[np.float64], grid_size: int, sigma: float) -> NDArray[np.float64]:
    """Compute the Gaussian weights of grid points at coordinates.

    Each row has length 1, so independent noise of std 1 on the grid has std 1 at every coordinate.

    Args:
        coordinates: float64 [N], -1 .. 1.
        grid_size: Number of grid points, evenly spaced in -1 .. 1.
        sigma: Std of the Gaussian, as a fraction of the image's side.

    Returns:
        float64 [N, grid_size].
    """
    distances = (coordinates[:, None] - np.linspace(-1, 1, grid_size)) / (2 * sigma)
    weights = np.exp(-0.5 * distances**2)
    return weights / np.sqrt((weights**2).sum(axis=1, keepdims=True))
