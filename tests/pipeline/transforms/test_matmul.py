"""Products of the transforms are exact whatever precision the model's products have."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.gpu_arithmetic import Products
from support.simulated_gpu import GPU, simulated_gpu

from pipeline.transforms.ops.matmul import exact_matmul, without_tf32


@pytest.fixture(params=["common setting", "setting of the backend"])
def tf32(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.param == "common setting":
        torch.set_float32_matmul_precision("high")
    elif not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("torch 2.9 introduced it")
    else:
        torch.backends.cuda.matmul.fp32_precision = "tf32"  # the common setting cannot be read afterwards
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("shapes", [((8, 1, 28, 28), (28, 112)), ((8, 112, 28), (8, 28, 28))], ids=["wide", "batched"])
def test_no_product_is_in_tf32(tf32: None, shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with simulated_gpu():
        factors = [torch.empty(shape, device=GPU) for shape in shapes]
        out = torch.empty(*shapes[0][:-1], shapes[1][-1], device=GPU)
        with Products() as products:
            assert exact_matmul(*factors, out=out) is out
            assert without_tf32(torch.matmul, *factors).dtype == torch.float32
            torch.set_float32_matmul_precision("highest")
            exact_matmul(*factors, out=out)
            without_tf32(torch.matmul, *factors)
    assert products.dtypes == [torch.float64] * 2 + [torch.float32] * 2


@pytest.mark.gpu
def test_products_of_a_gpu_are_exact(tf32: None) -> None:
    factors = [torch.rand(8, 1, 28, 28, device="cuda"), torch.rand(28, 112, device="cuda")]
    expected = torch.matmul(*(factor.double() for factor in factors))
    out = exact_matmul(*factors, out=torch.empty(8, 1, 28, 112, device="cuda"))
    assert float((out - expected).abs().max()) < 1e-5
    assert float((without_tf32(torch.matmul, *factors) - expected).abs().max()) < 1e-5
