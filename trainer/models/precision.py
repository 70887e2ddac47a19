"""In which numbers and in which memory layout a model computes."""

from __future__ import annotations

import torch

from trainer.config.schema import Config, TrainerConfig
from trainer.models.factory import has_depthwise_convolutions


def resolve_precision(config: Config, device: torch.device) -> Config:
    """The settings with `trainer.precision: auto` decided: bf16 where the device is made for it and for this model.

    AMX multiplies matrices, of which a convolution channel by channel makes none: most networks with such ones are
    faster in fp32 on a CPU, though not all (XCiT is not); `benchmarks/train_throughput.py --precisions bf16,fp32` tells
    for one. Raises `UserError` for an unknown model.
    """
    if config.trainer.precision != "auto":
        return config
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu.get_capabilities().get("amx_bf16", False) and not has_depthwise_convolutions(config.model)
    trainer = config.trainer.model_copy(update={"precision": "bf16" if native else "fp32"})
    return config.model_copy(update={"trainer": trainer})


def autocast(settings: TrainerConfig, device: torch.device) -> torch.autocast:
    """The context in which the model computes, by `trainer.precision`."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=settings.precision == "bf16")


def to_memory_format(images: torch.Tensor, settings: TrainerConfig) -> torch.Tensor:
    """Images [B, C, H, W] in the layout by `trainer.channels_last`."""
    _, channels, height, width = images.shape
    if settings.channels_last and channels == 1 and images.is_contiguous():
        # Of a single channel both layouts are the same bytes. Only torch does not know, and would copy them one by one.
        return images.as_strided(images.shape, (height * width, 1, width, 1))
    return images.to(memory_format=memory_format(settings))


def memory_format(settings: TrainerConfig) -> torch.memory_format:
    """The layout of kernels and activations, by `trainer.channels_last`."""
    return torch.channels_last if settings.channels_last else torch.contiguous_format
