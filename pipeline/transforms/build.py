"""Which backend computes a graph, and the graph built on it."""

from __future__ import annotations

import importlib.util

import torch

from pipeline.transforms.augmentation import NO_AUGMENTATION, Augmentation
from pipeline.transforms.spec import Graph, GraphSpec
from pipeline.transforms.torch_backend import TorchGraph
from shards.errors import UserError


def choose_backend(name: str, device: torch.device, spec: GraphSpec) -> tuple[str, str]:
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


def make_graph(
    spec: GraphSpec,
    backend: str,
    device: torch.device,
    batch_size: int,
    augmentation: Augmentation = NO_AUGMENTATION,
) -> Graph:
    """Build a graph. backend: `dali` or `torch`; batch_size: the most images of one call.

    augmentation: of training images; a graph that changes anything wants draws with each batch.
    """
    if spec.encoded:
        _check_pictures(spec, augmentation)
    if backend == "dali":
        from pipeline.transforms.dali_backend import DaliGraph, DaliPictureGraph  # not there on every system

        return (DaliPictureGraph if spec.encoded else DaliGraph)(spec, device, batch_size, augmentation)
    return TorchGraph(spec, device, augmentation)


def _check_pictures(spec: GraphSpec, augmentation: Augmentation) -> None:
    """Refuse what is done to raw pixels, which picture files have only once they are decoded."""
    on_pixels = ("stroke", "erase", "crop_padding")
    found = [*spec.preparation.steps, *(name for name in on_pixels if getattr(augmentation, name))]
    if found:
        raise UserError(
            found=f"pictures of differing sizes, and {', '.join(found)}",
            expected="images of one size, which these steps work on before they are resized",
            hint="pack the pictures at one size: python -m pipeline.shard ... --size N",
        )
