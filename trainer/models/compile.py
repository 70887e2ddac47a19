"""Compilation with torch.compile, with static shapes: once per resolution."""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch._dynamo
from torch import nn

from shards.errors import UserError
from trainer.config.schema import TrainerConfig
from trainer.runtime.env_info import missing_for_compilation

log = logging.getLogger(__name__)


def compile_model(model: nn.Module, settings: TrainerConfig, device: torch.device, resolutions: int) -> nn.Module:
    """Compile a model as `trainer.compile` asks for; the compiled model shares its weights.

    Args:
        model: The model.
        settings: The settings with `compile`.
        device: Device of the model.
        resolutions: Number of different resolutions of its input.

    Raises:
        UserError: torch.compile cannot run on this machine.
    """
    mode = compile_mode(settings, device)
    if mode == "off":
        return model
    torch.compiler.reset()  # the models of earlier trainings in this process count as variants of this one
    # torch runs further variants uncompiled. In torch 2.6 recompile_limit has this name only; it still is an alias.
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, resolutions + 1)
    compiled: Any = torch.compile(model, dynamic=False, mode=None if mode == "default" else mode)
    # With CUDA graphs, a step overwrites the outputs of the previous step.
    compiled.register_forward_pre_hook(lambda *_: torch.compiler.cudagraph_mark_step_begin())
    return compiled


def compile_mode(settings: TrainerConfig, device: torch.device) -> str:
    """Return `off` or the mode of torch.compile, with `auto` resolved for this machine."""
    asked = settings.compile
    if asked == "off" or (asked == "auto" and device.type != "cuda"):
        return "off"
    missing = missing_for_compilation(torch.cuda.get_device_capability(device) if device.type == "cuda" else None)
    if missing is None:
        return "default" if asked == "auto" else asked
    found, hint = missing
    if asked == "auto":
        log.warning("trainer.compile=auto: %s, so the model is not compiled; %s", found, hint)
        return "off"
    raise UserError(
        found=f"trainer.compile={asked}, but {found} on this machine",
        expected="a C compiler and the headers of Python; on a GPU also Triton and compute capability 7.0 or higher",
        hint=f"{hint}, or trainer.compile=off",
    )
