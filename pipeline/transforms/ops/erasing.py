"""Hiding a part of an image: random erasing, or a cutout on the ink's contour."""

from __future__ import annotations

import torch

from pipeline.transforms.ops.foreground import contour_mask, foreground_mask


def erase(images: torch.Tensor, boxes: torch.Tensor, value: int, *, on_contour: bool, transposed: bool) -> torch.Tensor:
    """Boxes of one value in uint8 images [B, H, W, C] as stored; the input is not changed.

    boxes: float64 [B, 4] of `Augmentation.boxes`. The box lies anywhere within the image (Zhong et al. 2017,
    https://arxiv.org/abs/1708.04896), or around a pixel of the ink's contour (where there is ink), clipped at the
    edges, so that it always hides a piece of stroke. transposed: rows and columns are exchanged in the images.
    """
    _, height, width, _ = images.shape
    down, across, share_down, share_across = boxes.T
    if transposed:
        down, across, share_down, share_across = across, down, share_across, share_down
    tall, wide = (share_down * height).round(), (share_across * width).round()
    top = (down * (height - tall + 1)).floor()
    left = (across * (width - wide + 1)).floor()
    if on_contour:
        row, column, found = _chosen(contour_mask(foreground_mask(images)), boxes[:, 0])
        top = torch.where(found, row - (tall / 2).floor(), top)
        left = torch.where(found, column - (wide / 2).floor(), left)
    mask = _between(top, tall, height)[:, :, None] & _between(left, wide, width)[:, None, :]
    return images.masked_fill(mask[..., None], value)


def _chosen(edge: torch.Tensor, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Row, column and existence, each [B], of the pixel of bool [B, H, W] that a number 0 .. 1 takes out of them."""
    so_far = edge.flatten(1).cumsum(dim=1)
    count = so_far[:, -1]
    turn = (numbers * count).floor().long()
    place = (so_far > turn[:, None]).int().argmax(dim=1)
    width = edge.shape[2]
    return (place // width).double(), (place % width).double(), count > 0


def _between(first: torch.Tensor, length: torch.Tensor, size: int) -> torch.Tensor:
    """bool [B, size]: which places are at least `first` and before `first` + `length`."""
    places = torch.arange(size, device=first.device)
    return (places >= first[:, None]) & (places < (first + length)[:, None])
