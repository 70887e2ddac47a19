"""Choice of the backend and construction of the transform."""

from __future__ import annotations

import importlib.util
from importlib import metadata
from typing import TYPE_CHECKING

from pipeline.transforms.augmentation import NO_AUGMENTATION, Augmentation
from pipeline.transforms.spec import Transform, TransformSpec
from shards.errors import UserError

if TYPE_CHECKING:  # `inkstream doctor` chooses a backend without torch, which takes seconds to import
    import torch


def has_dali() -> bool:
    """Return whether DALI can be imported, which alone decodes image files of different sizes."""
    return importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None


def choose_backend(name: str, device_type: str, encoded: bool, falls_back: bool = False) -> tuple[str, str]:
    """Choose the backend of a transform.

    Args:
        name: `auto`, `dali` or `torch`.
        device_type: `cpu` or `cuda`, the device of the model input.
        encoded: Whether the raw images are image files.
        falls_back: Whether `dali` is `torch` without DALI, except for image files: a trained model may be used on
            another machine.

    Returns:
        `dali` or `torch`, and the reason in words.

    Raises:
        UserError: DALI is requested but not installed, and nothing takes its place.
    """
    if name == "dali" and not has_dali():
        if falls_back and not encoded:
            return "torch", _missing_dali()
        raise UserError(
            found=f"loader.backend=dali, but {_missing_dali()}",
            expected="the package nvidia-dali-cuda120 (Linux only)",
            hint="pip install nvidia-dali-cuda120" if encoded else "use loader.backend=auto or loader.backend=torch",
        )
    if name != "auto":
        return name, "set by loader.backend"
    if encoded and has_dali():
        return "dali", "decodes image files"
    if device_type == "cpu":
        return "torch", "faster than DALI on CPUs"
    if not has_dali():
        return "torch", _missing_dali()
    return "dali", "the default on GPUs"


def _missing_dali() -> str:
    """Describe why DALI cannot be imported."""
    found = importlib.util.find_spec("nvidia")
    # Packages of NVIDIA share the directory `nvidia`; an `nvidia/__init__.py` elsewhere on the path hides it.
    if found and found.origin and any(str(each.name).startswith("nvidia-dali") for each in metadata.distributions()):
        return f"DALI is hidden by {found.origin}: see inkstream doctor"
    return "DALI is not installed"


def build_transform(
    spec: TransformSpec,
    backend: str,
    device: torch.device,
    batch_size: int,
    augmentation: Augmentation = NO_AUGMENTATION,
) -> Transform:
    """Build a transform.

    Args:
        spec: Specification of the transform.
        backend: `dali` or `torch`.
        device: Device of the model input.
        batch_size: Largest number of images of a call.
        augmentation: Augmentation of training images. If it changes images, each call requires parameters.

    Raises:
        UserError: The specification or augmentation needs images of one size, or the backend is unknown or cannot
            decode files.
    """
    if spec.encoded:
        _check_encoded(spec, augmentation)
    if backend not in ("dali", "torch"):
        raise UserError(found=f"backend={backend!r}", expected="dali or torch", hint='backend="torch"')
    if backend == "dali":  # not available on every system
        from pipeline.transforms.dali_backend import DaliEncodedTransform, DaliTransform

        return (DaliEncodedTransform if spec.encoded else DaliTransform)(spec, device, batch_size, augmentation)
    from pipeline.transforms.torch_backend import TorchTransform

    return TorchTransform(spec, device, augmentation)


def _check_encoded(spec: TransformSpec, augmentation: Augmentation) -> None:
    """Raise `UserError` for operations on raw pixels, which image files do not have before decoding."""
    raw_ops = [
        *spec.preprocessing.steps,
        *(name for name in ("stroke", "erase", "crop_padding") if getattr(augmentation, name)),
    ]
    if raw_ops:
        raise UserError(
            found=f"images of different sizes and {', '.join(raw_ops)}",
            expected="images of one size for these operations",
            hint="pack the images at one size: python -m pipeline.shard ... --size N",
        )
