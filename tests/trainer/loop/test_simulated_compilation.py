"""The compiled step on a simulated GPU: one graph for each resolution, and no wait for the GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.simulated_gpu import GPU, DeviceError, simulated_gpu
from support.simulated_training import STEPS, train_epoch, training_on
from torch import nn

from trainer.loop.warm_up import warm_up
from trainer.models import compile as model_compile

SIDES = (16, 24)
SCHEDULE = (f"data.resolution=[[1, {SIDES[0]}], [2, {SIDES[1]}]]", "trainer.epochs=2")
COMPILED = ("trainer.compile=reduce-overhead",)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The graphs that dynamo hands to a compiler, which runs them as they are; a graph break is an error."""
    found: list[Any] = []

    def build(graph: torch.fx.GraphModule, examples: list[Any]) -> Any:
        found.append(examples)
        return graph.forward

    whole = torch.compile
    monkeypatch.setattr(model_compile, "missing_for_compilation", lambda _: None)
    monkeypatch.setattr(
        model_compile.torch,
        "compile",
        lambda model, dynamic, mode: whole(model, backend=build, dynamic=dynamic, fullgraph=True),
    )
    torch._dynamo.reset()
    return found


@pytest.mark.parametrize("network", ["three_block_cnn", pytest.param("test_efficientnet", marks=pytest.mark.slow)])
def test_a_phase_is_compiled_once(network: str, graphs: list[Any]) -> None:
    with simulated_gpu() as gpu:
        training = training_on(
            gpu, *SCHEDULE, "trainer.compile=reduce-overhead", "model.drop_rate=0.2", f"model.name={network}"
        )
        warm_up(training)
        assert len(graphs) == len(SIDES)
        for training.state.epoch in range(len(SIDES)):
            training.state.step = 0
            train_epoch(training)
    assert len(graphs) == len(SIDES), "the warm-up has compiled everything"
    for side, examples in zip(SIDES, graphs, strict=True):
        assert not any(isinstance(each, torch.SymInt) for each in examples), "shapes are static"
        assert [6, 1, side, side] in [list(each.shape) for each in examples]
    assert training.state.updates == len(SIDES) * STEPS


FAULTS = {
    "item": (lambda x: x * x.sum().item(), DeviceError, "_local_scalar_dense reads"),
    "condition": (lambda x: x if x.sum() > 0 else -x, torch._dynamo.exc.Unsupported, "branching"),
    "print": (lambda x: print(x) or x, torch._dynamo.exc.Unsupported, "print"),
    "cpu": (lambda x: x.cpu().to(x.device), DeviceError, "from cuda to cpu waits"),
    "cpu tensor": (lambda x: x + torch.zeros(1152), torch._dynamo.exc.TorchRuntimeError, "device mismatch"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_the_compiled_model_is_found(name: str, graphs: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    fault, error, words = FAULTS[name]
    monkeypatch.setattr(nn.Flatten, "forward", lambda layer, images: fault(images.flatten(1)))
    with simulated_gpu() as gpu, pytest.raises(error, match=words):
        train_epoch(training_on(gpu, *COMPILED))


def test_another_shape_is_another_graph(graphs: list[Any]) -> None:
    with simulated_gpu() as gpu:
        forward = training_on(gpu, *COMPILED).forward
        for images in (6, 6, 5, 6):
            forward(torch.empty(images, 1, 16, 16, device=GPU))
    assert len(graphs) == 2
