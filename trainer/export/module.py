"""The model in use: raw images in, probabilities out, with everything between them in one module."""

from __future__ import annotations

import torch
from torch import nn

from pipeline.transforms.export_module import TransformModule
from pipeline.transforms.spec import TransformSpec
from trainer.evaluate.logit_adjustment import ProbabilityHead
from trainer.evaluate.tta import mean_logits


class InferenceModule(nn.Module):
    """Orientation, resize and normalisation, then the model, then its decision and temperature."""

    def __init__(self, spec: TransformSpec, model: nn.Module, views: str, decided: ProbabilityHead) -> None:
        """model: from float32 [N, C, R, R] to logits; changed so that it can be exported. views: see `mean_logits`."""
        super().__init__()
        self.preprocessing = TransformModule(spec)
        self.model = _exportable(model)
        self._views = views
        self.decided = decided

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """images: uint8 [N, H, W, C] as they lie at rest. Returns probabilities [N, classes], by the
        decision, and logits [N, classes], before it."""
        logits = mean_logits(self.model, self.preprocessing(images), self._views)
        return self.decided(logits), logits


class _MaxPoolTo(nn.Module):
    """`nn.AdaptiveMaxPool2d(size)` of plain maxima, which every format knows; the image's side is fixed in a graph."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size = size

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self._along_last(self._along_last(images).mT).mT

    def _along_last(self, images: torch.Tensor) -> torch.Tensor:
        side, size = images.shape[3], self._size
        windows = [images[..., place * side // size : -(-(place + 1) * side // size)] for place in range(size)]
        return torch.stack([window.amax(dim=3) for window in windows], dim=3)


def _exportable(module: nn.Module) -> nn.Module:
    for name, child in module.named_children():
        replaced = isinstance(child, nn.AdaptiveMaxPool2d)
        setattr(module, name, _MaxPoolTo(child.output_size) if replaced else _exportable(child))
    return module
