"""Products of the transforms are exact whatever precision the model's products have."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.simulated_gpu import GPU, simulated_gpu
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.transforms.ops.matmul import exact_matmul


class Products(TorchDispatchMode):
    """Notes the types of the factors of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm):
            self.dtypes.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def tf32() -> Iterator[None]:
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("shapes", [((8, 1, 28, 28), (28, 112)), ((8, 112, 28), (8, 28, 28))], ids=["wide", "batched"])
def test_no_product_is_in_tf32(tf32: None, shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with simulated_gpu():
        factors = [torch.empty(shape, device=GPU) for shape in shapes]
        out = torch.empty(*shapes[0][:-1], shapes[1][-1], device=GPU)
        with Products() as products:
            assert exact_matmul(*factors, out=out) is out
            torch.set_float32_matmul_precision("highest")
            exact_matmul(*factors, out=out)
    assert products.dtypes == [torch.float64, torch.float32]


@pytest.mark.gpu
def test_products_of_a_gpu_are_exact(tf32: None) -> None:
    factors = [torch.rand(8, 1, 28, 28, device="cuda"), torch.rand(28, 112, device="cuda")]
    expected = torch.matmul(*(factor.double() for factor in factors))
    out = exact_matmul(*factors, out=torch.empty(8, 1, 28, 112, device="cuda"))
    assert float((out - expected).abs().max()) < 1e-5
