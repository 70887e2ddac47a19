"""Test-time augmentation: the mean probability over an image and shifted, mirrored or resized copies of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from trainer.models.ensemble import Ensemble

VIEWS = {"none": 1, "flip": 2, "shifts": 5, "shifts_flip": 10, "shifts_scales": 7}
"""Number of views by `trainer.test_time_augmentation`."""
_SHIFT = 1 / 28  # of the side: one pixel of an EMNIST image
_SCALE = 1.06


def mean_logits(model: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor, views: str) -> torch.Tensor:
    """Return the logits of a model, or the logarithm of its mean probability over several views.

    Args:
        model: From images to logits [B, C].
        images: float32 [B, channels, H, W].
        views: `none` is the image itself, `flip` the image and its mirror image. `shifts` is the image and four copies,
            shifted by 1/28 of the side in each direction. `shifts_flip` is these five and their mirror images,
            `shifts_scales` these five and two copies, resized by 1.06 and 1/1.06. The edge is repeated. Flips do not
            suit characters: they change the class.

    Returns:
        float32 [B, C].
    """
    if isinstance(model, Ensemble):  # offsets and temperature of a network are fitted to the mean over the views
        return model.combine([mean_logits(member, images, views) for member in model.members])
    if views == "none":
        return model(images).float()
    logits = [F.log_softmax(model(view).float(), dim=1) for view in _copies(images, views)]
    return torch.stack(logits).logsumexp(dim=0) - math.log(len(logits))


def _copies(images: torch.Tensor, views: str) -> Iterator[torch.Tensor]:
    """Yield the images and copies of them, in the memory format of the images."""
    layout = torch.channels_last if images.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    for view in _moved(images, views):
        yield view.contiguous(memory_format=layout)
        if views in ("flip", "shifts_flip"):
            yield view.flip(-1).contiguous(memory_format=layout)


def _moved(images: torch.Tensor, views: str) -> Iterator[torch.Tensor]:
    """Yield the images, and shifted and resized copies of them."""
    yield images
    if views == "flip":
        return
    height, width = images.shape[2:]
    down, right = (max(1, round(_SHIFT * side)) for side in (height, width))  # whole pixels
    padded = F.pad(images, (right, right, down, down), mode="replicate")
    for top, left in ((down, 0), (down, 2 * right), (0, right), (2 * down, right)):
        yield padded[:, :, top : top + height, left : left + width]
    for scale in (1 / _SCALE, _SCALE) if views == "shifts_scales" else ():
        # A matrix for affine_grid would be copied to the device, for which the host waits.
        y, x = (_centres(side, images) / scale for side in (height, width))
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).expand(images.shape[0], -1, -1, -1)
        yield F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _centres(side: int, like: torch.Tensor) -> torch.Tensor:
    """Positions of the pixels along an axis, -1 .. 1 from edge to edge."""
    return torch.linspace(1 / side - 1, 1 - 1 / side, side, dtype=like.dtype, device=like.device)
