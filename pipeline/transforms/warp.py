"""Affine and elastic warp of each image of a batch, in one interpolation from the raw size to the resolution."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from pipeline.common.buffer_pool import BufferPool
from pipeline.transforms.augmentation import NOISE_RANGE, Augmentation, AugmentationParams, noise_words
from pipeline.transforms.ops.matmul import exact_matmul
from pipeline.transforms.ops.philox import philox_words
from pipeline.transforms.spec import TransformSpec

# Output pixels per chunk and thread: their positions (8 bytes each) then stay in the cache of a core.
_CHUNK_PIXELS = 1 << 18


class Warp:
    """Computes the source position of each output pixel and samples the image there.

    Elastic distortion (Simard et al. 2003, https://doi.org/10.1109/ICDAR.2003.1227801) displaces each pixel by noise
    smoothed with a Gaussian. Here the noise is given on a grid and scaled to the same std at every pixel. Affine and
    elastic positions are then one product of functions of the row and of the column: rows [R, K + 2] @ coefficients
    [K + 2, K + 2] @ columns [K + 2, S], where the last two functions are the coordinate itself and 1.
    """

    def __init__(self, augmentation: Augmentation, spec: TransformSpec, device: torch.device) -> None:
        self._output_size = height, width = spec.input_size
        self._augmentation = augmentation
        self._input_shape = spec.input_size if spec.encoded else spec.upright_size
        self._device = device
        # From (x / 255 - fill_value) / std to (x / 255 - mean) / std.
        fill_value = augmentation.fill_value(spec.mean)
        self._shifts = [(level - mean) / std for level, mean, std in zip(fill_value, spec.mean, spec.std, strict=True)]
        self._padding = "border" if augmentation.fill == "border" else "zeros"
        self._buffers = BufferPool(device)
        self._amplitude = 2 * augmentation.elastic
        self._rows = self._functions(height).to(device)
        self._columns = self._functions(width).T.contiguous().to(device)

    def _functions(self, size: int) -> torch.Tensor:
        """Return the functions of the coordinate at each of `size` pixels along an axis, float32 [size, K + 2]."""
        augmentation = self._augmentation
        coordinates = (np.arange(size, dtype=np.float64) + 0.5) * (2 / size) - 1
        functions = [coordinates[:, None], np.ones((size, 1))]
        if self._amplitude:
            functions.insert(0, gaussian_weights(coordinates, augmentation.noise_grid_size, augmentation.elastic_sigma))
        return torch.from_numpy(np.concatenate(functions, axis=1)).float()

    def op_params(self, params: AugmentationParams) -> dict[str, NDArray]:
        """Compute each image's affine map, float32 [B, 2, 3], and its noise or, for a GPU, the keys of the noise."""
        height, width = self._output_size
        matrices = self._augmentation.affine_matrices(params, self._input_shape, width / height)
        arrays: dict[str, NDArray] = {"affine": matrices.astype(np.float32)}
        if self._amplitude and self._device.type == "cuda":
            arrays["noise_keys"] = params.noise_keys.view(np.int64)
        elif (noise := params.noise) is not None:
            arrays["noise"] = noise
        return arrays

    def __call__(self, pixels: torch.Tensor, params: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Move the pixels of a batch, with linear interpolation.

        Args:
            pixels: float32 [B, C, H, W] on the device, (x / 255 - fill_value) / std.
            params: The arrays of `op_params` on the device; the noise drives the elastic distortion.

        Returns:
            Normalised images, float32 [B, C, R, S].
        """
        coefficients = self._coefficients(params)
        height, width = self._output_size
        batch, channels = pixels.shape[:2]
        output = self._buffers.empty(batch, channels, height, width)
        on_cpu = self._device.type == "cpu"
        step = max(1, _CHUNK_PIXELS * torch.get_num_threads() // (height * width)) if on_cpu else batch
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

    def _coefficients(self, params: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Coefficients of the functions of row and column, float32 [B, 2, K + 2, K + 2]."""
        affine, functions = params["affine"], self._rows.shape[1]
        coefficients = torch.zeros(len(affine), 2, functions, functions, device=self._device)
        if self._amplitude:
            grid_size = functions - 2
            noise = params["noise"] if "noise" in params else elastic_noise(params["noise_keys"], grid_size)
            torch.mul(noise, self._amplitude, out=coefficients[:, :, :-2, :-2])
        coefficients[:, :, -1, -2] = affine[:, :, 0]  # x
        coefficients[:, :, -2, -1] = affine[:, :, 1]  # y
        coefficients[:, :, -1, -1] = affine[:, :, 2]
        return coefficients

    def _positions(self, coefficients: torch.Tensor) -> torch.Tensor:
        """Source (x, y) of each output pixel, -1 .. 1 from edge to edge of the input: float32 [B, 2, R, S]."""
        batch, _, functions, _ = coefficients.shape
        height, width = self._output_size
        # The first product is one large product for all images.
        wide = exact_matmul(coefficients, self._columns, out=self._buffers.empty(batch, 2, functions, width))
        return exact_matmul(self._rows, wide, out=self._buffers.empty(batch, 2, height, width))


def elastic_noise(keys: torch.Tensor, grid_size: int) -> torch.Tensor:
    """Compute `AugmentationParams.noise` from its keys, int64 [B, 3], on their device: float32 [B, 2, K, K]."""
    words = philox_words(keys, noise_words(grid_size))[:, : 2 * grid_size**2]
    levels = ((words >> 41 & (1 << 23) - 1).float() + 0.5) * 2.0**-23
    return ((levels - 0.5) * float(NOISE_RANGE)).view(len(keys), 2, grid_size, grid_size)


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
