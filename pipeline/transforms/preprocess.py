"""Deterministic preprocessing of raw images, the same in training and in evaluation."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:  # --help imports this module and must not import numpy or torch
    import torch


MAX_RESOLUTION = 4096
Resolution: TypeAlias = int | str  # of the model input: the side of a square in pixels, or `HEIGHTxWIDTH`


def input_size(resolution: Resolution) -> tuple[int, int]:
    """Return height and width of the model input in pixels: (112, 112) for 112, (48, 160) for `48x160`."""
    height, _, width = str(resolution).partition("x")
    return int(height), int(width or height)


def format_size(resolution: Resolution) -> str:
    """Return height and width of the model input as text: `112x112` for 112."""
    return "{}x{}".format(*input_size(resolution))


@dataclass(frozen=True)
class Preprocessing:
    """Steps on raw images, applied in the order of the attributes. The default does nothing.

    Attributes:
        invert: Whether to invert all images, or (`auto`) those whose border has a mean above 127.5. The later steps
            expect a bright foreground.
        opening_radius: Radius in pixels of a morphological opening; 0 for none.
        crop_to_foreground: Margin of the crop around the foreground, as a fraction of its side; None for no crop.
        foreground_opening_radius: Radius in pixels of an opening before the foreground is located. The image itself is
            not opened.
        dilation_radius: Radius in pixels of a morphological dilation; 0 for none.
        equalize: Whether to equalize the histogram of each channel.
    """

    invert: bool | Literal["auto"] = False
    opening_radius: int = 0
    crop_to_foreground: float | None = None
    foreground_opening_radius: int = 0
    dilation_radius: int = 0
    equalize: bool = False

    @property
    def steps(self) -> tuple[str, ...]:
        """Names of the active steps with their values, for file names: `invert`, `opening_radius1`."""
        values = {field.name: (getattr(self, field.name), field.default) for field in fields(self)}
        if self.crop_to_foreground is None:
            del values["foreground_opening_radius"]  # without effect
        changed = {name: value for name, (value, default) in values.items() if value != default}
        return tuple(name if value is True else f"{name}{value}" for name, value in changed.items())

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Apply the steps to uint8 [B, H, W, C] on any device; the input is not changed."""
        from pipeline.transforms.ops.foreground import crop_to_foreground, equalize
        from pipeline.transforms.ops.morphology import dilate, morphological_opening

        if self.invert == "auto":
            images = images ^ _bright_border(images).to(images.dtype).mul_(255).view(-1, 1, 1, 1)
        elif self.invert:
            images = ~images
        if self.opening_radius:
            images = morphological_opening(images, self.opening_radius)
        if self.crop_to_foreground is not None:
            images = crop_to_foreground(images, self.crop_to_foreground, self.foreground_opening_radius)
        images = dilate(images, self.dilation_radius)
        return equalize(images) if self.equalize else images


def _bright_border(images: torch.Tensor) -> torch.Tensor:
    """Whether the mean of the border pixels is above 127.5, bool [B]."""
    import torch

    lines = [images[:, 0], images[:, -1], images[:, 1:-1, 0], images[:, 1:-1, -1]]
    border = torch.cat([line.flatten(1) for line in lines], dim=1)
    return border.float().sum(dim=1) > 127.5 * border.shape[1]  # exact on all devices, unlike a mean


NO_PREPROCESSING = Preprocessing()
