"""The device check at tiny size on a CPU, and what it does with errors, little time and kills."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, run_module

from benchmarks import device_check
from benchmarks.common.processes import WorkerError
from benchmarks.training.device.cases import GPU, TINY, make_sections
from benchmarks.training.device.report import format_report, format_value
from benchmarks.training.device.worker import DeviceWorker, pack_synthetic_set
from pipeline.common.index_ranges import IndexRanges
from pipeline.common.labelled_samples import LabelledSamples
from pipeline.sampler import equal_batch_size
from pipeline.transforms.torch_backend import TorchTransform
from trainer.data.training_data import split_train_val

SECTIONS = ["device", "correctness", "loader", "step", "loop", "run"]


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class SameProcess:
    """A worker in this process, which has imported everything."""

    def __init__(self, make: Callable[..., DeviceWorker], *arguments: Any, log: Path) -> None:
        self._worker = make(*arguments)

    def call(self, section: str, settings: dict[str, Any], timeout: float) -> Any:
        return getattr(self._worker, section)(settings)

    def close(self) -> None:
        self._worker.close()


@pytest.mark.parametrize("worker", [SameProcess, pytest.param(None, marks=pytest.mark.slow)])
def test_the_device_check_runs_at_tiny_size(
    worker: type | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if worker is None:
        process = run_module("benchmarks/device_check.py", "--out", tmp_path, timeout=300)
        assert process.returncode == 0, process.stdout + process.stderr
    else:
        monkeypatch.setattr(device_check, "WorkerProcess", worker)
        monkeypatch.setattr(sys, "argv", ["device_check.py", "--device", "cpu", "--out", str(tmp_path)])
        assert device_check.main() == 0
    environment, *records = read_lines(tmp_path / "device_check_cpu.jsonl")
    assert environment["section"] == "environment" and environment["packages"]["torch"]
    assert not [record for record in records if {"error", "skipped"} & set(record)]
    found = {name: [record for record in records if record["section"] == name] for name in [*SECTIONS, "kernels"]}
    for section in make_sections(TINY):
        assert [record["case"] for record in found[section.name]] == list(section.cases)
    assert all(record["ok"] and record["worst_error"] <= record["tolerance"] for record in found["correctness"])
    assert {record["backend"] for record in found["loader"]} == {"dali", "torch"}
    for record in (*found["loader"], *found["step"]):
        assert record["images_per_second"] > 0
    assert {record["case"] for record in found["kernels"]} == {record["case"] for record in found["step"]}
    assert any("convolution" in record["kernel"] for record in found["kernels"])
    assert found["loop"][0]["whole_of_synthetic"] > 0
    assert found["run"][0]["exit_status"] == 0
    page = (tmp_path / "device_check_cpu.md").read_text()
    assert page == format_report([environment, *records])
    assert [line for line in page.splitlines() if line.startswith("## ")] == [
        f"## {name}" for name in dict.fromkeys(record["section"] for record in records)
    ]


def test_a_wrong_image_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = DeviceWorker(pack_synthetic_set(tmp_path / "set", 200), "cpu", TINY, tmp_path)
    settings = {"loader.backend": "torch", "data.resolution": 28, "loader.batch_size": 64}
    assert check.correctness(settings)[0]["ok"]
    transform = TorchTransform.__call__

    def wrong(self: Any, images: Any, params: Any = None) -> Any:
        output = transform(self, images, params)
        output[7, 0, 5, 5] += 1e-3
        return output

    monkeypatch.setattr(TorchTransform, "__call__", wrong)
    (record,) = check.correctness(settings)
    assert not record["ok"] and 4e-4 < record["worst_error"] < 6e-4


class FakeWorker:
    """Fails in the second case of `loader`, and takes a second for each case of `step`."""

    started = 0

    def __init__(self, *arguments: Any, log: Path) -> None:
        type(self).started += 1

    def call(self, section: str, settings: dict[str, Any], timeout: float) -> list[dict[str, Any]]:
        if section == "loader" and "torch" in settings.values():
            raise WorkerError("out of memory", "OutOfMemoryError", "the traceback")
        if section == "step":
            time.sleep(timeout)
            raise WorkerError(f"no answer in {timeout:g} s")
        return [{"figure": 1234.5}]

    def close(self) -> None:
        pass


def run_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *arguments: str) -> tuple[int, list[dict[str, Any]]]:
    FakeWorker.started = 0
    monkeypatch.setattr(device_check, "WorkerProcess", FakeWorker)
    monkeypatch.setattr(device_check, "pack_synthetic_set", lambda out, images: out)
    monkeypatch.setattr(
        device_check, "collect_env_info", lambda device: {"device": "cpu", "packages": {}}
    )  # git is slow
    monkeypatch.setattr(sys, "argv", ["device_check.py", "--device", "cpu", "--out", str(tmp_path), *arguments])
    status = device_check.main()
    return status, read_lines(tmp_path / "device_check_cpu.jsonl")[1:]


def test_an_error_is_recorded_and_the_next_case_has_a_new_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, records = run_with(monkeypatch, tmp_path, "--only", "correctness,loader,run")
    assert status == 1
    (failed,) = [record for record in records if "error" in record]
    assert failed["case"] == "torch, 32 px, batch 33"
    assert (failed["error"], failed["kind"], failed["traceback"]) == (
        "out of memory",
        "OutOfMemoryError",
        "the traceback",
    )
    assert [record["section"] for record in records] == ["correctness"] * 5 + ["loader"] * 3 + ["run"]
    assert FakeWorker.started == 2
    page = (tmp_path / "device_check_cpu.md").read_text()
    assert "- torch, 32 px, batch 33: out of memory" in page
    assert "1,234" in page


def test_cases_of_dali_take_no_time_where_it_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    status, records = run_with(monkeypatch, tmp_path, "--only", "correctness,run")
    assert status == 0 and FakeWorker.started == 1
    skipped = {record["case"]: record["skipped"] for record in records if "skipped" in record}
    assert list(skipped) == [record["case"] for record in records if record["case"].startswith("dali")] != []
    assert set(skipped.values()) == {"loader.backend=dali, but DALI is not installed"}


class Clock:
    """`time` of the check: only its worker takes time."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


class SlowWorker:
    """Takes as long as `seconds` says for a case, or until its timeout; fails in the sections of `fails`."""

    clock: Clock
    seconds: Callable[[str], float]
    fails: tuple[str, ...] = ()

    def __init__(self, *arguments: Any, log: Path) -> None:
        self._start = 10.0  # of its first call, which imports torch and creates a CUDA context

    def call(self, section: str, settings: dict[str, Any], timeout: float) -> list[dict[str, Any]]:
        assert timeout > 2.9
        needed, self._start = type(self).seconds(section) + self._start, 0.0
        self.clock.now += min(needed, timeout + 0.05)
        if needed > timeout:
            raise WorkerError(f"no answer in {timeout:g} s")
        if section in self.fails:
            raise WorkerError("CUDA error", "AcceleratorError")
        return [{"figure": 1.0, "ok": True}]

    def close(self) -> None:
        self.clock.now += 1


def run_plan(
    monkeypatch: pytest.MonkeyPatch, out: Path, seconds: Callable[[str], float], *fails: str, minutes: float = 8
) -> tuple[float, int, list[dict[str, Any]]]:
    """Run the plan of a GPU; returns the simulated seconds, the exit status and the records."""
    SlowWorker.clock, SlowWorker.seconds, SlowWorker.fails = Clock(), staticmethod(seconds), fails
    monkeypatch.setattr(device_check, "time", SlowWorker.clock)
    monkeypatch.setattr(device_check, "TINY", GPU)
    monkeypatch.setattr(sys.modules[__name__], "FakeWorker", SlowWorker)
    monkeypatch.setattr(SlowWorker, "started", 0, raising=False)
    status, records = run_with(monkeypatch, out, "--minutes", str(minutes))
    return SlowWorker.clock.now, status, records


@pytest.mark.parametrize("minutes", [8, 2])
@pytest.mark.parametrize("seconds", [0.5, 4, 30, 1000])
def test_the_plan_of_a_gpu_ends_in_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seconds: float, minutes: float
) -> None:
    taken, status, records = run_plan(monkeypatch, tmp_path, lambda section: seconds, minutes=minutes)
    assert taken <= 60 * minutes and status == 0
    sections = make_sections(GPU)
    assert [record["case"] for record in records] == [case for section in sections for case in section.cases]
    measured = {record["section"] for record in records if "figure" in record}
    if seconds == 0.5 and minutes == 8:
        assert not [record for record in records if "skipped" in record]
    if seconds <= 4 and minutes == 8:
        assert measured == set(SECTIONS), "a section without time would tell nothing"
    if seconds == 1000:
        assert measured == set()


def test_each_network_is_compiled_for_one_size_of_a_batch() -> None:
    """A compilation of EfficientNet takes a minute; the sections after the first find it in the cache."""
    labels = np.arange(GPU.images) % 62
    samples = LabelledSamples(labels, IndexRanges.first(len(labels)), np.bincount(labels), is_shuffled=True)
    sizes = defaultdict(set)
    for section in make_sections(GPU):
        for settings in section.cases.values():
            if "trainer.compile" in settings:
                fractions = settings.get("data.val_fraction", 0.0), settings.get("data.train_fraction", 1.0)
                train, _ = split_train_val(samples, *fractions, seed=0)
                size = equal_batch_size(len(train), settings["loader.batch_size"])
                sizes[settings["model.name"], settings["loader.batch_size"]].add(size)
    assert {batch for _, batch in sizes} == set(GPU.batches)
    assert all(found == {batch} for (_, batch), found in sizes.items())


def test_time_that_a_section_leaves_is_used_by_the_next(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # A compilation takes a minute; everything before is quick.
    _, _, records = run_plan(monkeypatch, tmp_path, lambda section: 60.0 if section == "step" else 1.0)
    assert sum("figure" in record for record in records if record["section"] == "step") >= 3
    assert [record for record in records if record["section"] in ("loop", "run") and "figure" in record]


@pytest.mark.parametrize("section", SECTIONS)
def test_a_section_that_fails_loses_no_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, section: str) -> None:
    _, status, records = run_plan(monkeypatch, tmp_path, lambda _: 0.5, section)
    assert status == 1
    for record in records:
        if record["section"] == section:
            assert "error" in record or "skipped" in record
        else:
            assert "figure" in record or section == "step"
    assert {record["section"] for record in records if "figure" in record} == set(SECTIONS) - {section}


def test_the_check_stops_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_check, "_RESERVE_SECONDS", 0.0)
    monkeypatch.setattr(device_check, "_LEAST_SECONDS", 0.02)
    start = time.monotonic()
    status, records = run_with(monkeypatch, tmp_path, "--only", "step,loop", "--minutes", "0.01")
    assert time.monotonic() - start < 5
    assert status == 0
    steps = [record["skipped"] for record in records if record["section"] == "step"]
    assert steps in (["stopped, no time left", "no time left"], ["no time left", "no time left"])
    assert records[-1]["section"] == "loop"


def test_a_kill_at_any_time_leaves_complete_lines(tmp_path: Path) -> None:
    program = (
        "import itertools\n"
        "from pathlib import Path\n"
        "from benchmarks.training.device.report import Results\n"
        f"results = Results(Path({str(tmp_path / 'r')!r}), {{'device': 'x', 'packages': {{}}}})\n"
        "for number in itertools.count():\n"
        "    results.add({'section': 's', 'case': 'c' * 5000, 'number': number})\n"
    )
    for milliseconds in (1, 7, 20):
        with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.DEVNULL) as process:
            while not (tmp_path / "r.md").exists() or len((tmp_path / "r.jsonl").read_text()) < 30_000:
                time.sleep(0.001)
            time.sleep(milliseconds / 1000)
            process.send_signal(signal.SIGKILL)
        _, *records = read_lines(tmp_path / "r.jsonl")
        assert [record["number"] for record in records] == list(range(len(records)))
        assert (tmp_path / "r.md").read_text().endswith("|\n")
        for path in tmp_path.iterdir():
            path.unlink()


def test_an_interrupted_check_keeps_its_results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def until_interrupted(section: str) -> float:
        if section == "step":
            raise KeyboardInterrupt
        return 0.5

    with pytest.raises(KeyboardInterrupt):
        run_plan(monkeypatch, tmp_path, until_interrupted)
    environment, *records = read_lines(tmp_path / "device_check_cpu.jsonl")
    assert list(dict.fromkeys(record["section"] for record in records)) == ["device", "correctness", "loader"]
    assert (tmp_path / "device_check_cpu.md").read_text() == format_report([environment, *records])


def test_the_cases_of_a_gpu_come_in_the_order_of_their_worth() -> None:
    sections = make_sections(GPU)
    assert [section.name for section in sections] == SECTIONS
    assert [section.until for section in sections] == sorted(section.until for section in sections)
    assert sections[-1].until == 1
    by_name = {section.name: list(section.cases) for section in sections}
    assert by_name["loader"][0] == "dali, 112 px, batch 1024"
    assert {
        f"torch, resident, {side} px, batch {size}" for side in (28, 112) for size in (512, 1024, 2048, 4096)
    } <= set(by_name["loader"])
    assert by_name["step"][:3] == [
        f"efficientnet_b2, compile={mode}, batch 1024" for mode in ("default", "off", "reduce-overhead")
    ]
    assert {case.partition(",")[0] for case in by_name["step"]} == {f"efficientnet_b{n}" for n in (0, 2, 3)}


def test_values_are_short() -> None:
    values = [None, True, False, 1234567.8, 0.123456, "a|b\nc"]
    assert [format_value(value) for value in values] == ["", "yes", "NO", "1,234,568", "0.1235", "a|b c"]
