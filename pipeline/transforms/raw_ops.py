"""Operations on raw uint8 images, before either backend: preprocessing, stroke width and erasing."""

from __future__ import annotations

import torch

from pipeline.transforms.augmentation import Augmentation, AugmentationParams
from pipeline.transforms.ops.erasing import erase
from pipeline.transforms.ops.morphology import change_stroke_width
from pipeline.transforms.spec import TransformSpec


class RawOps:
    """Applies the operations on uint8 images; results are bit-identical on all devices."""

    def __init__(self, spec: TransformSpec, augmentation: Augmentation) -> None:
        self._preprocessing = spec.preprocessing
        self._augmentation = augmentation
        self._transposed = spec.transposed

    def __call__(self, images: torch.Tensor, params: AugmentationParams | None) -> torch.Tensor:
        """Apply the operations to a batch; the input is not changed.

        Args:
            images: uint8 [B, H, W, C], as stored. Returned as they are if there is nothing to do.
            params: Augmentation parameters of the batch; None without augmentation.
        """
        images = self._preprocessing(images)
        if params is None:
            return images
        augmentation = self._augmentation
        if augmentation.stroke:
            amounts = torch.from_numpy(augmentation.stroke_amounts(params)).to(images.device)
            images = change_stroke_width(images, amounts, augmentation.stroke)
        if augmentation.erase:
            images = erase(
                images,
                torch.from_numpy(augmentation.erase_boxes(params)).to(images.device),
                augmentation.erase_value,
                on_contour=augmentation.erase_at == "contour",
                transposed=self._transposed,
            )
        return images
