"""How near depthwise convolutions come to the bandwidth of the memory, from a profile of training steps.

A depthwise convolution does so little arithmetic for each byte that reading and writing is what it waits for: 2 k^2
operations an output of 2 bytes, where such a GPU needs some hundred operations a byte to be kept busy.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.harness import table
from benchmarks.training_loop import ResidentLoader, Setting, recipe
from shards.errors import UserError
from trainer import engine
from trainer.arithmetic import with_precision
from trainer.config import validate
from trainer.data import open_data
from trainer.distributed import join
from trainer.environment import environment
from trainer.training import Training, make_training

_STEPS = 5
_COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 28}  # several times the caches
_COPIES = 10
_SHOWN = 10  # operators

Shapes = tuple[tuple[int, ...], tuple[int, ...]]


def measure_bandwidth(shards: Path, setting: Setting, device: str, subset: float) -> dict[str, Any]:
    """Profile some steps of a setting and tell bytes, seconds and bandwidth of its depthwise convolutions."""
    with join(device) as world:
        settings = with_precision(validate(recipe(shards, setting, subset), "the benchmark"), world.device)
        data = open_data(settings, world)
        training = make_training(settings, data, world)
        training.forward.train()
        batch = next(iter(ResidentLoader(data.train).batches()))
        outputs = _depthwise_outputs(training, batch.images)
        if not outputs:
            raise UserError(
                found=f"{setting.model}, which has no depthwise convolution",
                expected="a model that has some",
                hint="--models efficientnet_b2",
            )
        for _ in range(2):  # which also compiles
            engine.train_step(training, batch, window=1, updates=True)
        _wait(world.device)
        start = time.perf_counter()
        for _ in range(_STEPS):
            engine.train_step(training, batch, window=1, updates=True)
        _wait(world.device)
        step_seconds = (time.perf_counter() - start) / _STEPS
        with torch.profiler.profile(record_shapes=True) as profile:
            for _ in range(_STEPS):
                engine.train_step(training, batch, window=1, updates=True)
            _wait(world.device)
        events = profile.events()
        on_gpu = world.device.type == "cuda"
        item = 2 if settings.trainer.precision == "bf16" else 4
        moved, seconds, calls = _depthwise(events, outputs, item, on_gpu)
        return {
            "precision": settings.trainer.precision,
            "depthwise_layers": len(outputs),
            "depthwise_calls": calls,
            "depthwise_bytes_a_step": moved / _STEPS,
            "depthwise_seconds_a_step": seconds / _STEPS,
            "depthwise_bytes_per_second": moved / seconds,
            "copy_bytes_per_second": _copy_bandwidth(world.device),
            "step_seconds": step_seconds,
            "operators": _operators(profile.key_averages(), on_gpu),
            "environment": environment(world.device),
        }


def _depthwise_outputs(training: Training, images: torch.Tensor) -> dict[Shapes, int]:
    """Numbers of output of each depthwise convolution, by the shapes of its input and kernel."""
    found: dict[Shapes, int] = {}

    def note(layer: nn.Conv2d, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        found[tuple(inputs[0].shape), tuple(layer.weight.shape)] = output.numel()

    layers = [layer for layer in training.model.modules() if isinstance(layer, nn.Conv2d)]
    depthwise = [layer for layer in layers if layer.groups == layer.in_channels > 1]
    hooks = [layer.register_forward_hook(note) for layer in depthwise]
    training.model.eval()
    with torch.no_grad():
        training.model(images)
    training.model.train()
    for hook in hooks:
        hook.remove()
    return found


def _depthwise(events: Any, outputs: dict[Shapes, int], item: int, on_gpu: bool) -> tuple[int, float, int]:
    """Bytes that they have to move, seconds that they took, and calls, in all profiled steps.

    Forward: input and kernel are read, the output is written. Backward: the output's gradient is read for the input's
    gradient and again for the kernel's, with kernel and input; both gradients are written.
    """
    moved, seconds, calls = 0, 0.0, 0
    for event in events:
        shapes = event.input_shapes or []
        if event.name == "aten::convolution" and len(shapes) > 1:
            place, times_output, times_input = 0, 1, 1
        elif event.name == "aten::convolution_backward" and len(shapes) > 2:
            place, times_output, times_input = 1, 2, 2
        else:
            continue
        source, kernel = tuple(shapes[place]), tuple(shapes[place + 1])
        if (source, kernel) not in outputs:
            continue
        numbers = times_output * outputs[source, kernel] + times_input * torch.Size(source).numel()
        moved += item * (numbers + times_input * torch.Size(kernel).numel())
        seconds += (event.device_time_total if on_gpu else event.cpu_time_total) / 1e6
        calls += 1
    return moved, seconds, calls


def _operators(averages: Any, on_gpu: bool) -> list[dict[str, Any]]:
    """The operators that took most, with their share of the time of all."""
    column = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    ranked = sorted(averages, key=lambda each: -getattr(each, column))
    whole = sum(getattr(each, column) for each in ranked)
    return [{"name": each.key, "share": getattr(each, column) / whole} for each in ranked[:_SHOWN]]


def _copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written a second when a large tensor is copied: what the memory does at its best."""
    source = torch.zeros(_COPY_BYTES[device.type] // 4, device=device)
    target = torch.zeros_like(source)
    best = 0.0
    for _ in range(_COPIES):
        _wait(device)
        start = time.perf_counter()
        target.copy_(source)
        _wait(device)
        best = max(best, 2 * 4 * source.numel() / (time.perf_counter() - start))
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def describe(record: dict[str, Any]) -> str:
    """What was found, as a paragraph and a table."""
    if "failed" in record:
        return f"depthwise convolutions: {record['failed']}"
    reached, most = record["depthwise_bytes_per_second"], record["copy_bytes_per_second"]
    text = (
        f"The {record['depthwise_layers']} depthwise convolutions (by shape) of {record['model']} at "
        f"{record['resolution']}x{record['resolution']} move {record['depthwise_bytes_a_step'] / 1e9:.2f} GB in a step "
        f"of {record['batch_size']} images, in {1000 * record['depthwise_seconds_a_step']:.1f} ms of its "
        f"{1000 * record['step_seconds']:.1f}: {reached / 1e9:,.1f} GB/s, {reached / most:.0%} of the "
        f"{most / 1e9:,.1f} GB/s of a copy."
    )
    rows = [[operator["name"], f"{operator['share']:.1%}"] for operator in record["operators"]]
    return f"{text}\n\n{table(['operator', 'share of the time'], rows)}"
