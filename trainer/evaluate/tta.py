"""Test-time augmentation: the mean probability over an image and slightly shifted or resized copies of it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

_SHIFT = 1 / 28  # of the side: one pixel of an EMNIST image
_SCALE = 1.06


def mean_logits(model: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor, views: str) -> torch.Tensor:
    """Return the logits of a model, or the logarithm of its mean probability over several views.

    Args:
        model: From images to logits [B, C].
        images: float32 [B, channels, R, R].
        views: `none` for the image itself. `shifts` adds four copies, shifted by 1/28 of the side in each direction.
            `shifts_scales` adds two more, resized by 1.06 and 1/1.06. The edge is repeated. There are no flips or
            rotations, which change the meaning of a character.

    Returns:
        float32 [B, C].
    """
    if views == "none":
        return model(images).float()
    side = images.shape[3]
    step = 2 * max(1, round(_SHIFT * side)) / side  # whole pixels, in units of half the side
    changes = [(1.0, step, 0.0), (1.0, -step, 0.0), (1.0, 0.0, step), (1.0, 0.0, -step)]
    if views == "shifts_scales":
        changes += [(1 / _SCALE, 0.0, 0.0), (_SCALE, 0.0, 0.0)]
    logits = [model(images), *(model(_transform(images, *change)) for change in changes)]
    return torch.stack([F.log_softmax(each.float(), dim=1) for each in logits]).logsumexp(dim=0) - math.log(len(logits))


def _transform(images: torch.Tensor, scale: float, right: float, down: float) -> torch.Tensor:
    """Enlarge images around their centre and shift them, in units of half the side."""
    lines = [[1 / scale, 0.0, -right], [0.0, 1 / scale, -down]]
    matrix = torch.tensor(lines, dtype=images.dtype, device=images.device).expand(images.shape[0], 2, 3)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    view = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    layout = torch.channels_last if images.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    return view.contiguous(memory_format=layout)
