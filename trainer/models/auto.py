"""Settings that depend on the machine: `model.name=auto` and `trainer.precision=auto`."""

from __future__ import annotations

import logging

import torch

from trainer.config.schema import Config
from trainer.models.factory import SMALL_CNN
from trainer.models.precision import resolve_precision

log = logging.getLogger(__name__)

GPU_MODEL = "efficientnet_b2"


def resolve_auto(config: Config, device: torch.device) -> Config:
    """Replace `auto` in `model.name` and `trainer.precision` by what suits the device.

    Raises:
        UserError: The model is unknown, or does not take `data.resolution`.
    """
    if config.model.name == "auto":
        name = GPU_MODEL if device.type == "cuda" else SMALL_CNN
        log.warning("model.name=auto: %s (device %s)", name, device.type)
        config = config.model_copy(update={"model": config.model.model_copy(update={"name": name})})
    return resolve_precision(config, device)
