"""In which numbers and in which memory layout a model computes."""

from __future__ import annotations

import torch

from trainer.settings import Config, Trainer


def with_precision(config: Config, device: torch.device) -> Config:
    """The settings with `trainer.precision: auto` decided: bf16 where the device computes it natively."""
    if config.trainer.precision != "auto":
        return config
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu.get_capabilities().get("amx_bf16", False)
    trainer = config.trainer.model_copy(update={"precision": "bf16" if native else "fp32"})
    return config.model_copy(update={"trainer": trainer})


def autocast(settings: Trainer, device: torch.device) -> torch.autocast:
    """The context in which the model computes, by `trainer.precision`."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=settings.precision == "bf16")


def memory_format(settings: Trainer) -> torch.memory_format:
    """The layout of images and kernels, by `trainer.channels_last`."""
    return torch.channels_last if settings.channels_last else torch.contiguous_format
