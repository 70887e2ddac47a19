"""Short training runs on synthetic data, in this process or as a command."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT, free_port, pack_splits, run_module, synthetic_splits

from support import warm_process
from trainer.models import compile as model_compile
from trainer.run import main as run_main

QUICK = {
    "data": {"val_fraction": 0.1, "resolution": 20},
    "loader": {"batch_size": 32},
    "model": {"name": "three_block_cnn", "drop_rate": 0.2},
    "loss": {"label_smoothing": 0.1, "class_weights": "minmax"},
    "mixup": {"prob": 0.6},
    "optim": {"name": "lion", "lr": 1e-3, "grad_accumulation": 2, "max_grad_norm": 1.0},
    "schedule": {"name": "warm_restarts", "unit": "step", "warmup": 1, "cycle_epochs": 1},
    "trainer": {"epochs": 3, "precision": "fp32", "ema_decay": 0.9},
}


def write_recipe(path: Path, settings: dict[str, Any], shards: Path) -> Path:
    """Write settings as a recipe on a packed set; returns its path."""
    path.write_text(yaml.safe_dump(settings | {"data": settings["data"] | {"shards": str(shards)}}))
    return path


def write_smallest_recipe(directory: Path, epochs: int) -> None:
    """Write `recipe.yaml`, which trains for a fraction of a second, and the `set` of 260 images that it names."""
    settings = {
        "data": {"val_fraction": 0.2, "resolution": 8, "verify": False},
        "loader": {"batch_size": 64},
        "model": {"name": "three_block_cnn"},
        "trainer": {"epochs": epochs, "precision": "fp32"},
        "device": "cpu",
    }
    shards = pack_splits(synthetic_splits(200, 60, shape=(8, 8, 1)), directory / "set")
    write_recipe(directory / "recipe.yaml", settings, shards)


def record_compilations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let dynamo compile models for a back end that builds nothing.

    Returns:
        The numbers of images that it is asked to compile for, which grows; symbols if shapes are dynamic.
    """
    sizes: list[int] = []

    def build(graph: torch.fx.GraphModule, examples: list[Any]) -> Any:
        tensors = [each for each in examples if isinstance(each, torch.Tensor)]
        sizes.extend(each.shape[0] for each in tensors if each.ndim == 4 and each.shape[2] >= 8)  # no kernels
        return graph.forward

    compile_whole = torch.compile
    monkeypatch.setattr(
        model_compile.torch, "compile", lambda model, **options: compile_whole(model, backend=build, **options)
    )
    torch._dynamo.reset()
    return sizes


def train(recipe: Path, directory: Path, *overrides: str, ranks: int = 1) -> subprocess.CompletedProcess:
    """Train by a real process (or several, through torchrun)."""
    arguments = [recipe, f"run.dir={directory}", *overrides]
    if ranks == 1:
        return run_module("trainer.run", *arguments)
    port = f"--master_port={free_port()}"
    return run_module("torch.distributed.run", f"--nproc_per_node={ranks}", port, "-m", "trainer.run", *arguments)


def train_here(monkeypatch: pytest.MonkeyPatch, recipe: Path, directory: Path, *overrides: str) -> int:
    """Train in this process, which saves the start of another."""
    monkeypatch.setattr(sys, "argv", ["trainer.run", str(recipe), f"run.dir={directory}", *overrides])
    return run_main()


def stop_in_epoch(recipe: Path, directory: Path, epoch: int, how: int, delay: float, *overrides: str) -> int:
    """Start a run, send it a signal some time after it finished an epoch, and return its exit status.

    Batches are slowed down by a wrapper so that the signal meets the middle of an epoch.
    """
    slow = (
        "import time, trainer.loop.engine as engine\n"
        "step = engine.train_step\n"
        "def slow_step(*arguments, **options):\n"
        "    time.sleep(0.05)\n"
        "    return step(*arguments, **options)\n"
        "engine.train_step = slow_step\n"
        "from trainer.run import main\n"
        "from shards.cli import run_command\n"
        "run_command(main)\n"
    )
    process = warm_process.Popen(
        [sys.executable, "-c", slow, str(recipe), f"run.dir={directory}", *overrides],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 90
    while True:
        path = directory / "metrics.jsonl"
        if path.exists() and len(path.read_text().splitlines()) >= epoch:
            break
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(delay)
    process.send_signal(how)
    process.communicate(timeout=60)
    return process.returncode
