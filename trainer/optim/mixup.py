"""Soft targets, MixUp and CutMix, on the device, with draws that depend on nothing but (seed, epoch, step)."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from trainer.config.schema import MixupConfig


def soft_targets(labels: torch.Tensor, classes: int, smoothing: float) -> torch.Tensor:
    """One-hot rows float32 [B, C] with a share of the mass spread evenly over all classes."""
    return F.one_hot(labels, classes).float() * (1 - smoothing) + smoothing / classes


def apply_mixup_cutmix(
    images: torch.Tensor, targets: torch.Tensor, settings: MixupConfig, draws: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mix a whole batch, or leave it, as the draws decide.

    images: float32 [B, C, H, W]; targets: float32 [B, classes]. Every sample is mixed with the one before it in
    the batch, which the order has shuffled. MixUp: Zhang et al. 2018, https://arxiv.org/abs/1710.09412;
    CutMix: Yun et al. 2019, https://arxiv.org/abs/1905.04899. The inputs are not changed.
    """
    if draws.random() >= settings.prob:
        return images, targets
    cut = settings.mixup_alpha == 0 or (settings.cutmix_alpha > 0 and draws.random() < settings.switch_prob)
    alpha = settings.cutmix_alpha if cut else settings.mixup_alpha
    keep = float(draws.beta(alpha, alpha))
    if cut:
        top, bottom, left, right = cut_box(images.shape[2], images.shape[3], keep, draws)
        mixed = images.clone()
        mixed[:, :, top:bottom, left:right] = images.roll(1, 0)[:, :, top:bottom, left:right]
        keep = 1 - (bottom - top) * (right - left) / (images.shape[2] * images.shape[3])
    else:
        mixed = torch.lerp(images.roll(1, 0), images, keep)
    return mixed, torch.lerp(targets.roll(1, 0), targets, keep)


def cut_box(height: int, width: int, keep: float, draws: np.random.Generator) -> tuple[int, int, int, int]:
    """A box (top, bottom, left, right) of about 1 - keep of the area around a uniform centre, clipped at the edges."""
    side = np.sqrt(1 - keep)
    box_height, box_width = int(height * side), int(width * side)
    centre_y, centre_x = int(draws.integers(height)), int(draws.integers(width))
    top, left = centre_y - box_height // 2, centre_x - box_width // 2
    return max(top, 0), min(top + box_height, height), max(left, 0), min(left + box_width, width)
