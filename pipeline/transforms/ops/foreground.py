"""Where the ink of an image is: by Otsu's threshold, on any device. Ink is bright on a dark background."""

from __future__ import annotations

import torch


def histograms(images: torch.Tensor) -> torch.Tensor:
    """How often each of 256 values occurs, int64 [N, 256], in uint8 images [N, pixels]."""
    values = images.long()
    # Not bincount, which a GPU's host would wait for, and which no format of exported models knows.
    counts = torch.zeros((images.shape[0], 256), dtype=torch.int64, device=images.device)
    return counts.scatter_add_(1, values, torch.ones_like(values))


def equalize(images: torch.Tensor) -> torch.Tensor:
    """Histogram equalisation of each channel of uint8 images [B, H, W, C]: of n pixels of which n0 have the lowest
    value, those of a value become 255 (m - n0) / (n - n0), where m pixels are not brighter, rounded to even.

    As OpenCV's equalizeHist and DALI's equalize, which may round 1/2 otherwise; a channel of a single value stays.
    """
    batch, height, width, channels = images.shape
    planes = images.permute(0, 3, 1, 2).reshape(batch * channels, height * width)
    counts = histograms(planes)
    up_to = counts.cumsum(dim=1)
    lowest = up_to.gather(1, (up_to > 0).int().argmax(dim=1, keepdim=True))
    pixels = height * width
    ranks = (up_to - lowest).clamp_min(0).double() * 255 / (pixels - lowest).clamp_min(1)
    table = ranks.round().to(torch.uint8)
    table = torch.where(lowest == pixels, torch.arange(256, dtype=torch.uint8, device=images.device), table)
    equal = table.gather(1, planes.long()).view(batch, channels, height, width)
    return equal.permute(0, 2, 3, 1).contiguous()


def foreground_mask(images: torch.Tensor) -> torch.Tensor:
    """Which pixels are ink, bool [B, H, W], in uint8 images [B, H, W, C]: those brighter than the threshold that parts
    the mean of the channels with the largest variance between both sides.

    Otsu 1979, https://doi.org/10.1109/TSMC.1979.4310076. An image of a single value has none.
    """
    batch, height, width, channels = images.shape
    gray = images[..., 0] if channels == 1 else images.float().mean(dim=3).round().to(torch.uint8)
    flat = gray.reshape(batch, -1)
    counts = histograms(flat)
    values = torch.arange(256, device=images.device)
    below = counts.cumsum(dim=1)
    sums = (counts * values).cumsum(dim=1)
    pixels = height * width
    # The variance between, times pixels^2: (sum * n0 - sum0 * n)^2 / (n0 * n1); whole numbers up to the division.
    numerator = (sums[:, -1:] * below - sums * pixels).double().square()
    variance = numerator / (below * (pixels - below)).clamp_min(1)
    threshold = variance.argmax(dim=1, keepdim=True)
    found = (flat > threshold) & (variance.amax(dim=1, keepdim=True) > 0)
    return found.view(batch, height, width)


def contour_mask(found: torch.Tensor) -> torch.Tensor:
    """The ink pixels bool [B, H, W] with a neighbour, of four, that is none."""
    edge = torch.zeros_like(found)
    edge[:, 1:] |= ~found[:, :-1]
    edge[:, :-1] |= ~found[:, 1:]
    edge[:, :, 1:] |= ~found[:, :, :-1]
    edge[:, :, :-1] |= ~found[:, :, 1:]
    return edge & found


def crop_to_foreground(images: torch.Tensor, margin: float) -> torch.Tensor:
    """The smallest square around the ink, as large as the image was: uint8 [B, H, W, C].

    margin: left around it on each side, as a share of its side. Linear interpolation, the border repeated beyond it.
    An image without ink stays.
    """
    height, width = images.shape[1:3]
    found = foreground_mask(images)
    some = found.any(dim=2).any(dim=1)
    starts, sides = zip(*(_extent(found.any(dim=axis), some) for axis in (2, 1)), strict=True)
    side = torch.maximum(*sides) * (1 + 2 * margin)
    weights = []
    for start, own, length in zip(starts, sides, (height, width), strict=True):
        first = torch.where(some, start + (own - side) / 2, torch.zeros_like(side))
        weights.append(_weights(first, torch.where(some, side, torch.full_like(side, length)), length))
    planes = images.permute(0, 3, 1, 2).float()  # [B, C, H, W]
    crops = weights[0][:, None] @ planes @ weights[1][:, None].mT
    return crops.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _extent(lines: torch.Tensor, some: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the true values of bool [B, L] begin, and how far they reach, in float32 [B]."""
    marks = lines.int()
    first = marks.argmax(dim=1)
    last = lines.shape[1] - 1 - marks.flip(1).argmax(dim=1)
    return first.float(), torch.where(some, last - first + 1, torch.zeros_like(first)).float()


def _weights(first: torch.Tensor, side: torch.Tensor, length: int) -> torch.Tensor:
    """Matrices float32 [B, L, L] that enlarge the part of an axis that begins at `first` and is `side` long to L."""
    places = torch.arange(length, device=first.device, dtype=torch.float32)
    positions = first[:, None] + (places + 0.5) * side[:, None] / length - 0.5  # [B, L]
    positions = positions.clamp(0, length - 1)
    return (1 - (positions[:, :, None] - places).abs()).clamp_min_(0)
