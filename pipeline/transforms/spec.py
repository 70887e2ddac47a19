"""The specification of a transform and the interface that both backends (DALI and torch) implement."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from numpy.typing import NDArray

from pipeline.transforms.augmentation import AugmentationParams
from pipeline.transforms.preprocess import MAX_RESOLUTION, NO_PREPROCESSING, Preprocessing, Resolution, input_size
from shards.errors import UserError
from shards.manifest import Manifest

if TYPE_CHECKING:  # the settings, which need MAX_RESOLUTION, do without torch
    import torch


@dataclass(frozen=True)
class TransformSpec:
    """All parameters of a transform except the augmentation.

    Attributes:
        image_shape: (H, W, C) of the raw images; (None, None, C) for image files of different sizes.
        transposed: Whether rows and columns of the stored images are exchanged.
        resolution: Side of a square output in pixels, or `HEIGHTxWIDTH`.
        interpolation: `linear`, `cubic`, `lanczos` or `nearest`.
        mean: Mean of each channel, of resized images with pixels scaled to 0 .. 1.
        std: Standard deviation of each channel, on the same scale.
        preprocessing: Deterministic steps on raw images.
    """

    image_shape: tuple[int | None, int | None, int]
    transposed: bool
    resolution: Resolution
    interpolation: str = "linear"
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    preprocessing: Preprocessing = NO_PREPROCESSING

    @classmethod
    def of(
        cls,
        manifest: Manifest,
        resolution: Resolution,
        interpolation: str = "linear",
        preprocessing: Preprocessing = NO_PREPROCESSING,
    ) -> TransformSpec:
        """Return the specification for a packed split, without normalization (mean 0, std 1).

        Raises:
            UserError: The resolution is out of range.
        """
        if not all(1 <= side <= MAX_RESOLUTION for side in input_size(resolution)):
            raise UserError(
                found=f"data.resolution={resolution}",
                expected=f"a side of 1 .. {MAX_RESOLUTION} pixels",
                hint="set for example data.resolution=112",
            )
        channels = manifest.image_shape[2]
        return cls(
            image_shape=manifest.image_shape,
            transposed=manifest.transposed,
            resolution=resolution,
            interpolation=interpolation,
            mean=(0.0,) * channels,
            std=(1.0,) * channels,
            preprocessing=preprocessing,
        )

    def with_normalization(self, mean: tuple[float, ...], std: tuple[float, ...]) -> TransformSpec:
        """Return a copy with this mean and std of each channel."""
        return replace(self, mean=mean, std=std)

    @property
    def encoded(self) -> bool:
        """Whether the raw images are image files."""
        return self.image_shape[0] is None

    @property
    def upright_size(self) -> tuple[int, int]:
        """Height and width of the raw images after the orientation is corrected."""
        height, width, _ = self.image_shape
        assert height and width, "image files have different sizes"
        return (width, height) if self.transposed else (height, width)

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width of the output, the model's input."""
        return input_size(self.resolution)

    @property
    def needs_resize(self) -> bool:
        """Whether the output size differs from that of the raw images."""
        return self.encoded or self.upright_size != self.input_size

    @property
    def upsamples(self) -> bool:
        """Whether the output has more pixels. Normalizing before the resize is then cheaper; both commute."""
        height, width, _ = self.image_shape
        assert height and width, "image files have different sizes"
        return math.prod(self.input_size) > height * width

    def can_warp_raw(self, fills_border: bool) -> bool:
        """Return whether the warp can sample raw images directly, in one interpolation.

        Otherwise images are resized first: with another interpolation, to average pixels when downsampling, or to keep
        a constant fill out of the pixels near the border, which the resize extrapolates.

        Args:
            fills_border: Whether the border pixels are repeated outside the image.
        """
        if self.encoded or self.interpolation != "linear":
            return False
        is_larger = all(side >= raw for side, raw in zip(self.input_size, self.upright_size, strict=True))
        return is_larger if fills_border else not self.needs_resize


class UndecodableImage(Exception):
    """An image file of a batch cannot be decoded.

    Attributes:
        position: Position in the batch.
        reason: Description of the defect.
    """

    def __init__(self, position: int, reason: str) -> None:
        super().__init__(position, reason)
        self.position = position
        self.reason = reason


class Transform(Protocol):
    """Converts raw images to model input. Built for one specification and device; not thread-safe.

    Attributes:
        max_fused_batch: Images up to which one call is faster than several smaller ones; 0 to keep batches apart.
    """

    @property
    def max_fused_batch(self) -> int: ...

    def op_params(self, params: AugmentationParams | None) -> dict[str, NDArray]:
        """Compute, on the host, the arrays that the operations need of B images.

        Moved to the device, they may be given to `__call__` in place of the augmentation parameters, unless the images
        are files.
        """
        ...

    def __call__(
        self, images: Any, params: AugmentationParams | Mapping[str, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Transform a batch; the input is neither changed nor kept.

        Args:
            images: uint8 [B, H, W, C], C-contiguous, an array or a tensor on the device, or B image files of
                uint8 [bytes]; B is at most the batch size that the transform was built for.
            params: Augmentation parameters of B images for a transform that augments, or the tensors of `op_params`.

        Returns:
            float32 [B, C, R, S], the size of the model input, on the device: upright, resized, (x / 255 - mean) / std.

        Raises:
            UndecodableImage: An image file cannot be decoded.
        """
        ...
