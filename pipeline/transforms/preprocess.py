"""What is done to every raw image, in training and in evaluation alike; nothing of it is random."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # the settings, which hold these, do without torch
    import torch


@dataclass(frozen=True)
class Preprocessing:
    """Steps on raw images, in this order; the default does nothing.

    invert: make bright what is dark, in all images or (`auto`) in those whose border is brighter than half.
    opening: radius in pixels of a grey opening, 0 for none. crop_to_foreground: cut out the square around the ink with
    this margin, a share of its side; None for no cropping. equalize: spread the histogram of each channel evenly.
    Opening and ink take ink for bright.
    """

    invert: bool | Literal["auto"] = False
    opening_radius: int = 0
    crop_to_foreground: float | None = None
    equalize: bool = False

    @property
    def steps(self) -> tuple[str, ...]:
        """What it does, in words that are part of file names: `invert`, `opening1`."""
        values = {field.name: (getattr(self, field.name), field.default) for field in fields(self)}
        changed = {name: value for name, (value, default) in values.items() if value != default}
        return tuple(name if value is True else f"{name}{value}" for name, value in changed.items())

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [B, H, W, C], as stored and on any device, to the same; the input is not changed."""
        from pipeline.transforms.ops.foreground import crop_to_foreground, equalize
        from pipeline.transforms.ops.morphology import morphological_opening

        if self.invert == "auto":
            images = images ^ _bright_border(images).to(images.dtype).mul_(255).view(-1, 1, 1, 1)
        elif self.invert:
            images = ~images
        if self.opening_radius:
            images = morphological_opening(images, self.opening_radius)
        if self.crop_to_foreground is not None:
            images = crop_to_foreground(images, self.crop_to_foreground)
        return equalize(images) if self.equalize else images


def _bright_border(images: torch.Tensor) -> torch.Tensor:
    """For which images bool [B] the mean of the outermost pixels is above half."""
    import torch

    border = [images[:, 0], images[:, -1], images[:, 1:-1, 0], images[:, 1:-1, -1]]
    return torch.cat([line.flatten(1) for line in border], dim=1).float().mean(dim=1) > 127.5


NO_PREPROCESSING = Preprocessing()
