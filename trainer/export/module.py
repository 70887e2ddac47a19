"""The exported module: raw images to probabilities, with pre- and postprocessing."""

from __future__ import annotations

import torch
from torch import nn

from pipeline.transforms.export_module import TransformModule
from pipeline.transforms.spec import TransformSpec
from trainer.evaluate.logit_adjustment import ProbabilityHead
from trainer.evaluate.tta import mean_logits


class InferenceModule(nn.Module):
    """Orientation, resize and normalization, then the model, then post-hoc logit adjustment and temperature."""

    def __init__(self, spec: TransformSpec, model: nn.Module, views: str, head: ProbabilityHead) -> None:
        """Combine the parts.

        Args:
            spec: Transform of raw images.
            model: From float32 [N, C, R, R] to logits. Its adaptive max pooling is replaced in place.
            views: Test-time augmentation, see `mean_logits`.
            head: From logits to probabilities.
        """
        super().__init__()
        self.preprocessing = TransformModule(spec)
        self.model = _replace_adaptive_pooling(model)
        self._views = views
        self.head = head

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Classify raw images uint8 [N, H, W, C] as stored on disk.

        Returns:
            Probabilities and logits, both [N, classes].
        """
        logits = mean_logits(self.model, self.preprocessing(images), self._views)
        return self.head(logits), logits


class _AdaptiveMaxPool(nn.Module):
    """`nn.AdaptiveMaxPool2d(size)` as maxima over slices, which every format supports."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size = size

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self._pool_last(self._pool_last(images).mT).mT

    def _pool_last(self, images: torch.Tensor) -> torch.Tensor:
        side, size = images.shape[3], self._size
        windows = [images[..., index * side // size : -(-(index + 1) * side // size)] for index in range(size)]
        return torch.stack([window.amax(dim=3) for window in windows], dim=3)


def _replace_adaptive_pooling(module: nn.Module) -> nn.Module:
    for name, child in module.named_children():
        if isinstance(child, nn.AdaptiveMaxPool2d):
            assert isinstance(child.output_size, int)
            setattr(module, name, _AdaptiveMaxPool(child.output_size))
        else:
            _replace_adaptive_pooling(child)
    return module
