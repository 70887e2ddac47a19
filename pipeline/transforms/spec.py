"""What turns raw bytes into model input: one contract, two backends (DALI and torch)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from pipeline.transforms.augmentation import AugmentationParams
from pipeline.transforms.preprocess import NO_PREPROCESSING, Preprocessing
from shards.errors import UserError
from shards.manifest import Manifest
from shards.stores.base import Images

if TYPE_CHECKING:  # the settings, which need MAX_RESOLUTION, do without torch
    import torch

MAX_RESOLUTION = 4096


@dataclass(frozen=True)
class TransformSpec:
    """Everything that decides what a transform computes.

    image_shape: (H, W, C) of the raw images, (None, None, C) for picture files of differing sizes. transposed: rows and
    columns are exchanged in them.
    resolution: side of the square output, in pixels. interpolation: `linear`, `cubic`, `lanczos` or `nearest`.
    mean, std: for each channel, of the resized images with pixels scaled to 0 .. 1.
    preprocessing: of the raw images, in training and evaluation alike.
    """

    image_shape: tuple[int | None, int | None, int]
    transposed: bool
    resolution: int
    interpolation: str = "linear"
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    preprocessing: Preprocessing = NO_PREPROCESSING

    @classmethod
    def of(
        cls,
        manifest: Manifest,
        resolution: int,
        interpolation: str = "linear",
        preprocessing: Preprocessing = NO_PREPROCESSING,
    ) -> TransformSpec:
        """The spec for a packed part, without normalisation (mean 0, standard deviation 1)."""
        if not 1 <= resolution <= MAX_RESOLUTION:
            raise UserError(
                found=f"resolution {resolution}",
                expected=f"a side of 1 .. {MAX_RESOLUTION} pixels",
                hint="for instance data.resolution=112",
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
        return replace(self, mean=mean, std=std)

    @property
    def encoded(self) -> bool:
        """Whether the raw images are picture files."""
        return self.image_shape[0] is None

    @property
    def upright_size(self) -> tuple[int, int]:
        """Height and width of the raw images, orientation fixed."""
        height, width, _ = self.image_shape
        assert height and width, "picture files have no one size"
        return (width, height) if self.transposed else (height, width)

    @property
    def needs_resize(self) -> bool:
        """Whether the output has another size than the raw images."""
        height, width, _ = self.image_shape
        return not height == width == self.resolution

    @property
    def upsamples(self) -> bool:
        """Whether the output has more pixels, so that normalising first is cheaper (resizing commutes with it)."""
        height, width, _ = self.image_shape
        assert height and width, "picture files have no one size"
        return self.resolution * self.resolution > height * width

    @property
    def can_warp_raw(self) -> bool:
        """Whether pixels are moved straight from the raw image to the output, in one interpolation; otherwise images
        are resized first, which takes another one or makes several pixels one."""
        return not self.encoded and self.interpolation == "linear" and self.resolution >= max(self.upright_size)


class UndecodableImage(Exception):
    """A picture file of a batch that cannot be decoded. position: in the batch. reason: what it is instead."""

    def __init__(self, position: int, reason: str) -> None:
        super().__init__(position, reason)
        self.position = position
        self.reason = reason


class Transform(Protocol):
    """Turns raw images into model input. Built for one specification and device; not thread-safe.

    Attributes:
        max_fused_batch: Images up to which one call is faster than several smaller ones; 0 to keep batches apart.
    """

    @property
    def max_fused_batch(self) -> int: ...

    def __call__(self, images: Images, params: AugmentationParams | None = None) -> torch.Tensor:
        """Transform a batch; the input is neither changed nor kept.

        Args:
            images: uint8 [B, H, W, C], C-contiguous, or B image files of uint8 [bytes]; B is at most the batch size
                that the transform was built for.
            params: Augmentation parameters of B images, for a transform that augments.

        Returns:
            float32 [B, C, R, R] on the device: upright, resized, (x / 255 - mean) / std.

        Raises:
            UndecodableImage: An image file cannot be decoded.
        """
        ...
