"""Torch backend: the resize of a small image is two small matrix products, A X A^T."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from pipeline.common.buffer_pool import BufferPool
from pipeline.transforms.augmentation import NO_AUGMENTATION, Augmentation, AugmentationParams
from pipeline.transforms.ops.matmul import exact_matmul
from pipeline.transforms.ops.resize import resize_weights
from pipeline.transforms.shared_ops import OpParams, SharedOps
from pipeline.transforms.spec import TransformSpec
from shards.errors import UserError

# Of bytes, torch vectorizes channel_shuffle for AVX-512 only.
_REORDERS_FLOATS = torch.backends.cpu.get_cpu_capability() == "AVX2"
# Of model input. Of 1, 2, 4 and 8 MB the fastest for batches of 64 to 256 images at 28 pixels (docs/log.md).
_MAX_FUSED_BYTES = 2 << 20


class TorchTransform:
    """The `Transform` for raw images of one size, on any device."""

    def __init__(self, spec: TransformSpec, device: torch.device, augmentation: Augmentation = NO_AUGMENTATION) -> None:
        if spec.encoded:
            raise UserError(
                found="images of different sizes and the torch backend",
                expected="the DALI backend, which decodes image files",
                hint="use loader.backend=auto, which needs nvidia-dali-cuda120 (Linux only); or pack the images at one "
                "size: python -m pipeline.shard ... --size N",
            )
        height, width = spec.upright_size
        self._size = input_height, input_width = spec.input_size
        self.max_fused_batch = _MAX_FUSED_BYTES // (4 * spec.image_shape[2] * input_height * input_width)
        self._device = device
        self._buffers = BufferPool(device)
        self._transposed = spec.transposed
        self._ops = SharedOps(spec, augmentation, device)
        self.op_params = self._ops.op_params
        rows = resize_weights(height, input_height, spec.interpolation)  # [R, H]
        columns = resize_weights(width, input_width, spec.interpolation)  # [S, W]
        first, second = (rows, columns) if spec.transposed else (columns, rows)  # in the order of the products
        self._first = torch.from_numpy(first.T.copy()).float().to(device)
        self._second = torch.from_numpy(second.T.copy() if spec.transposed else second).float().to(device)
        # (X / 255 - fill_value) / std = X / (255 std) - fill_value / std; before the resize, as the rows of A sum to 1.
        std = np.array(spec.std)
        shifts = torch.from_numpy(-np.array(augmentation.fill_value(spec.mean)) / std).float().to(device)
        self._shifts_and_scales = list(zip(shifts, (1 / (255 * std)).tolist(), strict=True))

    def __call__(
        self, images: NDArray[np.uint8] | torch.Tensor, params: AugmentationParams | OpParams | None = None
    ) -> torch.Tensor:
        raw, params = self._ops.to_device(images, params)
        raw = self._ops.apply_raw_ops(raw, params)
        planes = raw.permute(0, 3, 1, 2)
        pixels = self._as_floats(planes) if self._ops.resizes else self._upright(planes)
        for channel, (shift, scale) in enumerate(self._shifts_and_scales):
            plane = pixels[:, channel]
            torch.add(shift, plane, alpha=scale, out=plane)  # one pass over the memory
        pixels = self._ops.apply_color_ops(pixels, params)
        return self._ops.apply_warp(self._resized(pixels) if self._ops.resizes else pixels, params)

    def _resized(self, pixels: torch.Tensor) -> torch.Tensor:
        """Resize images [B, C, H, W] as stored to upright [B, C, R, S]."""
        batch, channels, height, _ = pixels.shape
        # One large product for all images, then one for each channel of each image.
        half = exact_matmul(pixels, self._first, out=self._buffers.empty(batch, channels, height, self._first.shape[1]))
        half = half.flatten(0, 1)
        factor = self._second.expand(batch * channels, *self._second.shape)
        # For transposed images the second product uses the transpose of the first result, which is cheaper than a copy
        # of the pixels.
        factors = (half.mT, factor) if self._transposed else (factor, half)
        resized = self._buffers.empty(batch, channels, *self._size)
        exact_matmul(*factors, out=resized.flatten(0, 1))
        return resized

    def _upright(self, images: torch.Tensor) -> torch.Tensor:
        """Convert stored images uint8 [B, C, H, W] of any strides to upright contiguous float32."""
        if not self._transposed:
            return self._as_floats(images)
        if images.shape[1] > 1 or self._device.type != "cpu":
            return self._as_floats(images.mT)
        if _REORDERS_FLOATS:
            return _exchange_axes(self._as_floats(images))
        return self._as_floats(_exchange_axes(images))

    def _as_floats(self, images: torch.Tensor) -> torch.Tensor:
        """Convert images uint8 [B, C, H, W] of any strides to contiguous float32."""
        if not images.is_contiguous() and images.device.type == "cpu":
            # Reordering bytes is cheaper than reordering floats.
            images = torch.from_numpy(self._buffers.array(tuple(images.shape))).copy_(images)
        return self._buffers.empty(*images.shape).copy_(images)


def _exchange_axes(images: torch.Tensor) -> torch.Tensor:
    """Exchange rows and columns of images [B, 1, H, W] of any strides on the CPU.

    It is a channel_shuffle of H x W channels in H groups. If torch vectorizes it, it is about three times as fast as a
    strided copy.
    """
    batch, _, height, width = images.shape
    pixels = height * width
    stored = images.contiguous().as_strided((batch, pixels, 1, 1), (pixels, 1, pixels, pixels))
    return F.channel_shuffle(stored, height).view(batch, 1, width, height)
