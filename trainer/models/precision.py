"""Precision and memory format of a model's computations."""

from __future__ import annotations

import torch

from trainer.config.load import replace_settings
from trainer.config.schema import Config, TrainerConfig
from trainer.models.factory import has_depthwise_convolutions

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_GPU_PRECISIONS = (((8, 0), "bf16"), ((7, 0), "fp16"), ((0, 0), "fp32"))  # by the lowest compute capability


def resolve_precision(config: Config, device: torch.device) -> Config:
    """Replace `trainer.precision=auto` by bf16, fp16 or fp32.

    GPUs with native bf16 (compute capability 8) use it. Older ones with fast fp16 (7: V100, T4, RTX 20) use fp16 with
    loss scaling. CPUs use bf16 if they have AMX or AVX-512 BF16 and the model has no depthwise convolutions: these
    instructions accelerate matrix products, which depthwise convolutions do not use. Most models with depthwise
    convolutions are faster in fp32 on a CPU, though not all (XCiT is not); `benchmarks/train_throughput.py --precisions
    bf16,fp32` measures a model.

    Raises:
        UserError: The model is unknown.
    """
    if config.trainer.precision != "auto":
        return config
    if device.type == "cuda":
        precision = _gpu_precision(device)
    else:
        # torch 2.6 has no get_capabilities: fp32, which is right everywhere.
        capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
        has_bf16 = capabilities.get("amx_bf16", False) or capabilities.get("avx512_bf16", False)
        use_bf16 = has_bf16 and not has_depthwise_convolutions(config.model)
        precision = "bf16" if use_bf16 else "fp32"
    return replace_settings(config, {"trainer.precision": precision}, "trainer.precision=auto")


def _gpu_precision(device: torch.device) -> str:
    capability = torch.cuda.get_device_capability(device)
    return next(precision for lowest, precision in _GPU_PRECISIONS if capability >= lowest)


def describe_precision(settings: TrainerConfig, device: torch.device) -> str:
    """Return the precision, and on a GPU the compute capability by which `auto` chooses it."""
    if device.type != "cuda":
        return settings.precision
    chosen = settings.precision == _gpu_precision(device)
    reason = "compute capability {}.{}".format(*torch.cuda.get_device_capability(device))
    return f"{settings.precision} ({reason if chosen else 'set by trainer.precision'})"


def autocast(settings: TrainerConfig, device: torch.device) -> torch.autocast:
    """Return the autocast context of `trainer.precision`."""
    dtype = _DTYPES.get(settings.precision)
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def make_grad_scaler(settings: TrainerConfig, device: torch.device) -> torch.amp.GradScaler:
    """Return the loss scaler of fp16, whose small gradients would be 0 otherwise; disabled in other precisions."""
    return torch.amp.GradScaler(device.type, enabled=settings.precision == "fp16")


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
