"""Settings of augmentation, for recipes and the pipeline. `--help` imports this module, so it imports no numpy."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveFraction = Annotated[float, Field(gt=0, le=1)]


class AugmentSettings(BaseModel):
    """Strength of each random change of training images. The default changes nothing."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    rotation: Annotated[float, Field(ge=0, le=180)] = 0.0
    """Maximum rotation in degrees, in either direction."""
    shear: Annotated[float, Field(ge=0, lt=90)] = 0.0
    """Maximum horizontal shear in degrees, in either direction."""
    translation: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Maximum translation along each axis, as a fraction of the image's side."""
    scale: Annotated[float, Field(ge=0, le=100)] = 0.0
    """Maximum scaling: images are enlarged or reduced by a factor of up to 1 + scale."""
    flip: Fraction = 0.0
    """Probability of a horizontal flip; leave at 0 for characters."""
    vertical_flip: Fraction = 0.0
    """Probability of a vertical flip."""
    crop_padding: Annotated[int, Field(ge=0, le=256)] = 0
    """Padding of each side in raw pixels before a random crop of the original size."""
    random_resized_crop: tuple[PositiveFraction, PositiveFraction] | None = None
    """Minimum and maximum area of a crop that is resized to the input, as fractions of the image, such as [0.08, 1];
    null for no crop. The aspect ratio of the crop is 3/4 to 4/3."""
    elastic: Annotated[float, Field(ge=0, le=1)] = 0.0
    """RMS displacement of elastic distortion along each axis, as a fraction of the image's side. Simard et al. (2003)
    use 0.048 for digits."""
    elastic_sigma: Annotated[float, Field(ge=0.02, le=1)] = 0.14
    """Std of the Gaussian that smooths elastic displacements, as a fraction of the image's side."""
    fill: Literal["border"] | Annotated[int, Field(ge=0, le=255)] = "border"
    """Value of pixels from outside the image: a gray level 0 .. 255, or border to repeat the border pixels.
    TrivialAugment and RandAugment fill with 0 instead of border, as torchvision does."""
    stroke: Annotated[float, Field(ge=0, le=16)] = 0.0
    """Maximum dilation or erosion of bright strokes, in raw pixels on each side."""
    brightness: Fraction = 0.0
    """Maximum change of brightness: colors are multiplied by 1 - brightness .. 1 + brightness."""
    contrast: Fraction = 0.0
    """Maximum change of contrast: differences from mid-gray are multiplied by 1 - contrast .. 1 + contrast."""
    saturation: Fraction = 0.0
    """Maximum change of saturation: differences from gray are multiplied by 1 - saturation .. 1 + saturation."""
    hue: Annotated[float, Field(ge=0, le=180)] = 0.0
    """Maximum rotation of the hue in degrees, in either direction."""
    erase: Fraction = 0.0
    """Probability of erasing a box."""
    erase_area_min: Fraction = 0.02
    """Minimum area of the erased box, as a fraction of the image."""
    erase_area_max: Fraction = 0.2
    """Maximum area of the erased box, as a fraction of the image."""
    erase_at: Literal["anywhere", "contour"] = "anywhere"
    """Position of the erased box: anywhere, or centered on a pixel of the ink's contour."""
    erase_value: Annotated[int, Field(ge=0, le=255)] = 0
    """Gray level of the erased box, 0 .. 255."""
    auto_augment: Literal["none", "trivial_augment", "rand_augment"] = "none"
    """Random operations on raw pixels: TrivialAugment (one of a random magnitude) or RandAugment (several of one
    magnitude), as in torchvision."""
    rand_augment_ops: Annotated[int, Field(ge=1, le=14)] = 2
    """Operations that RandAugment applies to each image."""
    rand_augment_magnitude: Annotated[int, Field(ge=0, le=30)] = 9
    """Magnitude of the operations of RandAugment, 0 .. 30."""
