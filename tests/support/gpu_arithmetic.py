"""Arithmetic of a GPU that can be checked without one: what CUDA rounds in another way, and the types of products."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_PRODUCTS = {"mm", "bmm", "addmm", "baddbmm"}


class Products(TorchDispatchMode):
    """Notes the types of the factors of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name.removeprefix("aten::") in _PRODUCTS:
            self.dtypes.append(args[-1].dtype)
        return func(*args, **(kwargs or {}))


class GpuRounding(TorchDispatchMode):
    """Rounds quotients and means on a CPU as on a GPU.

    There a quotient by a number is a product with its reciprocal (`BinaryDivTrueKernel.cu` of torch), and a mean is the
    sum times the reciprocal of the count (`ReduceMomentKernel.cu`). A quotient of two tensors is one on both.

    Attributes:
        quotients: How many quotients by a number, and means, there were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.quotients = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name in ("div", "div_") and args[0].is_floating_point() and not isinstance(args[1], torch.Tensor):
            assert not kwargs, "only exact quotients are simulated"
            self.quotients += 1
            reciprocal = 1 / torch.tensor(args[1], dtype=args[0].dtype)
            return args[0] * reciprocal if name == "div" else args[0].mul_(reciprocal)
        if name == "mean":
            self.quotients += 1
            total = torch.sum(*args, **(kwargs or {}))
            return total * torch.tensor(total.numel() / args[0].numel(), dtype=total.dtype)
        return func(*args, **(kwargs or {}))
