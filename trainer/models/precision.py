"""Precision and memory format of a model's computations."""

from __future__ import annotations

import torch

from trainer.config.load import replace_settings
from trainer.config.schema import Config, TrainerConfig
from trainer.models.factory import has_depthwise_convolutions


def resolve_precision(config: Config, device: torch.device) -> Config:
    """Replace `trainer.precision=auto` by bf16 or fp32.

    GPUs use bf16 if they support it. CPUs use bf16 if they have AMX and the model has no depthwise convolutions: AMX
    accelerates matrix products, and a depthwise convolution has none. Most such models are faster in fp32 on a CPU,
    though not all (XCiT is not); `benchmarks/train_throughput.py --precisions bf16,fp32` measures a model.

    Raises:
        UserError: The model is unknown.
    """
    if config.trainer.precision != "auto":
        return config
    if device.type == "cuda":
        use_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        use_bf16 = torch.cpu.get_capabilities().get("amx_bf16", False) and not has_depthwise_convolutions(config.model)
    return replace_settings(config, {"trainer.precision": "bf16" if use_bf16 else "fp32"}, "trainer.precision=auto")


def autocast(settings: TrainerConfig, device: torch.device) -> torch.autocast:
    """Return the autocast context of `trainer.precision`."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=settings.precision == "bf16")


def to_memory_format(images: torch.Tensor, settings: TrainerConfig) -> torch.Tensor:
    """Convert images [B, C, H, W] to the memory format of `trainer.channels_last`."""
    _, channels, height, width = images.shape
    if settings.channels_last and channels == 1 and images.is_contiguous():
        # With a single channel both formats are the same bytes, but torch would copy them.
        return images.as_strided(images.shape, (height * width, 1, width, 1))
    return images.to(memory_format=memory_format(settings))


def memory_format(settings: TrainerConfig) -> torch.memory_format:
    """Return the memory format of `trainer.channels_last`."""
    return torch.channels_last if settings.channels_last else torch.contiguous_format
