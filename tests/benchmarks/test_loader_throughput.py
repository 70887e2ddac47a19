"""Loader benchmark: the command at a tiny size, verification of outputs, worker processes."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from conftest import assert_user_error, run_module
from PIL import Image
from support.transform_reference import model_input as slow_model_input

from benchmarks.common.processes import WorkerError, WorkerProcess, cpu_seconds, fresh_processes, workers_memory
from benchmarks.loaders import loader_worker
from benchmarks.loaders.baselines import REGISTRY, LoaderSpec, missing_requirement
from benchmarks.loaders.baselines.base import Source, Task, Variant
from benchmarks.loaders.loader_worker import BatchStream, LoaderWorker
from benchmarks.loaders.report import ratios
from benchmarks.loaders.setting import make_config
from benchmarks.loaders.verify import WrongOutputError, check_batch, check_no_repeats, model_input, reach, tolerance
from shards import UserError

ALWAYS_THERE = {
    "inkstream-tar-torch": {"default"},
    "inkstream-tar-dali": {"default"},
    "inkstream-tar-gather": {"reading"},
    "dali-webdataset": {"documented", "best", "blocks"},
    "torch-dataloader": {"documented", "best", "batched"},
    "webdataset": {"documented", "best", "blocks"},
    "plain-torch": {"documented", "best"},
    "floor": {"best", "fresh"},
}


A_FEW = ("inkstream-tar-torch", "inkstream-tar-gather", "torch-dataloader", "floor")


def compare(*arguments: object, **env: str) -> subprocess.CompletedProcess:
    """Run `python benchmarks/loader_throughput.py` as a user does."""
    return run_module("benchmarks/loader_throughput.py", *arguments, timeout=240, **env)


@pytest.mark.parametrize("names", [A_FEW, pytest.param(tuple(ALWAYS_THERE), marks=pytest.mark.slow)], ids=len)
def test_the_comparison_measures_verifies_draws_and_skips(
    digits_set: Path, tmp_path: Path, names: tuple[str, ...]
) -> None:
    # A library that is there and cannot be imported; one that is not there at all is met in every plain environment.
    broken = tmp_path / "path" / "litdata"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('libnothing.so: cannot open')\n")
    process = compare(
        *("--shards", digits_set, "--images", 400, "--resolutions", 16, "--batch-size", 32, "--runs", 2),
        *("--seconds", 0.05, "--loaders", ",".join([*names, "litdata"])),
        *("--json", tmp_path / "lines.jsonl", "--out", tmp_path),
        PYTHONPATH=os.pathsep.join(filter(None, [str(broken.parent), os.environ.get("PYTHONPATH")])),
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert 'litdata: skipped, libnothing.so: cannot open (pip install -e ".[benchmarks]")' in process.stdout
    lines = (tmp_path / "lines.jsonl").read_text()
    assert lines == (tmp_path / "loader_throughput.jsonl").read_text()
    records = [json.loads(line) for line in lines.splitlines()]
    found = {name: {record["variant"] for record in records if record["name"] == name} for name in names}
    assert found == {name: ALWAYS_THERE[name] for name in names}
    assert len(records) == sum(len(ALWAYS_THERE[name]) for name in names)
    for record in records:
        assert record["resolution"] == (8 if record["variant"] == "reading" else 16)
        assert record["images_per_second_low"] <= record["images_per_second"] <= record["images_per_second_high"]
        assert record["images_per_second_low"] > 100
        assert record["runs"] == 2 and record["batch_size"] == 32 and record["samples"] == 400
        assert record["cpu_seconds_per_thousand"] >= 0
        assert 64 < record["bytes_per_image"] < 4000
        assert record["pack_seconds"] > 0
        assert 0 < record["first_batch_seconds"] < 60
        assert record["peak_memory_bytes"] > 1e8
        assert 0 < record["reach"] <= 1
        assert 0 <= record["max_error"] <= record["tolerance"]
        assert record["workers"] >= 0
        assert record["environment"]["processor"] and record["environment"]["packages"]["webdataset"]
    full = [record for record in records if record["name"].startswith("inkstream") and record["variant"] == "default"]
    assert all(record["reach"] > 0.6 for record in full)
    text = (tmp_path / "loader_throughput.md").read_text()
    assert text.strip() in process.stdout
    assert "times the fastest torch DataLoader image by image" in text
    picture = np.asarray(Image.open(tmp_path / "loader_throughput.png").convert("RGB"))
    assert len(np.unique(picture.reshape(-1, 3) // 32, axis=0)) > 5


def test_an_unknown_loader_is_one_message() -> None:
    assert_user_error(compare("--loaders", "floor,lit-data"), "lit-data", "did you mean litdata?")


def test_a_missing_set_is_one_message(tmp_path: Path) -> None:
    assert_user_error(compare("--shards", tmp_path / "none"), "none")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"resolutions": "28,4"}, "smaller than the images' 8"),
        ({"resolutions": "28,x"}, "sides in pixels"),
        ({"batch_size": 10_000}, "--batch-size 10000"),
        ({"json": Path("no/such/directory/lines.jsonl")}, "no such directory"),
    ],
)
def test_settings_that_cannot_be_measured(digits_set: Path, wrong: dict, words: str) -> None:
    given = {"shards": digits_set, "images": None, "resolutions": "8", "batch_size": 64, "runs": 1, "seconds": 1.0}
    given |= {"device": "cpu", "json": None, "out": Path("out")}
    with pytest.raises(UserError) as raised:
        make_config(argparse.Namespace(**{**given, **wrong}))
    assert words in str(raised.value)


def test_a_setting_gives_the_raw_order(synthetic_set: Path, tmp_path: Path) -> None:
    given = {"shards": synthetic_set, "images": 300, "resolutions": "28", "batch_size": 64, "runs": 1, "seconds": 1.0}
    setting = make_config(argparse.Namespace(**given, device="cpu", json=None, out=Path("out")))
    source = setting.make_source(tmp_path / "source")
    # The synthetic images are sorted by class; a prefix of the pack is a sample of all of them, here in that order.
    assert len(source) == 300 and (np.diff(source.labels) >= 0).all() and set(source.labels) == set(range(5))
    task = setting.make_task(source, 56)
    assert task.mean == pytest.approx([source.pixels.mean() / 255])
    assert task.std == pytest.approx([source.pixels.std() / 255])


def test_absent_libraries_are_told_with_what_brings_them() -> None:
    assert missing_requirement(REGISTRY["floor"]) is None
    reason = missing_requirement(LoaderSpec("x", "x", ("no_such_package.inner", "torch"), "pip install x"))
    assert reason == "no_such_package.inner not installed (pip install x)"


# What is right and what is wrong ----------------------------------------------------------------------------------


def synthetic_task(tmp_path: Path, resolution: int = 56, channels: int = 1) -> tuple[Source, Task]:
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (80, 24, 28, channels), dtype=np.uint8)
    source = Source.write(tmp_path / "source", pixels, np.arange(80) % 3, transposed=True, classes=3)
    means, stds = (0.2, 0.3, 0.4)[:channels], (0.3, 0.25, 0.5)[:channels]
    return source, Task((28, 24, channels), 80, resolution, 16, means, stds, 0, torch.device("cpu"))


PLAIN = Variant("best", "form", "")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("resolution", [28, 61])
def test_the_reference_agrees_with_the_slow_one(tmp_path: Path, channels: int, resolution: int) -> None:
    source, task = synthetic_task(tmp_path, resolution, channels)
    rows = np.array([3, 79, 0])
    slow = slow_model_input(source.pixels[rows], resolution, transposed=True, mean=task.mean, std=task.std)
    assert np.abs(model_input(source.upright_images(rows), task) - slow).max() < 1e-12


def test_right_outputs_pass(tmp_path: Path) -> None:
    source, task = synthetic_task(tmp_path)
    rows = np.random.default_rng(1).permutation(80)
    right = torch.from_numpy(model_input(source.upright_images(rows), task)).float()
    assert check_batch(right, torch.from_numpy(rows), PLAIN, task, source) < 1e-5
    rounded = right + 0.9 / 255 / task.std[0]
    rounding = replace(PLAIN, tolerance_levels=1.0)
    assert check_batch(rounded, rows, rounding, task, source) < tolerance(rounding, task)
    raw = torch.from_numpy(source.pixels[rows])
    assert check_batch(raw, rows, replace(PLAIN, is_raw=True), task, source) == 0


def spoil(kind: str, images: torch.Tensor, rows: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
    if kind == "transposed":
        return images.transpose(2, 3).contiguous(), rows
    if kind == "one image of another row":
        return images, np.r_[rows[:-1], (rows[-1] + 1) % 80]
    if kind == "one pixel":
        images[5, 0, 7, 7] += 0.01
    if kind == "not a number":
        images[0, 0, 0, 0] = float("nan")
    if kind == "doubles":
        return images.double(), rows
    if kind == "a row that is none":
        return images, np.r_[80, rows[1:]]
    if kind == "fewer rows":
        return images, rows[:-1]
    return images, rows


@pytest.mark.parametrize(
    "kind",
    [
        *("transposed", "one image of another row", "one pixel", "not a number", "doubles", "a row that is none"),
        "fewer rows",
    ],
)
def test_wrong_outputs_are_found(tmp_path: Path, kind: str) -> None:
    source, task = synthetic_task(tmp_path)
    rows = np.random.default_rng(1).permutation(80)[:50]
    right = torch.from_numpy(model_input(source.upright_images(rows), task)).float()
    check_batch(right, rows, PLAIN, task, source)
    with pytest.raises(WrongOutputError):
        check_batch(*spoil(kind, right.clone(), rows), PLAIN, task, source)
    with pytest.raises(WrongOutputError):
        check_batch(torch.from_numpy(source.pixels[rows]), rows[::-1].copy(), replace(PLAIN, is_raw=True), task, source)


class Faulty:
    """A loader that gives what it is told to."""

    variants = (PLAIN,)

    def __init__(self, source: Source, fault: str) -> None:
        self._source = source
        self._fault = fault

    def open(self, directory: Path, variant: str, task: Task):
        def epoch(number: int):
            rows = np.arange(80)
            if self._fault == "repeats":
                rows[40:] = rows[:40]
            for start in range(0, 80, 16):
                chosen = rows[start : start + 16]
                images = torch.from_numpy(model_input(self._source.upright_images(chosen), task)).float()
                yield (images + (0.1 if self._fault == "late" and start == 64 else 0)), chosen

        return epoch


@pytest.mark.parametrize("fault", ["none", "repeats", "late"])
def test_a_run_is_checked_at_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    source, task = synthetic_task(tmp_path, 28)
    monkeypatch.setattr(loader_worker, "import_loader", lambda name: Faulty(source, fault))
    loader = LoaderWorker("faulty", "best", tmp_path / "source", tmp_path, task.device)
    assert loader.start(task)["error"] < 1e-5
    # Two batches warm up, and the eight that follow end with the last one of the second epoch.
    monkeypatch.setattr(loader_worker, "_MIN_BATCHES", 8)
    if fault == "none":
        measured = loader.run(0.0)
        assert measured["images"] == 8 * 16 and measured["images_per_second"] > 0
    else:
        with pytest.raises(WrongOutputError, match="are repeated" if fault == "repeats" else "error 0.1"):
            loader.run(0.0)


def test_repeats_and_reach() -> None:
    check_no_repeats(np.array([3, 1, 2]))
    with pytest.raises(WrongOutputError, match="1 of 3 samples"):
        check_no_repeats(np.array([3, 1, 3]))
    assert reach(torch.arange(1000), 1000) == pytest.approx(0.9, abs=0.01)
    assert reach(np.arange(100), 1000) == pytest.approx(0.09, abs=0.001)


def test_a_stream_continues_over_epochs_and_refuses_empty_ones() -> None:
    stream = BatchStream(lambda number: iter([(torch.zeros(2), np.array([number, 9]))] * 2), first=4)
    assert [int(next(stream)[1][0]) for _ in range(5)] == [4, 4, 5, 5, 6]
    assert stream.epoch == 6 and [len(rows) for rows in stream.indices] == [2, 2, 1]
    with pytest.raises(RuntimeError, match="without a complete batch"):
        next(BatchStream(lambda number: iter([]), first=0))


def test_ratios_name_what_they_are_against() -> None:
    speeds = {("inkstream-tar-torch", "default"): 80_000, ("floor", "best"): 100_000, ("floor", "fresh"): 80_000}
    speeds |= {("torch-dataloader", "documented"): 5_000, ("torch-dataloader", "best"): 8_000}
    speeds |= {("torch-dataloader", "batched"): 40_000}
    records = [
        {"name": name, "variant": variant, "images_per_second": speed} for (name, variant), speed in speeds.items()
    ]
    assert ratios(records) == [
        "inkstream-tar-torch: 10.00 times the fastest torch DataLoader image by image, 2.00 times its batched variant, "
        "0.80 times the floor, 1.00 times the floor with new memory for every batch"
    ]


# Kept processes ---------------------------------------------------------------------------------------------------


class Subject:
    """What a kept process holds, in the tests."""

    def __init__(self, number: int) -> None:
        if number < 0:
            raise ValueError("below zero")
        self._number = number

    def plus(self, other: int) -> int:
        print("a word that goes to the log")
        return self._number + other

    def die(self) -> None:
        print("the last words", flush=True)
        os._exit(7)

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def work(self, seconds: float, megabytes: int, python: str) -> int:
        """Have a worker hold memory and use the processor for so long; it stays."""
        code = f"import time; x = bytes(range(256)) * {megabytes * 4096}\n"
        code += f"while time.process_time() < {seconds}: pass\nprint(flush=True); time.sleep(600)"
        self._worker = subprocess.Popen([python, "-c", code], stdout=subprocess.PIPE)
        self._worker.stdout.readline()
        time.sleep(0.3)
        return self._worker.pid


@pytest.mark.parametrize(("platform", "method"), [("linux", "forkserver"), ("darwin", "spawn"), ("win32", "spawn")])
def test_processes_are_forked_on_linux_alone(monkeypatch: pytest.MonkeyPatch, platform: str, method: str) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    assert fresh_processes([]).get_start_method() == method


def test_a_kept_process_answers_fails_and_dies(tmp_path: Path) -> None:
    with WorkerProcess(Subject, 40, log=tmp_path / "log") as process:
        assert process.call("plus", 2) == 42
        assert process.call("plus", 3) == 43
        with pytest.raises(WorkerError, match="unsupported operand") as raised:
            process.call("plus", None)
        assert raised.value.kind == "TypeError" and "Traceback" in raised.value.details
        with pytest.raises(WorkerError, match=r"no answer in 0\.2 s"):
            process.call("sleep", 5.0, timeout=0.2)
    assert "a word that goes to the log" in (tmp_path / "log").read_text()
    dies, never_made = (WorkerProcess(Subject, number, log=tmp_path / "log") for number in (0, -1))
    with dies:
        with pytest.raises(WorkerError, match=r"died \(exit status 7\)") as raised:
            dies.call("die")
        assert raised.value.details.endswith("the last words\n")
        with pytest.raises(WorkerError, match=r"died \(exit status 7\)"):
            dies.call("plus", 1)  # it cannot be asked either
    with never_made, pytest.raises(WorkerError, match="below zero"):
        never_made.call("plus", 1)


def test_workers_are_counted_and_end_with_their_process(tmp_path: Path) -> None:
    with WorkerProcess(Subject, 0, log=tmp_path / "log") as process:
        process.call("plus", 1)
        before = cpu_seconds(process.pid)
        seen = []
        measure = lambda: seen.append(workers_memory(process.pid))  # noqa: E731
        worker = process.call("work", 0.4, 64, sys.executable, meanwhile=measure)
        assert 0.2 < cpu_seconds(process.pid) - before < 1  # in ticks of 0.01 s
        assert 64e6 < max(seen) < 200e6
    assert not psutil.pid_exists(worker) or psutil.Process(worker).status() == psutil.STATUS_ZOMBIE
