"""Preprocessing and augmentation, which both backends share: on raw uint8 images, and on normalized pixels."""

from __future__ import annotations

import numpy as np
import torch

from pipeline.transforms.augmentation import Augmentation, AugmentationParams
from pipeline.transforms.ops.erasing import erase
from pipeline.transforms.ops.morphology import change_stroke_width
from pipeline.transforms.spec import TransformSpec
from pipeline.transforms.warp import Warp


class SharedOps:
    """The operations of a transform besides decoding, orientation, resize and normalization.

    In this order, a backend calls `apply_raw_ops`, normalizes to (x / 255 - fill_value) / std and resizes, and calls
    `apply_color_ops` (before or after the resize) and `apply_warp`. `params` are those of the batch, or None.

    Attributes:
        resizes: Whether the backend has to resize images; `apply_warp` may instead sample them at the resolution.
    """

    def __init__(self, spec: TransformSpec, augmentation: Augmentation, device: torch.device) -> None:
        self._spec = spec
        self._augmentation = augmentation
        self._warp = Warp(augmentation, spec, device) if augmentation.has_warp else None
        self.resizes = spec.needs_resize and not (self._warp and spec.can_warp_raw)

    def apply_raw_ops(self, images: torch.Tensor, params: AugmentationParams | None) -> torch.Tensor:
        """Apply preprocessing, stroke width and erasing, bit-identically on all devices; the input is not changed.

        Args:
            images: uint8 [B, H, W, C], as stored. Returned as they are if there is nothing to do.
            params: Augmentation parameters of the batch.
        """
        augmentation = self._augmentation
        assert (params is not None) == bool(augmentation)
        images = self._spec.preprocessing(images)
        if params is not None and augmentation.stroke:
            amounts = torch.from_numpy(augmentation.stroke_amounts(params)).to(images.device)
            images = change_stroke_width(images, amounts, augmentation.stroke)
        if params is not None and augmentation.erase:
            images = erase(
                images,
                torch.from_numpy(augmentation.erase_boxes(params)).to(images.device),
                augmentation.erase_value,
                on_contour=augmentation.erase_at == "contour",
                transposed=self._spec.transposed,
            )
        return images

    def apply_color_ops(self, pixels: torch.Tensor, params: AugmentationParams | None) -> torch.Tensor:
        """Apply the affine map of each image's colours, without clipping, to normalized float32 [B, C, H, W]."""
        if params is None or not self._augmentation.has_color_jitter:
            return pixels
        batch, channels, height, width = pixels.shape
        maps = self._augmentation.color_matrices(params, channels)
        # Of normalized pixels n, colours are std * n + fill_value.
        std, fill_value = np.array(self._spec.std), np.array(self._augmentation.fill_value(self._spec.mean))
        maps[:, :, channels] += maps[:, :, :channels] @ fill_value - fill_value
        maps[:, :, :channels] *= std
        weights = torch.from_numpy(maps / std[:, None]).float().to(pixels.device)
        flat = torch.baddbmm(
            weights[:, :, channels:], weights[:, :, :channels], pixels.reshape(batch, channels, height * width)
        )
        return flat.view(batch, channels, height, width)

    def apply_warp(self, pixels: torch.Tensor, params: AugmentationParams | None) -> torch.Tensor:
        """Apply the affine and elastic distortion to normalized float32 [B, C, H, W]: (x / 255 - mean) / std."""
        return pixels if params is None or self._warp is None else self._warp(pixels, params)
