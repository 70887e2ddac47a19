"""A variant of the DALI backend that resizes 32 images as the channels of one, which DALI prepares once.

DALI computes sizes and tables of a resize on the host for each frame. The device check measures whether fewer and wider
frames are faster; `pipeline.transforms.dali_backend` then takes the faster one.
"""

from __future__ import annotations

import numpy as np
import nvidia.dali.fn as fn
import nvidia.dali.types as types
import torch
from numpy.typing import NDArray

from pipeline.transforms.augmentation import AugmentationParams
from pipeline.transforms.dali_backend import DaliTransform
from pipeline.transforms.shared_ops import OpParams

_PACK = 32


class ImageChannelsTransform(DaliTransform):
    """The `Transform` for raw images of one size that are resized."""

    _layout = "HWC"

    def __call__(
        self, images: NDArray[np.uint8] | torch.Tensor, params: AugmentationParams | OpParams | None = None
    ) -> torch.Tensor:
        raw, params = self._ops.to_device(images, params)
        prepared = self._ops.apply_raw_ops(raw, params)
        count, height, width, channels = prepared.shape
        padded = torch.cat([prepared, prepared.new_zeros(-count % _PACK, height, width, channels)])
        packs = padded.view(-1, _PACK, height, width, channels).permute(0, 2, 3, 1, 4).flatten(3).contiguous()
        pixels = self._run(images=packs if packs.is_cuda else packs.numpy())  # [packs, 32 C, R, R]
        resized = pixels.view(-1, channels, *pixels.shape[2:])[:count]
        return self._ops.apply_warp(self._ops.apply_color_ops(resized, params), params)

    def _define(self):
        on_cpu = self._device.type == "cpu"
        images = fn.external_source(
            name="images",
            device="cpu" if on_cpu else "gpu",
            batch=True,
            no_copy=on_cpu,
            layout=self._layout,
            dtype=types.UINT8,
            ndim=3,
        )
        if self._spec.transposed:
            images = fn.transpose(images, perm=[1, 0, 2], transpose_layout=False)
        return fn.crop_mirror_normalize(
            self._resize(images, *self._spec.upright_size),
            dtype=types.FLOAT,
            output_layout="CHW",
            mean=[255 * level for level in self._fill_value] * _PACK,
            std=[255 * std for std in self._spec.std] * _PACK,
        )
