"""The model compiled, once for each resolution and not for each batch size."""

from __future__ import annotations

import logging
import os
import shutil

import torch
import torch._dynamo
from torch import nn

from shards.errors import UserError
from trainer.config.schema import TrainerConfig

log = logging.getLogger(__name__)

# Inductor's kernels, Triton's launchers too, are built by a C compiler.
_COMPILERS = ("cc", "gcc", "clang", "cl")


def compile_model(model: nn.Module, settings: TrainerConfig, device: torch.device, resolutions: int) -> nn.Module:
    """The model as `trainer.compile` asks for it: itself, or compiled with the same weights.

    resolutions: how many different ones it will see. Raises `UserError` where nothing can be compiled.
    """
    mode = compile_mode(settings, device)
    if mode == "off":
        return model
    # Beyond this many variants it would go on uncompiled.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, resolutions + 1)
    options = {} if mode == "default" else {"mode": mode}
    return _AnyBatch(torch.compile(model, dynamic=False, **options))


def compile_mode(settings: TrainerConfig, device: torch.device) -> str:
    """`off` or a mode of torch.compile: what `auto` means on this machine."""
    has_compiler = bool(os.environ.get("CXX") or os.environ.get("CC") or any(map(shutil.which, _COMPILERS)))
    if settings.compile == "auto":
        if device.type == "cuda" and not has_compiler:
            log.warning("trainer.compile=auto: no C compiler here, so the model is not compiled; apt install gcc g++")
        return "default" if device.type == "cuda" and has_compiler else "off"
    if settings.compile != "off" and not has_compiler:
        raise UserError(
            found=f"trainer.compile={settings.compile}, and no C compiler on this machine",
            expected="gcc or clang, with which torch.compile builds its kernels",
            hint="apt install gcc g++, or trainer.compile=off",
        )
    return settings.compile


class _AnyBatch(nn.Module):
    """Calls a compiled model, whose code is to hold for every batch size.

    The batches of an epoch differ by one image, and so do the shares of ranks. The height and width stay constants of
    the code, which is compiled anew for another resolution.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        torch._dynamo.maybe_mark_dynamic(images, 0)
        torch.compiler.cudagraph_mark_step_begin()  # what the step before left in the graphs' memory is done with
        return self.inner(images)
