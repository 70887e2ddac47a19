"""The batch finder ends at the largest batch that fits, in few trials, and never asks for more than there is."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_module
from hypothesis import given
from hypothesis import strategies as st
from support.training_runs import record_compilations

from trainer.config.load import load
from trainer.data.training_data import open_data
from trainer.loop import find_batch_size as find_batch
from trainer.loop.find_batch_size import BatchSizeResult, BatchSizeRunner, search_batch_sizes
from trainer.loop.state import make_training
from trainer.models.precision import resolve_precision
from trainer.runtime import memory
from trainer.runtime.distributed import World

QUICKSTART = ROOT / "configs" / "quickstart.yaml"


@given(limit=st.integers(16, 1 << 20), first=st.sampled_from([16, 256]), most=st.integers(2, 1 << 20))
def test_the_search_ends_just_below_the_limit(limit: int, first: int, most: int) -> None:
    tried: list[int] = []

    def attempt(size: int) -> BatchSizeResult | None:
        tried.append(size)
        return BatchSizeResult(size, 1.0, size) if size <= limit else None

    found = search_batch_sizes(attempt, first, most)
    largest = max(trial.batch_size for trial in found)
    assert largest <= min(limit, most)
    assert largest >= min(most, limit - max(8, limit // 16) - 8)
    assert len(tried) == len(set(tried)) < 30
    assert max(tried) <= max(2 * limit, first) and max(tried) <= most


def test_nothing_may_fit() -> None:
    assert search_batch_sizes(lambda size: None, 256, 1000) == []


def test_the_command_reports_every_size_and_the_largest(
    digits_set: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    given = [str(QUICKSTART), f"data.shards={digits_set}", "data.train_fraction=0.1"]
    monkeypatch.setattr(sys, "argv", ["find_batch", *given])
    monkeypatch.setattr(find_batch, "_SECONDS", 0.05)
    assert find_batch.main() == 0
    said = capsys.readouterr().out
    sizes = [int(size.replace(",", "")) for size in re.findall(r"([\d,]+) images  +[\d,]+ images/s", said)]
    assert sizes == [16, 32, 64, 128, 129], "up to all training images"
    assert "largest  loader.batch_size=129" in said


def test_all_sizes_are_compiled_once(digits_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = record_compilations(monkeypatch)
    monkeypatch.setattr(find_batch, "_SECONDS", 0.0)
    world = World(rank=0, size=1, device=torch.device("cpu"))
    settings = load(QUICKSTART, [f"data.shards={digits_set}", "trainer.compile=default", "trainer.precision=fp32"])
    runner = BatchSizeRunner(make_training(settings, open_data(settings, world), world))
    for size in (16, 24):
        assert runner(size) is not None
    assert sizes == [16]


def test_on_a_cpu_it_stops_before_the_memory_ends(digits_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(rank=0, size=1, device=torch.device("cpu"))
    settings = resolve_precision(load(QUICKSTART, [f"data.shards={digits_set}"]), world.device)
    held = [memory.peak_memory()]
    monkeypatch.setattr(find_batch, "available_memory", lambda: 100_000_000)
    monkeypatch.setattr(find_batch, "peak_memory", lambda: held[-1])
    attempts = BatchSizeRunner(make_training(settings, open_data(settings, world), world))

    def step(size: int) -> float:
        held.append(held[0] + 1_000_000 * size)
        return 1.0

    monkeypatch.setattr(attempts, "_speed", step)
    found = search_batch_sizes(attempts, 16, 10_000)
    assert max(trial.batch_size for trial in found) in range(80, 91), "90 images of a megabyte in nine tenths of 100 MB"
    assert max(held) - held[0] <= 90_000_000


@pytest.mark.slow
def test_several_ranks_are_told_that_one_is_enough(digits_set: Path) -> None:
    launcher = ("torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "trainer.loop.find_batch_size")
    process = run_module(*launcher, QUICKSTART, f"data.shards={digits_set}", timeout=300)
    assert process.returncode != 0
    assert "error: 2 ranks" in process.stderr


def test_memory_is_told_in_bytes() -> None:
    before = memory.peak_memory()
    assert 10e6 < before < memory.memory_limit()
    assert 0 < memory.available_memory() <= memory.memory_limit()
    block = torch.ones(50_000_000)
    assert memory.peak_memory() >= 200e6 and float(block[-1]) == 1


@pytest.mark.gpu
def test_on_a_gpu_it_ends_at_the_memory(digits_set: Path) -> None:
    """With most of the memory taken away by a limit, so that few images fit."""
    limited = (
        "import sys, torch\n"
        "torch.cuda.set_per_process_memory_fraction(0.02)\n"
        "from trainer.loop.find_batch_size import main\n"
        f"sys.argv = ['find_batch', '{QUICKSTART}', 'data.shards={digits_set}', 'device=cuda', 'data.resolution=512']\n"
        "main()\n"
    )
    process = subprocess.run([sys.executable, "-c", limited], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    assert "does not fit" in process.stdout
    assert "largest  loader.batch_size=" in process.stdout
