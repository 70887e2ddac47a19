"""Benchmarks run as tests at tiny sizes, so that they cannot rot."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, run_module
from PIL import Image

from benchmarks.common.harness import Spread, in_process, measure_rates
from benchmarks.common.text import format_bytes, format_machine, format_percent, format_spread, markdown_table
from benchmarks.train_throughput import make_cases
from benchmarks.training.loop import LoopCase, measure
from shards import UserError
from shards.cli import plural
from trainer.loop import engine
from trainer.loop.state import Training


def test_rates_interleave_and_leave_out_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def work(name: str, seconds: float) -> int:
        calls.append(name)
        now[0] += seconds * calls.count(name) if calls.count(name) > 1 else 0.2
        return 10

    found = measure_rates({"slow": lambda: work("slow", 0.02), "fast": lambda: work("fast", 0.01)}, runs=3)
    assert calls == ["slow", "fast"] * 4
    for name, seconds in (("slow", 0.02), ("fast", 0.01)):
        rates = [10 / (3 * seconds), 10 / (4 * seconds), 10 / (2 * seconds)]
        assert list(found[name].to_json().values()) == pytest.approx([*rates, 3])


def _allocate(megabytes: int) -> dict[str, int]:
    return {"last": int(np.ones(megabytes << 20, np.uint8)[-1])}


def _be_killed() -> dict[str, int]:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def _fail() -> dict[str, int]:
    raise ValueError("a bug")


def test_in_process_tells_peak_memory_death_and_errors() -> None:
    small, large = in_process(_allocate, 1), in_process(_allocate, 300)
    assert small["last"] == 1
    assert 200e6 < large["peak_memory_bytes"] - small["peak_memory_bytes"] < 450e6
    assert "killed" in in_process(_be_killed)["failed"]
    with pytest.raises(ValueError, match="a bug"):
        in_process(_fail)


class _Stopped(Exception):
    """What a signal raises."""


def _sleep() -> dict[str, int]:
    time.sleep(600)
    return {}


def test_a_signal_ends_the_process_too() -> None:
    def stop(signum: int, frame: object) -> None:
        raise _Stopped

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 3)
    try:
        with pytest.raises(_Stopped):
            in_process(_sleep)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert multiprocessing.active_children() == []


def test_numbers_and_tables_are_formatted() -> None:
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(median=2.0, low=1.0, high=3.0, n=3)
    assert markdown_table(["a", "b"], [["x", "1"], ["long", "22"]]).splitlines() == [
        "| a    |  b |",
        "| ---- | -: |",
        "| x    |  1 |",
        "| long | 22 |",
    ]
    assert [format_bytes(count) for count in (12, 1500, 39.5e9)] == ["12 B", "1.5 kB", "39.5 GB"]
    assert [format_percent(0.83125), format_percent(0.76312, 0.0048)] == ["83.12%", "76.31 ± 0.48%"]
    assert format_spread(Spread.of([1000.0, 2000.0, 3000.0])) == "2,000 (1,000 .. 3,000)"
    assert format_spread({"median": 0.5, "low": 0.25, "high": 1}, ".1%") == "50.0% (25.0% .. 100.0%)"
    assert [plural(1, "seed"), plural(2, "seed")] == ["1 seed", "2 seeds"]
    assert format_machine({"device": "cpu", "cores": 1, "processor": "A"}) == "1 core of A"
    assert format_machine({"device": "cuda", "cores": 2, "processor": "A"}) == "2 cores of A, cuda"


def run_benchmark(name: str, *arguments: object) -> subprocess.CompletedProcess:
    return run_module(f"benchmarks/{name}.py", *arguments, timeout=400, OMP_NUM_THREADS="1")


def test_the_training_loop_is_measured_beside_one_without_a_loader(digits_set: Path, tmp_path: Path) -> None:
    lists = ("--resolutions", "8", "--models", "three_block_cnn", "--batches", "64", "--precisions", "fp32")
    size_of_it = ("--compile", "off", "--images", 300, "--runs", 2, "--seconds", 0.05)
    process = run_benchmark(
        "train_throughput", *lists, *size_of_it, "--device", "cpu", "--shards", digits_set, "--out", tmp_path
    )
    assert process.returncode == 0, process.stderr
    records = [json.loads(line) for line in (tmp_path / "train_throughput.jsonl").read_text().splitlines()]
    (record,) = records
    for loop in ("whole", "synthetic"):
        assert record[f"{loop}_images_per_second"]["n"] == 2
        assert record[f"{loop}_images_per_second"]["low"] > 0
    assert record["whole_of_synthetic"]["low"] > 0
    assert 0 < record["data_wait_share"]["median"] < 0.9
    assert record["peak_memory_bytes"] > 1e8
    assert record["environment"]["processor"]
    assert (tmp_path / "train_throughput.md").read_text().strip() in process.stdout
    assert Image.open(tmp_path / "train_throughput.png").width > 1000


@pytest.mark.slow
def test_hosts_read_their_share_of_a_remote_data_set(tmp_path: Path) -> None:
    if os.geteuid() != 0 or not all(map(shutil.which, ("ip", "tc"))):
        pytest.skip("network namespaces need root and iproute2")
    # A fresh interpreter: those forked by a server are not in the network namespace.
    options = ["--hosts=2", "--images=60000", "--cache=0.6", f"--out={tmp_path}"]
    process = subprocess.run(
        [sys.executable, "benchmarks/remote_hosts.py", *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    if "Operation not permitted" in process.stderr:
        pytest.skip("no network namespaces here")
    assert process.returncode == 0, process.stderr
    records = [json.loads(line) for line in (tmp_path / "remote_hosts.jsonl").read_text().splitlines()]
    assert [(record["hosts"], record["epoch"]) for record in records] == [(2, 1), (2, 2)] * 2
    whole, *_, share, _ = (max(record["received"]) for record in records)
    assert share < 0.7 * whole
    assert (tmp_path / "remote_hosts.md").read_text().strip() in process.stdout


@pytest.mark.slow
def test_ranks_are_measured_side_by_side(digits_set: Path, tmp_path: Path) -> None:
    small = ("--resolution", 8, "--batch", 32, "--images", 300, "--runs", 1, "--seconds", 0.05, "--precision", "fp32")
    process = run_benchmark(
        "scaling", "--ranks", 2, *small, "--device", "cpu", "--shards", digits_set, "--out", tmp_path
    )
    assert process.returncode == 0, process.stderr
    (record,) = [json.loads(line) for line in (tmp_path / "scaling.jsonl").read_text().splitlines()]
    assert "failed" not in record, record
    assert (record["ranks"], record["batch_size"]) == (2, 64)
    assert record["whole_images_per_second"]["median"] > 0
    assert (tmp_path / "scaling.png").exists()


def test_all_epochs_of_a_measurement_have_batches_of_one_size(
    digits_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another size would be compiled again."""
    sizes, run = [], engine.train_epoch

    def recorded(training: Training, services: engine.RunServices) -> None:
        with contextlib.closing(training.data.train.batches()) as batches:
            sizes.append({len(batch.images) for batch in batches})
        run(training, services)

    monkeypatch.setattr(engine, "train_epoch", recorded)
    case = LoopCase(8, "three_block_cnn", 64, "fp32", "off")
    result = measure(digits_set, case, "cpu", fraction=1.0, runs=1, seconds=0.01)
    assert result is not None and result["steps_a_run"] == 6
    assert len(sizes) == 6 and set.union(*sizes) == {62}  # 1,438 images in 23 batches


def test_cases_differ_from_the_base_in_one_value() -> None:
    lists = {"resolutions": "28,56", "models": "a,b", "batches": "128", "precisions": "auto", "compile": "off,default"}
    found = make_cases(lists)
    base = LoopCase(28, "a", 128, "auto", "off")
    assert found == [
        base,
        replace(base, resolution=56),
        replace(base, model="b"),
        replace(base, compile="default"),
    ]
    with pytest.raises(UserError, match="28,0"):
        make_cases(lists | {"resolutions": "28,0"})
