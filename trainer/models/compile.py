"""Compilation with torch.compile, with static shapes: once per resolution."""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch._dynamo
from torch import nn

from shards.errors import UserError
from trainer.config.schema import TrainerConfig
from trainer.runtime.env_info import find_c_compiler

log = logging.getLogger(__name__)


def compile_model(model: nn.Module, settings: TrainerConfig, device: torch.device, resolutions: int) -> nn.Module:
    """Compile a model as `trainer.compile` asks for; the compiled model shares its weights.

    Args:
        model: The model.
        settings: The settings with `compile`.
        device: Device of the model.
        resolutions: Number of different resolutions of its input.

    Raises:
        UserError: There is no C compiler.
    """
    mode = compile_mode(settings, device)
    if mode == "off":
        return model
    # torch runs further variants uncompiled. In torch 2.6 recompile_limit has this name only; it still is an alias.
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, resolutions + 1)
    compiled: Any = torch.compile(model, dynamic=False, mode=None if mode == "default" else mode)
    # With CUDA graphs, a step overwrites the outputs of the previous step.
    compiled.register_forward_pre_hook(lambda *_: torch.compiler.cudagraph_mark_step_begin())
    return compiled


def compile_mode(settings: TrainerConfig, device: torch.device) -> str:
    """Return `off` or the mode of torch.compile, with `auto` resolved for this machine."""
    has_compiler = find_c_compiler() is not None
    if settings.compile == "auto":
        if device.type == "cuda" and not has_compiler:
            log.warning("trainer.compile=auto: no C compiler, so the model is not compiled; apt install gcc g++")
        return "default" if device.type == "cuda" and has_compiler else "off"
    if settings.compile != "off" and not has_compiler:
        raise UserError(
            found=f"trainer.compile={settings.compile}, but no C compiler on this machine",
            expected="gcc or clang, with which torch.compile builds its kernels",
            hint="apt install gcc g++, or trainer.compile=off",
        )
    return settings.compile
