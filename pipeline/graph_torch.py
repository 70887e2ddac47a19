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
    """See `pipeline.graph.Graph`. Orientation is a transposed view; the normalisation is folded into A."""

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
        rows = torch.from_numpy(resize_weights(height, spec.resolution, spec.interpolation))
        columns = torch.from_numpy(resize_weights(width, spec.resolution, spec.interpolation))
        self._scale = scale.float().view(-1, 1, 1).to(device)
        self._rows = (scale[:, None, None] * rows).float().to(device)  # [C, R, H]
        self._columns = columns.T.contiguous().float().to(device)  # [W, R]
        self._offset = (255 * torch.tensor(spec.mean, dtype=torch.float64)).float().view(-1, 1, 1).to(device)

    def __call__(self, images: NDArray[np.uint8]) -> torch.Tensor:
        raw = torch.from_numpy(images)
        if self._device.type == "cuda":
            raw = raw.pin_memory().to(self._device, non_blocking=True)
        upright = raw.permute(0, 3, 2, 1) if self._transposed else raw.permute(0, 3, 1, 2)  # [B, C, H, W]
        if self._transposed and self._device.type == "cpu":
            # Exchanging rows and columns is cheaper in bytes than in floats.
            upright = torch.from_numpy(self._buffers.array(tuple(upright.shape))).copy_(upright)
        pixels = self._empty(*upright.shape).copy_(upright).sub_(self._offset)
        if not self._resizes:
            return pixels.mul_(self._scale)
        batch, channels, _, width = pixels.shape
        resolution = self._columns.shape[1]
        halfway = torch.matmul(self._rows, pixels, out=self._empty(batch, channels, resolution, width))
        return torch.matmul(halfway, self._columns, out=self._empty(batch, channels, resolution, resolution))

    def _empty(self, *shape: int) -> torch.Tensor:
        if self._device.type == "cuda":
            return torch.empty(shape, device=self._device)  # whose allocator keeps memory by itself
        return self._buffers.tensor(shape)
