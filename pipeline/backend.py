"""Which backend computes a graph, and the graph built on it."""

from __future__ import annotations

import importlib.util

import torch

from pipeline.graph import Graph, GraphSpec
from pipeline.graph_torch import TorchGraph
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


def make_graph(spec: GraphSpec, backend: str, device: torch.device, batch_size: int) -> Graph:
    """Build a graph. backend: `dali` or `torch`; batch_size: the most images of one call."""
    if backend == "dali":
        from pipeline.graph_dali import DaliGraph, DaliPictureGraph  # not there on every system

        return (DaliPictureGraph if spec.encoded else DaliGraph)(spec, device, batch_size)
    return TorchGraph(spec, device)
