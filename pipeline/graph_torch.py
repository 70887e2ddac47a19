"""The torch backend: resizing a small image is two small matrix products, A X A^T."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.buffers import Buffers
from pipeline.graph import GraphSpec
from pipeline.resample import resize_weights
from shards.errors import UserError


class TorchGraph:
    """See `pipeline.graph.Graph`. Orientation is a matter of strides; the normalisation is folded into A."""

    def __init__(self, spec: GraphSpec, device: torch.device) -> None:
        if spec.encoded:
            raise UserError(
                found="pictures of differing sizes, and the torch backend",
                expected="DALI, which decodes them",
                hint="install nvidia-dali-cuda120 (Linux only) and use loader.backend=auto; or pack the pictures at "
                "one size: python -m pipeline.shard ... --size N",
            )
        height, width, _ = spec.image_shape
        if spec.transposed:
            height, width = width, height
        self._device = device
        self._buffers = Buffers()
        self._transposed = spec.transposed
        self._resizes = spec.resizes
        # ((A X A^T) / 255 - mean) / std = (A / (255 std)) (X - 255 mean) A^T, as the rows of A add up to 1.
        scale = 1 / (255 * torch.tensor(spec.std, dtype=torch.float64))
        rows = torch.from_numpy(resize_weights(height, spec.resolution, spec.interpolation))  # [R, H]
        columns = torch.from_numpy(resize_weights(width, spec.resolution, spec.interpolation))  # [R, W]
        # First along the axis that is stored last, for all images in one product; then along the other.
        first, second = (rows, columns) if spec.transposed else (columns, rows)
        self._first = first.T.contiguous().float().to(device)  # [H or W, R]
        self._second = (scale[:, None, None] * second).float().to(device)  # [C, R, W or H]
        self._scale = scale.float().view(-1, 1, 1).to(device)
        self._offset = (255 * torch.tensor(spec.mean, dtype=torch.float64)).float().view(-1, 1, 1).to(device)

    def __call__(self, images: NDArray[np.uint8]) -> torch.Tensor:
        raw = torch.from_numpy(images)
        if self._device.type == "cuda":
            raw = raw.pin_memory().to(self._device, non_blocking=True)
        stored = raw.permute(0, 3, 1, 2)
        if not self._resizes:
            return self._centred(stored.mT if self._transposed else stored).mul_(self._scale)
        pixels = self._centred(stored)
        batch, channels, lines, _ = pixels.shape
        resolution = self._first.shape[1]
        halfway = torch.matmul(pixels, self._first, out=self._empty(batch, channels, lines, resolution))
        output = self._empty(batch, channels, resolution, resolution)
        if self._transposed:
            # (A (X A^T))^T = (X A^T)^T A^T: exchanging rows and columns costs nothing here.
            return torch.matmul(halfway.mT, self._second.mT, out=output)
        return torch.matmul(self._second, halfway, out=output)

    def _centred(self, images: torch.Tensor) -> torch.Tensor:
        """Images uint8 [B, C, H, W] of any strides as contiguous floats, less the mean."""
        if not images.is_contiguous() and images.device.type == "cpu":
            # Moving pixels is cheaper as bytes than as floats.
            images = torch.from_numpy(self._buffers.array(tuple(images.shape))).copy_(images)
        return self._empty(*images.shape).copy_(images).sub_(self._offset)

    def _empty(self, *shape: int) -> torch.Tensor:
        if self._device.type == "cuda":
            return torch.empty(shape, device=self._device)  # whose allocator keeps memory by itself
        return self._buffers.tensor(shape)
