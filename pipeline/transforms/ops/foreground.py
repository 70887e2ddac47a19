"""Foreground of images by Otsu's threshold, crops around it, and histogram equalization. The foreground is bright."""

from __future__ import annotations

import torch

from pipeline.transforms.ops.matmul import without_tf32
from pipeline.transforms.ops.morphology import dilate, morphological_opening


def histograms(images: torch.Tensor) -> torch.Tensor:
    """Count the 256 values of each image.

    Args:
        images: uint8 [N, pixels].

    Returns:
        int64 [N, 256].
    """
    values = images.long()
    # bincount would synchronize with the GPU, and no format of exported models supports it.
    counts = torch.zeros((images.shape[0], 256), dtype=torch.int64, device=images.device)
    return counts.scatter_add_(1, values, torch.ones_like(values))


def equalize(images: torch.Tensor) -> torch.Tensor:
    """Equalize the histogram of each channel.

    For n pixels, of which n0 have the lowest value, a value becomes 255 (m - n0) / (n - n0), where m pixels have this
    value or a lower one, rounded half to even. OpenCV's equalizeHist and DALI's equalize compute the same, but may
    round 1/2 differently. A channel with a single value is not changed.

    Args:
        images: uint8 [B, H, W, C].
    """
    batch, height, width, channels = images.shape
    planes = images.permute(0, 3, 1, 2).reshape(batch * channels, height * width)
    cumulative = histograms(planes).cumsum(dim=1)
    lowest = cumulative.gather(1, (cumulative > 0).int().argmax(dim=1, keepdim=True))
    pixels = height * width
    levels = (cumulative - lowest).clamp_min(0).double() * 255 / (pixels - lowest).clamp_min(1)
    identity = torch.arange(256, dtype=torch.uint8, device=images.device)
    table = torch.where(lowest == pixels, identity, levels.round().to(torch.uint8))
    equalized = table.gather(1, planes.long()).view(batch, channels, height, width)
    return equalized.permute(0, 2, 3, 1).contiguous()


def foreground_mask(images: torch.Tensor) -> torch.Tensor:
    """Return the pixels above Otsu's threshold of the mean of the channels.

    The threshold maximizes the variance between both classes (Otsu 1979, https://doi.org/10.1109/TSMC.1979.4310076).
    An image with a single value has no foreground.

    Args:
        images: uint8 [B, H, W, C].

    Returns:
        bool [B, H, W].
    """
    batch, height, width, channels = images.shape
    gray = images[..., 0] if channels == 1 else images.float().mean(dim=3).round().to(torch.uint8)
    flat = gray.reshape(batch, -1)
    counts = histograms(flat)
    values = torch.arange(256, device=images.device)
    below = counts.cumsum(dim=1)
    sums = (counts * values).cumsum(dim=1)
    pixels = height * width
    # Variance between classes times pixels^2: (sum * n0 - sum0 * n)^2 / (n0 * n1). Integers up to the division.
    numerator = (sums[:, -1:] * below - sums * pixels).double().square()
    variance = numerator / (below * (pixels - below)).clamp_min(1)
    threshold = variance.argmax(dim=1, keepdim=True)
    mask = (flat > threshold) & (variance.amax(dim=1, keepdim=True) > 0)
    return mask.view(batch, height, width)


def contour_mask(mask: torch.Tensor) -> torch.Tensor:
    """Return the true pixels of masks bool [B, H, W] that have a false one among their four neighbours."""
    return mask & dilate(~mask)


def crop_to_foreground(images: torch.Tensor, margin: float, opening_radius: int = 0) -> torch.Tensor:
    """Crop the smallest square around the foreground and resize it to the image's size.

    Interpolation is linear; positions outside the image take the border pixel. An image without foreground is not
    changed.

    Args:
        images: uint8 [B, H, W, C].
        margin: Added on each side, as a fraction of the square's side.
        opening_radius: Radius in pixels of a morphological opening before the foreground is located, so that specks do
            not count. The image that is cropped is not opened.
    """
    height, width = images.shape[1:3]
    mask = foreground_mask(morphological_opening(images, opening_radius))
    has_foreground = mask.any(dim=2).any(dim=1)
    starts, lengths = zip(*(_extent(mask.any(dim=axis)) for axis in (2, 1)), strict=True)
    side = torch.maximum(*lengths) * (1 + 2 * margin)
    weights = []
    for start, length, size in zip(starts, lengths, (height, width), strict=True):
        first = torch.where(has_foreground, start + (length - side) / 2, torch.zeros_like(side))
        weights.append(_crop_weights(first, torch.where(has_foreground, side, torch.full_like(side, size)), size))
    planes = images.permute(0, 3, 1, 2).float()  # [B, C, H, W]
    crops = without_tf32(torch.matmul, without_tf32(torch.matmul, weights[0][:, None], planes), weights[1][:, None].mT)
    return crops.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _extent(lines: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """First true value of bool [B, L] and the length up to the last one, float32 [B]; arbitrary if all are false."""
    marks = lines.int()
    first = marks.argmax(dim=1)
    last = lines.shape[1] - 1 - marks.flip(1).argmax(dim=1)
    return first.float(), (last - first + 1).float()


def _crop_weights(first: torch.Tensor, side: torch.Tensor, size: int) -> torch.Tensor:
    """Matrices float32 [B, L, L] that resize the section of an axis from `first`, of length `side`, to L pixels."""
    pixels = torch.arange(size, device=first.device, dtype=torch.float32)
    # A tensor, because CUDA multiplies by the reciprocal of a number, which rounds otherwise.
    lengths = torch.full_like(side, size)
    positions = first[:, None] + (pixels + 0.5) * side[:, None] / lengths[:, None] - 0.5  # [B, L]
    positions = positions.clamp(0, size - 1)
    return (1 - (positions[:, :, None] - pixels).abs()).clamp_min_(0)
