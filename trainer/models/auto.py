"""Settings that depend on the machine: `model.name=auto` and `trainer.precision=auto`."""

from __future__ import annotations

import logging

import torch

from trainer.config.schema import Config
from trainer.models.factory import SMALL_CNN
from trainer.models.precision import resolve_precision

log = logging.getLogger(__name__)

GPU_MODEL = "efficientnet_b2"
CPU_RESOLUTION = 28  # a CPU takes 16 times as long at the default of 112


def resolve_auto(config: Config, device: torch.device) -> Config:
    """Replace `auto` in `model.name` and `trainer.precision` by what suits the device.

    The small CNN of CPUs gets a small resolution too, unless the recipe sets `data.resolution`.

    Raises:
        UserError: The model is unknown, or does not take `data.resolution`.
    """
    if config.model.name == "auto":
        name = GPU_MODEL if device.type == "cuda" else SMALL_CNN
        data = config.data
        if name == SMALL_CNN and "resolution" not in data.model_fields_set:
            data = data.model_copy(update={"resolution": CPU_RESOLUTION})
        config = config.model_copy(update={"data": data, "model": config.model.model_copy(update={"name": name})})
        log.warning("model.name=auto: %s at %d pixels (device %s)", name, data.final_resolution, device.type)
    return resolve_precision(config, device)
