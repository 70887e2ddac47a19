"""The shipped recipes reach what they are for, on genuine data. Minutes each: make test-slow."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import ROOT, run_module

pytestmark = pytest.mark.slow


def accuracy(shared_data: Path, tmp_path: Path, source: str, recipe: str) -> float:
    packed, run = tmp_path / "set", tmp_path / "run"
    assert run_module("pipeline.shard", source, "--raw", shared_data / source, "--out", packed).returncode == 0
    overrides = (f"data.shards={packed}", f"run.dir={run}")
    process = run_module("trainer.run", ROOT / "configs" / recipe, *overrides, timeout=1200)
    assert process.returncode == 0, process.stderr
    return json.loads((run / "summary.json").read_text())["accuracy"]


def test_mnist(shared_data: Path, tmp_path: Path) -> None:
    assert accuracy(shared_data, tmp_path, "mnist", "mnist.yaml") >= 0.992


def test_byclass_on_a_cpu(shared_data: Path, tmp_path: Path) -> None:
    assert accuracy(shared_data, tmp_path, "emnist", "byclass_cpu.yaml") >= 0.86


def test_cifar10_subset(shared_data: Path, tmp_path: Path) -> None:
    """The plain network on a fifth of the training pictures; the standard error is one point."""
    packed, run = tmp_path / "set", tmp_path / "run"
    raw = shared_data / "cifar10" / "cifar10-jpg-subset.zip"
    assert run_module("pipeline.shard", "folder", "--raw", raw, "--size", 32, "--out", packed).returncode == 0
    overrides = (f"data.shards={packed}", f"run.dir={run}", "trainer.epochs=20")
    process = run_module("trainer.run", ROOT / "configs" / "cifar10_plain.yaml", *overrides, timeout=1200)
    assert process.returncode == 0, process.stderr
    assert json.loads((run / "summary.json").read_text())["accuracy"] >= 0.62


def test_a_compiled_model_learns(digits_set: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    overrides = (f"data.shards={digits_set}", f"run.dir={run}", "trainer.compile=true", "trainer.epochs=3")
    process = run_module("trainer.run", ROOT / "configs" / "quickstart.yaml", *overrides, timeout=600)
    assert process.returncode == 0, process.stderr
    assert json.loads((run / "summary.json").read_text())["accuracy"] > 0.95
