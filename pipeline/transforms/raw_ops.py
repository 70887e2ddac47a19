"""What is done to raw images before either backend: preparation, stroke thickness and erasing, all on bytes."""

from __future__ import annotations

import torch

from pipeline.transforms.augmentation import Augmentation, AugmentationParams
from pipeline.transforms.ops.erasing import erase
from pipeline.transforms.ops.morphology import change_stroke_width
from pipeline.transforms.spec import TransformSpec


class RawOps:
    """uint8 [B, H, W, C] as stored, to the same; on any device, and the same on each to the bit."""

    def __init__(self, spec: TransformSpec, augmentation: Augmentation) -> None:
        self._preprocessing = spec.preprocessing
        self._augmentation = augmentation
        self._transposed = spec.transposed

    def __call__(self, images: torch.Tensor, params: AugmentationParams | None) -> torch.Tensor:
        """The images themselves where there is nothing to do; they are not changed."""
        images = self._preprocessing(images)
        if params is None:
            return images
        changes = self._augmentation
        if changes.stroke:
            amounts = torch.from_numpy(changes.stroke_amounts(params)).to(images.device)
            images = change_stroke_width(images, amounts, changes.stroke)
        if changes.erase:
            images = erase(
                images,
                torch.from_numpy(changes.erase_boxes(params)).to(images.device),
                changes.erase_value,
                on_contour=changes.erase_at == "contour",
                transposed=self._transposed,
            )
        return images
