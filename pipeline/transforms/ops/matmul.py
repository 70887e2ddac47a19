"""Matrix products whose precision does not depend on the settings of the model's."""

from __future__ import annotations

from collections.abc import Callable

import torch


def exact_matmul(first: torch.Tensor, second: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
    """Multiply float32 matrices in float32, also where TensorFloat-32 is allowed, whose error is 500 times as large.

    TensorFloat-32 is a setting of the process, which the thread of a loader cannot change for itself; where it is
    allowed, the product is computed in float64.
    """
    if out.is_cuda and _allows_tf32():
        return out.copy_(torch.matmul(first.double(), second.double()))
    return torch.matmul(first, second, out=out)


def without_tf32(product: Callable[..., torch.Tensor], *factors: torch.Tensor) -> torch.Tensor:
    """Call a product of float32 tensors, such as `torch.baddbmm`, in float64 where TensorFloat-32 is allowed."""
    if factors[0].is_cuda and _allows_tf32():
        return product(*(factor.double() for factor in factors)).float()
    return product(*factors)


def _allows_tf32() -> bool:
    # From torch 2.9 on, get_float32_matmul_precision raises if fp32_precision of the backend was set. Earlier versions
    # do not have fp32_precision.
    precision = getattr(torch.backends.cuda.matmul, "fp32_precision", None) or torch.get_float32_matmul_precision()
    return precision not in ("none", "ieee", "highest")
