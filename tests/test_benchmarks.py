"""Benchmarks run as tests at tiny sizes, so that they cannot rot."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from benchmarks.harness import Spread, in_process, rates, size, table


def test_the_sweep_measures_draws_and_tabulates(digits_set: Path, tmp_path: Path) -> None:
    process = subprocess.run(
        f"{sys.executable} benchmarks/resolution_sweep.py --resolutions 8,16 --epochs 1 --images 300".split()
        + ["--shards", digits_set, "--out", tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert process.returncode == 0, process.stderr
    records = [json.loads(line) for line in (tmp_path / "resolution_sweep.jsonl").read_text().splitlines()]
    assert [record["resolution"] for record in records] == [8, 16]
    for record in records:
        assert record["loader_images_per_second"]["n"] == 5
        assert record["loader_images_per_second"]["median"] > record["training_images_per_second"]["median"] > 0
        assert record["peak_memory_bytes"] > 1e8
        assert 0 <= record["data_wait_share"] < 1
        assert record["samples"] == 359
        assert record["bytes_pre_resized_uint8"] == 1797 * record["resolution"] ** 2
        assert record["bytes_at_rest"] == records[0]["bytes_at_rest"] > 1797 * 64
        assert record["environment"]["processor"]
    text = (tmp_path / "resolution_sweep.md").read_text()
    assert text.strip() in process.stdout
    assert len(text.splitlines()) == 4
    picture = np.asarray(Image.open(tmp_path / "resolution_sweep.png").convert("RGB"))
    assert picture.shape[1] > 1000
    assert len(np.unique(picture.reshape(-1, 3) // 32, axis=0)) > 5


def test_the_sweep_refuses_resolutions_that_are_none(tmp_path: Path) -> None:
    process = subprocess.run(
        [sys.executable, "benchmarks/resolution_sweep.py", "--resolutions", "28,0"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert process.returncode == 2
    assert "HINT: --resolutions 28,56,112" in process.stderr


def test_rates_interleave_and_leave_out_the_warm_up() -> None:
    calls: list[str] = []

    def work(name: str, seconds: float) -> int:
        calls.append(name)
        time.sleep(seconds if calls.count(name) > 1 else 0.2)
        return 10

    found = rates({"slow": lambda: work("slow", 0.02), "fast": lambda: work("fast", 0.01)}, runs=3)
    assert calls == ["slow", "fast"] * 4
    assert found["slow"].n == 3
    assert found["slow"].median < found["fast"].median
    assert found["slow"].low > 10 / 0.2, "the warm-up took 0.2 s"


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
    assert 250e6 < large["peak_memory_bytes"] - small["peak_memory_bytes"] < 400e6
    assert "killed" in in_process(_be_killed)["failed"]
    with pytest.raises(ValueError, match="a bug"):
        in_process(_fail)


def test_spread_table_and_size() -> None:
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(median=2.0, low=1.0, high=3.0, n=3)
    assert table(["a", "b"], [["x", "1"], ["long", "22"]]).splitlines() == [
        "| a    |  b |",
        "| ---- | -: |",
        "| x    |  1 |",
        "| long | 22 |",
    ]
    assert [size(count) for count in (12, 1500, 39.5e9)] == ["12 B", "1.5 kB", "39.5 GB"]
