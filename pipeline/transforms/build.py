"""Which backend computes a transform, and the transform built on it."""

from __future__ import annotations

import importlib.util

import torch

from pipeline.transforms.augmentation import NO_AUGMENTATION, Augmentation
from pipeline.transforms.spec import Transform, TransformSpec
from pipeline.transforms.torch_backend import TorchTransform
from shards.errors import UserError


def choose_backend(name: str, device: torch.device, spec: TransformSpec) -> tuple[str, str]:
    """The backend that does the work (`dali` or `torch`) and why, in words."""
    has_dali = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None
    if name == "dali" and not has_dali:
        raise UserError(
            found="loader.backend: dali, and DALI is not installed",
            expected="the package nvidia-dali-cuda120 (Linux only)",
            hint="use loader.backend=auto or loader.backend=torch",
        )
    if name != "auto":
        return name, "asked for"
    if spec.encoded and has_dali:
        return "dali", "it decodes pictures"
    if device.type == "cpu":
        return "torch", "on a CPU it is the faster one for raw blocks"
    if not has_dali:
        return "torch", "DALI is not installed"
    return "dali", "there is a GPU"


def build_transform(
    spec: TransformSpec,
    backend: str,
    device: torch.device,
    batch_size: int,
    augmentation: Augmentation = NO_AUGMENTATION,
) -> Transform:
    """Build a transform. backend: `dali` or `torch`; batch_size: the most images of one call.

    augmentation: of training images; a transform that changes anything wants params with each batch.
    """
    if spec.encoded:
        _check_pictures(spec, augmentation)
    if backend == "dali":
        from pipeline.transforms.dali_backend import DaliEncodedTransform, DaliTransform  # not there on every system

        return (DaliEncodedTransform if spec.encoded else DaliTransform)(spec, device, batch_size, augmentation)
    return TorchTransform(spec, device, augmentation)


def _check_pictures(spec: TransformSpec, augmentation: Augmentation) -> None:
    """Refuse what is done to raw pixels, which picture files have only once they are decoded."""
    on_pixels = ("stroke", "erase", "crop_padding")
    found = [*spec.preprocessing.steps, *(name for name in on_pixels if getattr(augmentation, name))]
    if found:
        raise UserError(
            found=f"pictures of differing sizes, and {', '.join(found)}",
            expected="images of one size, which these steps work on before they are resized",
            hint="pack the pictures at one size: python -m pipeline.shard ... --size N",
        )
