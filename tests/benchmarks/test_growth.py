"""Growth benchmark: the command at a tiny size, its loaders, limits of a process, exponents."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import assert_user_error, run_module
from PIL import Image
from support.synthetic_records import pack_pictures

from benchmarks.loaders import growth_report, growth_runs, growth_worker, setting
from benchmarks.loaders.baselines.base import Source
from benchmarks.loaders.growth_runs import Limits
from shards import UserError, open_split

PIXELS = np.random.default_rng(0).integers(0, 256, (300, 6, 4, 1), dtype=np.uint8)
LABELS = np.arange(300) % 3


@pytest.fixture
def source(tmp_path: Path) -> Path:
    Source.write(tmp_path / "source", PIXELS, LABELS, transposed=True, classes=3)
    return tmp_path / "source"


@pytest.mark.slow
def test_the_command_measures_draws_and_continues(digits_set: Path, tmp_path: Path) -> None:
    arguments = ("--shards", digits_set, "--real", 2000, "--loaders", "inkstream,torch", "--out", tmp_path, "--append")
    for size in (2000, 4000):
        process = run_module("benchmarks/growth.py", *arguments, "--sizes", size, timeout=300)
        assert process.returncode == 0, process.stdout + process.stderr
    records = [json.loads(line) for line in (tmp_path / "growth.jsonl").read_text().splitlines()]
    assert not [record for record in records if "failed" in record]
    phases = {(record["name"], record["samples"]): set() for record in records}
    for record in records:
        phases[record["name"], record["samples"]].add(record["phase"])
    measured = {"open", "indices", "step", "indices/s", "images/s", "memory"}
    assert phases == {
        ("inkstream", 2000): measured | {"pack", "prepare"},
        ("inkstream", 4000): measured | {"prepare"},
        ("torch", 2000): measured | {"pack"},
        ("torch", 4000): measured,
    }
    assert (tmp_path / "growth.md").read_text().strip() in process.stdout
    assert np.asarray(Image.open(tmp_path / "growth.png").convert("L")).std() > 5


def test_an_unknown_loader_or_revision_is_one_message() -> None:
    assert_user_error(run_module("benchmarks/growth.py", "--loaders", "torsh"), "torsh", "did you mean torch?")
    with (
        pytest.raises(UserError, match="--before nonsense") as caught,
        growth_runs.checkout("nonsense"),
    ):
        pass
    assert "git log" in caught.value.hint


def test_a_linked_data_set_has_the_images_and_labels_of_its_shard(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.packing.pack.SHARD_BYTES", 1024 * 24)  # 1,024 images
    growth_worker.Inkstream(tmp_path / "set", 5000, source).make()
    store = open_split(tmp_path / "set", "train")
    assert len(store) == 5 * 1024 and len(store.manifest.shards) == 5
    order = np.random.default_rng(1).permutation(len(store))
    rows = store.rows[order]
    assert sorted(rows) == sorted(5 * [*range(1024)])
    assert np.array_equal(store.read(order), PIXELS[rows % 300])
    assert np.array_equal(store.labels[order], LABELS[rows % 300])
    assert store.manifest.counts == tuple(np.bincount(store.labels).tolist())


def test_an_array_is_shuffled_and_read_completely(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(growth_worker, "_SECONDS", 0.01)
    monkeypatch.setattr(growth_worker, "_WARM_UP", 0.01)
    subject = growth_worker.Torch(tmp_path / "array", 1100, source)
    subject.pack()
    array = np.load(tmp_path / "array" / "pixels.npy")
    assert np.array_equal(array, PIXELS.swapaxes(1, 2)[np.arange(1100) % 300])
    first, second = (np.concatenate([*subject.indices(epoch)]) for epoch in (1, 2))
    assert sorted({*first}) == sorted(first) and len(first) == 1024 and (first != second).any()
    growth_worker.measure(subject)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    by_phase = {line["phase"]: line for line in lines}
    assert [*by_phase] == ["import", "open", "indices", "step", "indices/s", "images/s"]
    assert by_phase["images/s"]["per_second"] > 0 and 0 < by_phase["step"]["cpu_seconds"] < 60
    assert sum(map(len, subject.images(1))) == 1100
    repeated = growth_worker.RepeatedRows(PIXELS, 1100)
    assert len(repeated) == 1100 and np.array_equal(repeated[[299, 300, 1099]], PIXELS[[299, 0, 199]])


def watch(code: str, memory: float = 1e12, seconds: float = 60) -> tuple[int, str | None]:
    process = subprocess.Popen([sys.executable, "-S", "-c", code], text=True)
    return growth_runs._watch(process, Limits(memory, seconds, 0))


def test_a_process_is_ended_at_its_limits() -> None:
    hold = "data = b'x' * {}; import time; time.sleep({})"
    assert watch(hold.format(80_000_000, 60), memory=50e6) == (pytest.approx(80e6, rel=1), "over 50.0 MB of memory")
    assert watch("while True: pass", seconds=0.1)[1] == "over 0.1 s"
    peak, reason = watch(hold.format(80_000_000, 0.2))
    assert reason is None and 60e6 < peak < 160e6


def test_the_phases_before_a_failure_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ({"phase": "open", "cpu_seconds": 1.5}, {"phase": "indices"})
    script = "".join(f"print({json.dumps(json.dumps(line))})\n" for line in lines) + "raise ValueError('no indices')\n"
    (tmp_path / "worker.py").write_text(script)
    monkeypatch.setattr(growth_worker, "__file__", str(tmp_path / "worker.py"))
    phases = growth_runs.run_worker({}, tmp_path, Limits(1e12, 60, 0))
    reason = "ValueError: no indices"
    assert phases == [lines[0], {"phase": "indices", "failed": reason}, {"phase": "memory", "failed": reason}]


def test_exponents_and_failures_in_the_report() -> None:
    sizes = [10**5, 10**6, 10**7, 10**8]
    assert growth_report.exponent(sizes, [3 * size**0.5 for size in sizes]) == pytest.approx(0.5)
    # A constant part hides the growth of small sizes: the three largest decide.
    assert growth_report.exponent(sizes, [1e9, *sizes[1:]]) == pytest.approx(1)
    assert growth_report.exponent(sizes[:1], [1.0]) is None

    def record(name: str, samples: int, phase: str, **values: object) -> dict:
        return {"name": name, "samples": samples, "phase": phase, "data": "real", **values}

    records = [record("inkstream", size, "open", cpu_seconds=0.25) for size in sizes]
    records += [record("torch", size, "indices/s", per_cpu_second=1e12 / size) for size in sizes[:2]]
    records += [record("torch", 10**7, "indices/s", failed="over 8.0 GB of memory")]
    environment = {"cores": 2, "processor": "a processor", "device": "cpu", "packages": {"torch": "2"}}
    text = growth_report.growth_markdown(records, ["spdl: skipped"], environment)
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")
    ]
    assert [row[:-1] for row in rows if row[0] == "inkstream"] == [["inkstream", *4 * ["250 ms"]]]
    assert [row[-1].replace("-", "") for row in rows if row[0] == "inkstream"] == ["N^0.00"]
    assert ["torch", "10 M", "1 M", "over 8.0 GB of memory", "", "N^1.00"] in rows
    assert "- spdl: skipped" in text


def test_image_files_of_different_sizes_are_refused(tmp_path: Path) -> None:
    pack_pictures(tmp_path / "set", train=4, test=4)
    with pytest.raises(UserError) as refused:
        setting.open_images(str(tmp_path / "set"))
    assert "image files of different sizes" in refused.value.found and "--size N" in refused.value.hint
