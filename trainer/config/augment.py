"""Settings of augmentation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.transforms.augment_settings import AugmentSettings
from trainer.config.base import BaseConfig

if TYPE_CHECKING:  # --help imports this module and must not import numpy
    from pipeline.transforms.augmentation import Augmentation


class AugmentConfig(AugmentSettings, BaseConfig):
    """Random changes of training images, drawn per image from (seed, epoch, step); all off by default."""

    def augmentation(self) -> Augmentation:
        """Return the settings as the pipeline takes them."""
        from pipeline.transforms.augmentation import Augmentation

        return Augmentation(**dict(self))
