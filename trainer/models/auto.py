"""Settings that depend on machine or model: `auto` of `model.name`, `model.pretrained` and `trainer.precision`."""

from __future__ import annotations

import logging
from typing import Any

import torch

from trainer.config.load import replace_settings
from trainer.config.schema import Config
from trainer.models.factory import SMALL_CNN, UNPUBLISHED
from trainer.models.precision import resolve_precision

log = logging.getLogger(__name__)

GPU_MODEL = "efficientnet_b2"
CPU_RESOLUTION = 28  # a CPU takes 16 times as long at the default of 112


def resolve_auto(config: Config, device: torch.device) -> Config:
    """Replace `auto` in `model.name` and `trainer.precision` by what suits the device.

    The small CNN of CPUs gets a small resolution too, unless the recipe sets `data.resolution`. `model.pretrained=auto`
    becomes false for a network without published weights.

    Raises:
        UserError: The model is unknown, or does not take `data.resolution`.
    """
    if config.model.name == "auto":
        name = GPU_MODEL if device.type == "cuda" else SMALL_CNN
        values: dict[str, Any] = {"model.name": name}
        if name == SMALL_CNN and "resolution" not in config.data.model_fields_set:
            values["data.resolution"] = CPU_RESOLUTION
        config = replace_settings(config, values, "model.name=auto")
        log.warning("model.name=auto: %s at %s pixels (device %s)", name, config.data.final_resolution, device.type)
    if config.model.pretrained == "auto" and config.model.name in UNPUBLISHED:
        log.warning("model.pretrained=auto becomes false: %s has no published weights", config.model.name)
        config = replace_settings(config, {"model.pretrained": False}, "model.pretrained=auto")
    return resolve_precision(config, device)
