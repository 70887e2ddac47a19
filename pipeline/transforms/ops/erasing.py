"""Random erasing of a box, anywhere in the image or on the contour of the foreground."""

from __future__ import annotations

import torch

from pipeline.transforms.ops.foreground import contour_mask, foreground_mask


def erase(images: torch.Tensor, boxes: torch.Tensor, value: int, *, on_contour: bool, transposed: bool) -> torch.Tensor:
    """Fill one box of each image with a value. The input is not changed.

    Random erasing of Zhong et al. 2017, https://arxiv.org/abs/1708.04896.

    Args:
        images: uint8 [B, H, W, C], as stored.
        boxes: float64 [B, 4], as returned by `Augmentation.erase_boxes`.
        value: Fill value, 0 .. 255.
        on_contour: Whether the box is centred on a pixel of the contour and clipped at the image's edges, so that it
            always covers part of a stroke. An image without foreground gets a box anywhere.
        transposed: Whether rows and columns of the stored images are exchanged.
    """
    _, height, width, _ = images.shape
    y, x, box_height, box_width = boxes.T
    if transposed:
        y, x, box_height, box_width = x, y, box_width, box_height
    box_height, box_width = (box_height * height).round(), (box_width * width).round()
    top = (y * (height - box_height + 1)).floor()
    left = (x * (width - box_width + 1)).floor()
    if on_contour:
        row, column, has_contour = _pick_pixel(contour_mask(foreground_mask(images)), boxes[:, 0])
        top = torch.where(has_contour, row - (box_height / 2).floor(), top)
        left = torch.where(has_contour, column - (box_width / 2).floor(), left)
    mask = _interval_mask(top, box_height, height)[:, :, None] & _interval_mask(left, box_width, width)[:, None, :]
    return images.masked_fill(mask[..., None], value)


def _pick_pixel(mask: torch.Tensor, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pick a true pixel of each mask, bool [B, H, W], by a uniform number of 0 .. 1: row, column and existence, [B]."""
    cumulative = mask.flatten(1).cumsum(dim=1)
    count = cumulative[:, -1]
    rank = (uniform * count).floor().long()
    index = (cumulative > rank[:, None]).int().argmax(dim=1)
    width = mask.shape[2]
    return (index // width).double(), (index % width).double(), count > 0


def _interval_mask(start: torch.Tensor, length: torch.Tensor, size: int) -> torch.Tensor:
    """Mask bool [B, size] of the positions from `start` to before `start + length`."""
    positions = torch.arange(size, device=start.device)
    return (positions >= start[:, None]) & (positions < (start + length)[:, None])
