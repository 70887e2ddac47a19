"""Soft targets, MixUp and CutMix on the device, with random numbers from (seed, epoch, step)."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from trainer.config.schema import MixupConfig


def soft_targets(labels: torch.Tensor, classes: int, smoothing: float) -> torch.Tensor:
    """Convert labels int64 [B] to one-hot rows float32 [B, classes] with label smoothing."""
    return F.one_hot(labels, classes).float() * (1 - smoothing) + smoothing / classes


def apply_mixup_cutmix(
    images: torch.Tensor, targets: torch.Tensor, settings: MixupConfig, rng: np.random.Generator, repeats: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mix each sample of a batch with the sample `repeats` positions before it, or leave the batch as it is.

    MixUp: Zhang et al. 2018, https://arxiv.org/abs/1710.09412. CutMix: Yun et al. 2019,
    https://arxiv.org/abs/1905.04899.

    Args:
        images: float32 [B, C, H, W], in random order, the copies of an image together; not changed.
        targets: float32 [B, classes]; not changed.
        settings: Probabilities and parameters of the Beta distributions.
        rng: Generator of this step.
        repeats: Number of copies of each image, which are consecutive (`loader.repeated_augmentation`).

    Returns:
        The mixed images and targets.
    """
    if rng.random() >= settings.prob:
        return images, targets
    cut = settings.mixup_alpha == 0 or (settings.cutmix_alpha > 0 and rng.random() < settings.switch_prob)
    alpha = settings.cutmix_alpha if cut else settings.mixup_alpha
    lam = float(rng.beta(alpha, alpha))
    if cut:
        top, bottom, left, right = cut_box(images.shape[2], images.shape[3], lam, rng)
        mixed = images.clone()
        mixed[:, :, top:bottom, left:right] = images.roll(repeats, 0)[:, :, top:bottom, left:right]
        lam = 1 - (bottom - top) * (right - left) / (images.shape[2] * images.shape[3])
    else:
        mixed = torch.lerp(images.roll(repeats, 0), images, lam)
    return mixed, torch.lerp(targets.roll(repeats, 0), targets, lam)


def cut_box(height: int, width: int, lam: float, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Draw a box (top, bottom, left, right) of area 1 - lam around a uniform center, clipped at the edges."""
    side = np.sqrt(1 - lam)
    box_height, box_width = int(height * side), int(width * side)
    center_y, center_x = int(rng.integers(height)), int(rng.integers(width))
    top, left = center_y - box_height // 2, center_x - box_width // 2
    return max(top, 0), min(top + box_height, height), max(left, 0), min(left + box_width, width)
