"""Crop and resize of each image of a batch by its own box, in two products of small matrices, on any device."""

from __future__ import annotations

import numpy as np
import torch

from pipeline.common.buffer_pool import BufferPool
from pipeline.transforms.ops.matmul import exact_matmul
from pipeline.transforms.ops.resize import TABLE_STEPS, kernel_table, nearest_nudge


class ResizedCrop:
    """Crops a box of each image and resizes it with the kernels of `resize_weights`.

    Pixels outside of the box have no weight, as in Pillow and torchvision (`antialias=True`).

    Args:
        size: Height and width of the output in pixels.
        interpolation: `linear`, `cubic`, `lanczos` or `nearest`.
        device: Device of the images.
    """

    def __init__(self, size: tuple[int, int], interpolation: str, device: torch.device) -> None:
        self._is_nearest = interpolation == "nearest"
        self._buffers = BufferPool(device)
        table = np.zeros(1) if self._is_nearest else kernel_table(interpolation)
        self._table = torch.from_numpy(table).float().to(device)
        self._fractions = [((torch.arange(side) + 0.5) / side).to(device) for side in size]

    def __call__(self, pixels: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        """Return float32 [B, C, R, S] of float32 [B, C, H, W] and boxes float32 [B, 4]: top, left, height, width."""
        batch, channels, height, width = pixels.shape
        rows, columns = (
            self._weights(boxes[:, axis], boxes[:, axis + 2], size, fractions)[:, None].expand(-1, channels, -1, -1)
            for axis, (size, fractions) in enumerate(zip((height, width), self._fractions, strict=True))
        )
        half = self._buffers.empty(batch, channels, height, columns.shape[2])
        exact_matmul(pixels, columns.mT, out=half)
        return exact_matmul(rows, half, out=self._buffers.empty(batch, channels, rows.shape[2], columns.shape[2]))

    def _weights(self, start: torch.Tensor, length: torch.Tensor, size: int, fractions: torch.Tensor) -> torch.Tensor:
        """Weights float32 [B, R, size] that resize each section of an axis to R pixels."""
        taps = torch.arange(size, device=start.device)
        start, length = start[:, None], length[:, None]
        positions = start + fractions * length  # [B, R]
        if self._is_nearest:
            return ((positions + nearest_nudge(len(fractions))).floor()[:, :, None] == taps).float()
        widening = (length / len(fractions)).clamp_min(1)[:, :, None]
        distances = ((taps + 0.5 - positions[:, :, None]) / widening).abs_().mul_(TABLE_STEPS)
        distances.clamp_(max=len(self._table) - 2)
        node = distances.int()
        # On a CPU, index_select takes a fraction of the time of indexing.
        low, high = (table.index_select(0, node.view(-1)).view(node.shape) for table in (self._table, self._table[1:]))
        weights = torch.lerp(low, high, distances - node)
        weights *= ((taps >= start) & (taps < start + length))[:, None]
        return weights / weights.sum(dim=2, keepdim=True)
