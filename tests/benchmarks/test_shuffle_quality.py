"""Shuffle benchmark: the command, and its measures on orders with known values."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from conftest import assert_user_error, run_module
from PIL import Image

from benchmarks.loaders.shuffle_measures import (
    Quality,
    batch_numbers,
    class_runs,
    class_unevenness,
    measure_quality,
    neighbour_pairs,
    repeated_pairs,
    same_order,
)

N, B = 4096, 64
LABELS = np.arange(N) // 256  # 16 classes, sorted


def cut(rows: np.ndarray) -> list[np.ndarray]:
    return [rows[start : start + B] for start in range(0, N, B)]


def uniform(seed: int) -> list[np.ndarray]:
    return cut(np.random.default_rng(seed).permutation(N))


def compare(*arguments: object) -> subprocess.CompletedProcess:
    return run_module("benchmarks/shuffle_quality.py", *arguments, timeout=180)


def test_orders_are_run_measured_and_drawn(tmp_path: Path) -> None:
    process = compare(
        *("--samples", 2048, "--batch-size", 64, "--loaders", "webdataset,dali-webdataset,ffcv"),
        *("--out", tmp_path, "--json", tmp_path / "lines.jsonl"),
    )
    assert process.returncode == 0, process.stdout + process.stderr
    lines = (tmp_path / "lines.jsonl").read_text()
    assert lines == (tmp_path / "shuffle_quality.jsonl").read_text()
    records = {record["name"]: record for record in map(json.loads, lines.splitlines())}
    assert "ffcv best" in records or "ffcv: skipped, " in process.stdout
    for record in records.values():
        assert record["samples"] == 2048 and record["batch_size"] == 64 and record["epochs"] == 2
        assert 0.9 < record["given"] <= 1
        assert set(Quality.__dataclass_fields__) <= set(record)
    for name in ("inkstream", "torch RandomSampler"):
        for measure, (low, high) in records[name]["uniform"].items():
            slack = 0.5 * (high - low) + 0.02
            assert low - slack <= records[name][measure] <= high + slack, (name, measure)
    assert records["sequential"]["neighbour_pairs"] > 20
    assert records["sequential"]["same_order"] == pytest.approx(1)
    # A buffer of 1,000 of 2,048 shuffles half of them; the same blocks again are the same batches again.
    assert records["webdataset documented"]["class_unevenness"] > 2
    assert records["webdataset blocks"]["repeated_pairs"] > 20
    assert 2 < records["dali-webdataset blocks"]["repeated_pairs"] < 20
    text = (tmp_path / "shuffle_quality.md").read_text()
    assert text.strip() in process.stdout
    assert "| uniform" in text
    picture = np.asarray(Image.open(tmp_path / "shuffle_quality.png").convert("RGB"))
    assert len(np.unique(picture.reshape(-1, 3) // 32, axis=0)) > 5


def test_mistakes_are_one_message(tmp_path: Path) -> None:
    assert_user_error(compare("--loaders", "webdatset"), "webdatset", "did you mean webdataset?")
    assert_user_error(compare("--samples", 100, "--batch-size", 64), "--batch-size 64", "--batch-size 25")


def test_a_uniform_order_is_what_it_is_measured_against() -> None:
    found = [measure_quality([uniform(2 * seed), uniform(2 * seed + 1)], LABELS) for seed in range(10)]
    mean = {name: np.mean([getattr(one, name) for one in found]) for name in Quality.__dataclass_fields__}
    assert mean["neighbour_pairs"] == pytest.approx(1, abs=0.05)
    assert mean["repeated_pairs"] == pytest.approx(1, abs=0.02)
    assert mean["class_unevenness"] == pytest.approx(1, abs=0.05)
    assert mean["mean_class_run"] == pytest.approx(16 / 15, abs=0.01)
    assert mean["reach"] == pytest.approx(0.9, abs=0.03)
    assert mean["displacement"] == pytest.approx(0, abs=0.02)
    assert mean["same_order"] == pytest.approx(0, abs=0.02)


def test_no_shuffle_at_all() -> None:
    epoch = cut(np.arange(N))
    found = measure_quality([epoch, epoch], LABELS)
    # Of 63 other places in a batch, the 8 nearest on each side are taken by neighbours, but for those at its ends.
    inside = sum(B - distance for distance in range(1, 9)) * (N // B)
    pairs = sum(N - distance for distance in range(1, 9))
    assert found.neighbour_pairs == pytest.approx(inside / pairs / ((B - 1) / (N - 1)))
    assert found.repeated_pairs == pytest.approx((N - 1) / (B - 1))
    assert found.mean_class_run == found.longest_class_run == 256
    assert found.reach == pytest.approx(0.9 * (B - 1) / N)
    assert found.displacement == found.same_order == pytest.approx(1)
    # Every batch holds one class of sixteen: chi-square 15 b, where b draws give 15 (N - b) / (N - 1).
    assert found.class_unevenness == pytest.approx(B * (N - 1) / (N - B))


def test_the_same_batches_in_another_order_are_repeats_though_they_look_shuffled() -> None:
    epoch = uniform(0)
    again = [epoch[number] for number in np.random.default_rng(1).permutation(len(epoch))]
    assert neighbour_pairs(epoch, N) == pytest.approx(1, abs=0.2)
    assert repeated_pairs(epoch, again, N) == pytest.approx((N - 1) / (B - 1))
    assert abs(same_order(epoch, again, N)) < 0.5


def test_rows_that_an_epoch_left_out_do_not_count() -> None:
    epoch, following = uniform(0)[:-1], uniform(1)[3:]
    assert (batch_numbers(epoch, N) == -1).sum() == B
    assert repeated_pairs(epoch, following, N) == pytest.approx(1, abs=0.1)
    assert neighbour_pairs(epoch, N) == pytest.approx(1, abs=0.2)
    assert class_unevenness(epoch, LABELS) == pytest.approx(1, abs=0.2)
    assert abs(same_order(epoch, following, N)) < 0.1


def test_class_runs() -> None:
    assert class_runs(np.array([1, 1, 2, 1, 1, 1, 0])).tolist() == [2, 1, 3, 1]
    assert class_runs(np.array([5])).tolist() == [1]
