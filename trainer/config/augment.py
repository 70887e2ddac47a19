"""Settings of augmentation; `pipeline.transforms.augmentation` is what does it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from pipeline.transforms.augmentation import Augmentation
from trainer.config.base import BaseConfig, Fraction


class AugmentConfig(BaseConfig):
    """Random changes of training images, drawn for each of them by seed, epoch and step; all off by default."""

    rotation: Annotated[float, Field(ge=0, le=180)] = 0.0
    """Degrees, up to, that images are turned either way."""
    shear: Annotated[float, Field(ge=0, lt=90)] = 0.0
    """Degrees, up to, that upright lines are slanted either way."""
    translation: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the side, up to, that images are moved along each axis."""
    scale: Annotated[float, Field(ge=0)] = 0.0
    """Images become larger or smaller by up to 1 + this factor."""
    flip: Fraction = 0.0
    """Share of images that are mirrored, left to right; not for characters."""
    crop_padding: Annotated[int, Field(ge=0)] = 0
    """Raw pixels that are added on each side before a part of the old size is cut out."""
    elastic: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Elastic distortion: how far pixels are displaced (root mean square along each axis), as a share of the side.
    Simard et al. (2003) take 0.048 for digits."""
    elastic_sigma: Annotated[float, Field(ge=0.02, le=1)] = 0.14
    """Standard deviation of the Gaussian that smooths the displacements, as a share of the side."""
    fill: Literal["border"] | Annotated[int, Field(ge=0, le=255)] = "border"
    """What moves in from outside: a grey value, or the pixels of the border over and over."""
    stroke: Annotated[float, Field(ge=0, le=16)] = 0.0
    """Raw pixels, up to, that bright strokes become thicker or thinner on each side."""
    brightness: Fraction = 0.0
    """Colours are multiplied by 1 plus or minus up to this."""
    contrast: Fraction = 0.0
    """Colours are stretched about mid-grey by 1 plus or minus up to this."""
    saturation: Fraction = 0.0
    """Colours are stretched about their own grey by 1 plus or minus up to this."""
    hue: Annotated[float, Field(ge=0, le=180)] = 0.0
    """Degrees, up to, that hues are turned either way."""
    erase: Fraction = 0.0
    """Share of images of which a box is erased."""
    erase_area_min: Fraction = 0.02
    """Smallest share of the image that the box takes."""
    erase_area_max: Fraction = 0.2
    """Largest share of the image that the box takes."""
    erase_at: Literal["anywhere", "contour"] = "anywhere"
    """Where the box is: anywhere, or around a pixel of the ink's contour."""
    erase_value: Annotated[int, Field(ge=0, le=255)] = 0
    """Grey value of what is erased."""

    def augmentation(self) -> Augmentation:
        """The same as the pipeline knows it."""
        return Augmentation(**{name: getattr(self, name) for name in type(self).model_fields})

    def settings_without_effect(self) -> Iterator[str]:
        """A line for each setting that was given and changes nothing."""
        given = self.model_fields_set
        if "elastic_sigma" in given and self.elastic == 0:
            yield "augment.elastic_sigma has no effect with augment.elastic=0"
        if self.fill != "border" and not self.augmentation().has_warp:
            yield f"augment.fill={self.fill} has no effect where nothing is moved: augment.rotation and others are 0"
        for setting in ("erase_area_min", "erase_area_max", "erase_at", "erase_value"):
            if setting in given and self.erase == 0:
                yield f"augment.{setting} has no effect with augment.erase=0"
