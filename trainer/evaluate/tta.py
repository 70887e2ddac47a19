"""Test-time augmentation: the mean probability over an image and slightly moved or resized copies of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

_SHIFT = 1 / 28  # of the side: a pixel of an EMNIST image
_SCALE = 1.06


def mean_logits(model: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor, views: str) -> torch.Tensor:
    """Logits [B, C] in float32: the model's own with views `none`, else the logarithm of the mean probability.

    images: float32 [B, C, R, R]. views: `shifts` takes the image and its shifts by a 28th of the side to the four
    sides, `shifts_scales` also those 6 % larger and smaller. What comes in at the edge repeats the edge. Nothing is
    mirrored or turned, which changes what a character is.
    """
    if views == "none":
        return model(images).float()
    logs = [F.log_softmax(model(view).float(), dim=1) for view in _views(images, views == "shifts_scales")]
    return torch.stack(logs).logsumexp(dim=0) - math.log(len(logs))


def _views(images: torch.Tensor, scales: bool) -> Iterator[torch.Tensor]:
    yield images
    side = images.shape[3]
    step = 2 * max(1, round(_SHIFT * side)) / side  # whole pixels, in units of half the side
    for right, down in ((step, 0.0), (-step, 0.0), (0.0, step), (0.0, -step)):
        yield _moved(images, 1.0, right, down)
    if scales:
        for scale in (1 / _SCALE, _SCALE):
            yield _moved(images, scale, 0.0, 0.0)


def _moved(images: torch.Tensor, scale: float, right: float, down: float) -> torch.Tensor:
    """Images enlarged around their centre and shifted, in units of half their side."""
    lines = [[1 / scale, 0.0, -right], [0.0, 1 / scale, -down]]
    matrix = torch.tensor(lines, dtype=images.dtype, device=images.device).expand(images.shape[0], 2, 3)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    layout = torch.channels_last if images.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    return moved.contiguous(memory_format=layout)
