"""Grey morphology of raw images, on any device: what DALI offers on GPUs only.

The structuring element is a pixel with its four neighbours, so that repeating it makes diamonds; beyond the border
nothing is taken. All images are uint8 [B, H, W, C] and are not changed.
"""

from __future__ import annotations

import math

import torch

_BITS = 7  # of the weight of a step, whose product with a difference of pixels fits into 16


def dilate(images: torch.Tensor) -> torch.Tensor:
    """The largest of each pixel and its four neighbours."""
    largest = images.clone()
    for axis in (1, 2):
        later, earlier = (slice(None),) * axis + (slice(1, None),), (slice(None),) * axis + (slice(None, -1),)
        for here, neighbour in ((later, earlier), (earlier, later)):
            torch.maximum(largest[here], images[neighbour], out=largest[here])
    return largest


def morphological_opening(images: torch.Tensor, radius: int) -> torch.Tensor:
    """Erosion by a diamond of this radius in pixels, then dilation: bright specks that do not hold it vanish."""
    inverted = ~images
    for _ in range(radius):
        inverted = dilate(inverted)
    images = ~inverted
    for _ in range(radius):
        images = dilate(images)
    return images


def change_stroke_width(images: torch.Tensor, amounts: torch.Tensor, most: float) -> torch.Tensor:
    """Bright strokes made thicker (dilation) or thinner (erosion), each image by its own amount.

    amounts: float [B] in -most .. most, pixels on each side of a stroke. Whole pixels are steps of dilation; a part of
    a pixel is that share of the way to the next one.
    """
    # Erosion is dilation of the inverted image: the images that are to be thinner go through it inverted.
    mask = (amounts < 0).to(torch.uint8).mul(255).view(-1, 1, 1, 1)
    pixels = images ^ mask
    for step in range(math.ceil(most)):
        share = (amounts.abs() - step).clamp(0, 1).mul(1 << _BITS).round().to(torch.int16).view(-1, 1, 1, 1)
        difference = (dilate(pixels) - pixels).to(torch.int16)
        rounded = difference.mul_(share).add_(1 << _BITS - 1).bitwise_right_shift_(_BITS)
        pixels = pixels + rounded.to(torch.uint8)
    return pixels ^ mask
