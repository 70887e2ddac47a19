"""Preprocessing and augmentation, which both backends share: on raw uint8 images, and on normalized pixels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.common.device import to_device
from pipeline.transforms.augmentation import Augmentation, AugmentationParams
from pipeline.transforms.ops.auto_augment import AutoAugment
from pipeline.transforms.ops.erasing import erase
from pipeline.transforms.ops.matmul import without_tf32
from pipeline.transforms.ops.morphology import change_stroke_width
from pipeline.transforms.ops.resized_crop import ResizedCrop
from pipeline.transforms.spec import TransformSpec
from pipeline.transforms.warp import Warp

OpParams: TypeAlias = Mapping[str, torch.Tensor]


class SharedOps:
    """The operations of a transform besides decoding, orientation, resize and normalization.

    In this order, a backend calls `apply_raw_ops`, normalizes to (x / 255 - fill_value) / std and resizes, and calls
    `apply_color_ops` (before or after the resize) and `apply_warp`. `params` are those of `op_params`, on the device.

    Attributes:
        resizes: Whether the backend has to resize images; `apply_warp` may instead sample them at the resolution.
        quantizes: Whether `apply_raw_ops` needs the resized pixels of image files as bytes.
    """

    def __init__(self, spec: TransformSpec, augmentation: Augmentation, device: torch.device) -> None:
        self._spec = spec
        self._augmentation = augmentation
        self._device = device
        self._warp = Warp(augmentation, spec, device) if augmentation.has_warp else None
        crops = augmentation.random_resized_crop is not None and not spec.encoded
        self._crop = ResizedCrop(spec.input_size, spec.interpolation, device) if crops else None
        shape, transposed = (spec.input_size, False) if spec.encoded else (spec.upright_size, spec.transposed)
        self._policy = AutoAugment(augmentation, shape, transposed) if augmentation.auto_augment_rounds else None
        warps_raw = self._warp and spec.can_warp_raw(augmentation.fill == "border")
        self.resizes = spec.needs_resize and not self._crop and not warps_raw
        self.quantizes = spec.encoded and self._policy is not None

    def op_params(self, params: AugmentationParams | None) -> dict[str, NDArray]:
        """Compute what the operations need of each image on the host; see `Transform.op_params`."""
        augmentation = self._augmentation
        assert (params is not None) == bool(augmentation)
        if params is None:
            return {}
        arrays: dict[str, NDArray] = {}
        if augmentation.stroke:
            arrays["stroke_amounts"] = augmentation.stroke_amounts(params)
        if augmentation.erase:
            arrays["erase_boxes"] = augmentation.erase_boxes(params)
        if augmentation.has_color_jitter:
            arrays["color_maps"] = self._color_maps(params)
        if self._policy:
            arrays |= self._policy.op_params(params)
        if self._crop:
            sizes = np.tile(self._spec.upright_size, (len(params), 1))
            arrays["crop_boxes"] = augmentation.crop_boxes(params, sizes).astype(np.float32)
        return arrays | self._warp.op_params(params) if self._warp else arrays

    def to_device(
        self, images: NDArray[np.uint8] | torch.Tensor, params: AugmentationParams | OpParams | None
    ) -> tuple[torch.Tensor, OpParams]:
        """Move images and parameters to the device, unless they are there."""
        if not isinstance(params, Mapping):
            params = {name: to_device(array, self._device) for name, array in self.op_params(params).items()}
        return images if isinstance(images, torch.Tensor) else to_device(images, self._device), params

    def apply_raw_ops(self, images: torch.Tensor, params: OpParams) -> torch.Tensor:
        """Apply preprocessing, TrivialAugment or RandAugment, stroke width and erasing; the input is not changed.

        The result is bit-identical on all devices without `crop_to_foreground`. Its values may differ by one, because
        the order of sums in a product of matrices is that of the library. Later operations may enlarge the difference.

        Args:
            images: uint8 [B, H, W, C], as stored. Returned as they are if there is nothing to do.
            params: Parameters of the batch.
        """
        augmentation = self._augmentation
        images = self._spec.preprocessing(images)
        if self._policy:
            images = self._policy(images, params)
        if "stroke_amounts" in params:
            images = change_stroke_width(images, params["stroke_amounts"], augmentation.stroke)
        if "erase_boxes" in params:
            images = erase(
                images,
                params["erase_boxes"],
                augmentation.erase_value,
                on_contour=augmentation.erase_at == "contour",
                transposed=self._spec.transposed,
            )
        return images

    def _color_maps(self, params: AugmentationParams) -> NDArray[np.float32]:
        """Affine map of the normalized colours of each image, [B, C, C + 1]."""
        channels = self._spec.image_shape[2]
        maps = self._augmentation.color_matrices(params, channels)
        # Of normalized pixels n, colours are std * n + fill_value.
        std, fill_value = np.array(self._spec.std), np.array(self._augmentation.fill_value(self._spec.mean))
        maps[:, :, channels] += maps[:, :, :channels] @ fill_value - fill_value
        maps[:, :, :channels] *= std
        return (maps / std[:, None]).astype(np.float32)

    def apply_color_ops(self, pixels: torch.Tensor, params: OpParams) -> torch.Tensor:
        """Apply the affine map of each image's colours, without clipping, to normalized float32 [B, C, H, W]."""
        if "color_maps" not in params:
            return pixels
        maps, channels = params["color_maps"], pixels.shape[1]
        flat = without_tf32(torch.baddbmm, maps[:, :, channels:], maps[:, :, :channels], pixels.flatten(2))
        return flat.view(pixels.shape)

    def apply_warp(self, pixels: torch.Tensor, params: OpParams) -> torch.Tensor:
        """Apply random-resized crop, affine and elastic distortion to normalized float32 [B, C, H, W].

        Returns:
            (x / 255 - mean) / std.
        """
        if self._crop:
            pixels = self._crop(pixels, params["crop_boxes"])
        return self._warp(pixels, params) if self._warp else pixels
