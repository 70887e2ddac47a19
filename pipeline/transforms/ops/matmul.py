"""Matrix products whose precision does not depend on the settings of the model's."""

from __future__ import annotations

import torch


def exact_matmul(first: torch.Tensor, second: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
    """Multiply float32 matrices in float32, also where TensorFloat-32 is allowed, whose error is 500 times as large.

    TensorFloat-32 is a setting of the process, which the thread of a loader cannot change for itself; where it is
    allowed, the product is computed in float64.
    """
    if out.is_cuda and torch.get_float32_matmul_precision() != "highest":
        return out.copy_(torch.matmul(first.double(), second.double()))
    return torch.matmul(first, second, out=out)
