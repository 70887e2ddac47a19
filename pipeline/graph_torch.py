"""The torch backend: resizing a small image is two small matrix products, A X A^T."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from pipeline.buffers import Buffers
from pipeline.graph import GraphSpec
from pipeline.resample import resize_weights
from shards.errors import UserError


class Folded(NamedTuple):
    """A graph's numbers, float32: rows @ ((X - offset) @ columns) of pixels X [C, H, W] in 0 .. 255, upright; or, where
    nothing is resized, scale * X + shift.

    rows: [C, R, H]. columns: [W, R]. offset, scale, shift: [C, 1, 1].
    """

    rows: torch.Tensor
    columns: torch.Tensor
    offset: torch.Tensor
    scale: torch.Tensor
    shift: torch.Tensor

    @classmethod
    def of(cls, spec: GraphSpec) -> Folded:
        """Raises `UserError` for picture files of differing sizes, which have no one matrix."""
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
        mean, std = (torch.tensor(each, dtype=torch.float64)[:, None, None] for each in (spec.mean, spec.std))
        # ((A X A^T) / 255 - mean) / std = (A / (255 std)) (X - 255 mean) A^T, as the rows of A add up to 1.
        scale = 1 / (255 * std)
        rows = torch.from_numpy(resize_weights(height, spec.resolution, spec.interpolation))  # [R, H]
        columns = torch.from_numpy(resize_weights(width, spec.resolution, spec.interpolation))  # [R, W]
        numbers = (scale * rows, columns.T.contiguous(), 255 * mean, scale, -mean / std)
        return cls(*(each.float() for each in numbers))


class TorchGraph:
    """See `pipeline.graph.Graph`. The normalisation is folded into A."""

    def __init__(self, spec: GraphSpec, device: torch.device) -> None:
        folded = Folded.of(spec)
        self._device = device
        self._buffers = Buffers()
        self._transposed = spec.transposed
        self._resizes = spec.resizes
        self._rows, self._columns = folded.rows.to(device), folded.columns.to(device)
        self._offset = folded.offset.to(device)
        self._shifts_and_scales = list(
            zip(folded.shift.flatten().to(device), folded.scale.flatten().tolist(), strict=True)
        )

    def __call__(self, images: NDArray[np.uint8]) -> torch.Tensor:
        raw = torch.from_numpy(images)
        if self._device.type == "cuda":
            raw = raw.pin_memory().to(self._device, non_blocking=True)
        pixels = self._as_floats(self._upright(raw))
        if not self._resizes:
            for channel, (shift, scale) in enumerate(self._shifts_and_scales):
                plane = pixels[:, channel]
                torch.add(shift, plane, alpha=scale, out=plane)  # in one pass over the memory
            return pixels
        pixels.sub_(self._offset)
        batch, channels, height, _ = pixels.shape
        resolution = self._columns.shape[1]
        # X A^T is one large product for all images together; then A from the left, image by image.
        wide = torch.matmul(pixels, self._columns, out=self._empty(batch, channels, height, resolution))
        return torch.matmul(self._rows, wide, out=self._empty(batch, channels, resolution, resolution))

    def _upright(self, raw: torch.Tensor) -> torch.Tensor:
        """Images uint8 [B, H, W, C] as they lie at rest as uint8 [B, C, H, W] of any strides, orientation fixed."""
        batch, height, width, channels = raw.shape
        if self._transposed and channels == 1 and self._device.type == "cpu":
            # H x W channels that lie last, shuffled in H groups, are rows and columns exchanged: vectorised, and
            # four times as fast as copying through strides.
            pixels = height * width
            stored = raw.as_strided((batch, pixels, 1, 1), (pixels, 1, pixels, pixels))
            return F.channel_shuffle(stored, height).view(batch, 1, width, height)
        planes = raw.permute(0, 3, 1, 2)
        return planes.mT if self._transposed else planes

    def _as_floats(self, images: torch.Tensor) -> torch.Tensor:
        """Images uint8 [B, C, H, W] of any strides as contiguous float32."""
        if not images.is_contiguous() and images.device.type == "cpu":
            # Moving pixels is cheaper as bytes than as floats.
            images = torch.from_numpy(self._buffers.array(tuple(images.shape))).copy_(images)
        return self._empty(*images.shape).copy_(images)

    def _empty(self, *shape: int) -> torch.Tensor:
        if self._device.type == "cuda":
            return torch.empty(shape, device=self._device)  # whose allocator keeps memory by itself
        return self._buffers.tensor(shape)
