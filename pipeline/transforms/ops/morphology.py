"""Grey morphology of raw images on any device (DALI has it on GPUs only).

The structuring element is a pixel with its four neighbours; repeated, it becomes a diamond. Pixels outside the image
are ignored. All functions take and return uint8 [B, H, W, C] and do not change their input.
"""

from __future__ import annotations

import math

import torch

_BITS = 7  # of the fixed-point weight of a dilation; its product with a difference of pixels fits into int16


def dilate(images: torch.Tensor, radius: int = 1) -> torch.Tensor:
    """Return the maximum over a diamond of this radius in pixels: with 1, of each pixel and its four neighbours.

    Masks, bool [B, H, W], are accepted, too.
    """
    for _ in range(radius):
        largest = images.clone()
        for axis in (1, 2):
            later, earlier = (slice(None),) * axis + (slice(1, None),), (slice(None),) * axis + (slice(None, -1),)
            for here, neighbour in ((later, earlier), (earlier, later)):
                torch.maximum(largest[here], images[neighbour], out=largest[here])
        images = largest
    return images


def morphological_opening(images: torch.Tensor, radius: int) -> torch.Tensor:
    """Erode and then dilate by a diamond of this radius in pixels; bright specks smaller than it disappear."""
    return dilate(~dilate(~images, radius), radius)


def change_stroke_width(images: torch.Tensor, amounts: torch.Tensor, max_amount: float) -> torch.Tensor:
    """Make the bright strokes of each image thicker (dilation) or thinner (erosion).

    Args:
        images: uint8 [B, H, W, C].
        amounts: float [B], pixels on each side of a stroke, within -max_amount .. max_amount. The integer part is a
            number of dilations; the fractional part interpolates linearly to the next one.
        max_amount: Largest absolute amount.
    """
    # Erosion is dilation of the inverted image, so images that become thinner are inverted before and after.
    mask = (amounts < 0).to(torch.uint8).mul(255).view(-1, 1, 1, 1)
    pixels = images ^ mask
    for step in range(math.ceil(max_amount)):
        weight = (amounts.abs() - step).clamp(0, 1).mul(1 << _BITS).round().to(torch.int16).view(-1, 1, 1, 1)
        difference = (dilate(pixels) - pixels).to(torch.int16)
        rounded = difference.mul_(weight).add_(1 << _BITS - 1).bitwise_right_shift_(_BITS)
        pixels = pixels + rounded.to(torch.uint8)
    return pixels ^ mask
