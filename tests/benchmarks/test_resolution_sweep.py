"""The resolution sweep: real points, killed and resumed; out of memory; statistics; comparison of two files."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support import warm_process

from benchmarks import resolution_sweep
from benchmarks.common.training import FixedStepLoader
from benchmarks.resolution_sweep import QUICK, SweepRunner, make_config, parse, run_sweep
from benchmarks.sweep import point as sweep_point
from benchmarks.sweep.charts import write_png
from benchmarks.sweep.compare import compare
from benchmarks.sweep.page import write_page
from benchmarks.sweep.plan import (
    INTERPOLATIONS,
    Journal,
    Point,
    SweepConfig,
    expected_seconds,
    make_points,
    read_records,
)
from benchmarks.sweep.point import measure_point
from benchmarks.sweep.stats import (
    BY_EPOCHS,
    BY_TIME,
    Estimate,
    SeedGroup,
    fit_power_law,
    group_seeds,
    pareto_front,
    recommend,
)
from benchmarks.sweep.text import SweepResults, sweep_markdown
from shards import UserError
from trainer.data.training_data import open_data
from trainer.models.precision import resolve_precision
from trainer.runtime.distributed import init_distributed

SECONDS = 1.5  # of the runs of equal time; enough for several updates while other processes run
SMALL = ["--resolutions", "8,16", "--epochs", "2", "--seconds", str(SECONDS), "--seeds", "1", "--subset", "0.2"]


def start(*arguments: object, **options: Any) -> subprocess.Popen:
    return warm_process.Popen(
        [sys.executable, "benchmarks/resolution_sweep.py", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.fixture(scope="module")
def out(digits_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small sweep that was killed after its first point and resumed; `stdout` holds the output of the second run."""
    directory = tmp_path_factory.mktemp("sweep")
    lines = directory / "resolution_sweep.jsonl"
    killed = start(*SMALL, "--shards", digits_set, "--out", directory, start_new_session=True)
    end = time.monotonic() + 300
    while not (lines.exists() and lines.read_text().endswith("\n")):
        assert killed.poll() is None and time.monotonic() < end, killed.communicate()
        time.sleep(0.02)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    first = lines.read_text()
    assert first.count("\n") == 1
    lines.write_text(first + first[:100])  # as a kill in the middle of a line leaves it
    resumed = start(*SMALL, "--shards", digits_set, "--out", directory, "--resume")
    output, errors = resumed.communicate(timeout=400)
    assert resumed.returncode == 0, errors
    assert lines.read_text().startswith(first), "the point that was there is not measured again"
    (directory / "stdout").write_text(output)
    return directory


@pytest.fixture
def records(out: Path) -> list[dict[str, Any]]:
    return list(read_records(out / "resolution_sweep.jsonl"))


def test_every_point_has_all_its_figures(out: Path, records: list[dict[str, Any]]) -> None:
    assert [(record["resolution"], record["interpolation"]) for record in records[:2]] == [
        (8, "linear"),
        (16, "linear"),
    ]
    # 8 is the stored size, at which nothing is resized.
    assert {(record["resolution"], record["interpolation"]) for record in records[2:]} == {
        (16, "nearest"),
        (16, "cubic"),
        (16, "lanczos"),
    }
    for record in records:
        assert "failed" not in record
        assert record["loader_images_per_second"]["n"] == 5
        assert record["loader_images_per_second"]["median"] > record["training_images_per_second"]["median"] > 0
        assert 0 < record["loader_cpu_seconds_per_thousand"]["median"] < 1
        assert record["peak_memory_bytes"] > 1e8
        assert 0 <= record["data_wait_share"] < 1
        assert record["bytes_pre_resized_uint8"] == 1797 * record["resolution"] ** 2
        assert record["bytes_at_rest"] == records[0]["bytes_at_rest"] > 1797 * 64
        assert record["environment"]["processor"]
        assert record["out_of_memory"] == []
        by_epochs = record["by_epochs"]
        assert (by_epochs["samples"], by_epochs["validation"]["samples"]) == (359, 144)
        assert by_epochs["updates"] == 2 * 5
        assert by_epochs["images"] == 2 * 5 * (record["training_images"] // 5)
        assert 0 < by_epochs["accuracy"] <= 1
        assert 0 <= by_epochs["ece"] <= 1
        assert 0 <= by_epochs["macro_f1"] <= 1
        assert (record["by_time"] is None) == (record["interpolation"] != "linear")
    for record in records[:2]:
        # Whole updates, as many in either period, planned by the throughput of the epochs.
        by_time, images_per_step = record["by_time"], record["training_images"] / 5
        planned = SECONDS * record["training_images_per_second"]["median"] / images_per_step / 2
        assert by_time["updates"] == 2 * int(planned)


def test_the_report_and_the_chart_are_written(out: Path, records: list[dict[str, Any]]) -> None:
    output = (out / "stdout").read_text()
    assert "[1/2] three_block_cnn at 8x8, linear, 20% of the images, seed 0: already measured" in output
    text = (out / "resolution_sweep.md").read_text()
    assert text.strip() in output
    assert "The next larger resolution" in text or "No larger resolution" in text
    assert "evaluates the test split once" in text
    for name in INTERPOLATIONS:
        assert f"| {name} " in text
    picture = np.asarray(Image.open(out / "resolution_sweep.png").convert("RGB"))
    assert picture.shape[1] > 1000
    assert len(np.unique(picture.reshape(-1, 3) // 32, axis=0)) > 5


def test_the_page_stands_alone(out: Path) -> None:
    page = (out / "resolution_sweep.html").read_text()
    assert not re.search(r"https?:|<script|<link|@import|src=|url\((?!#)", page.replace("http://www.w3.org/", ""))
    pictures = re.findall(r'role="img" aria-label="([^"]*)"', page)
    assert len(pictures) == page.count("<svg") == 5
    assert all(len(words) > 60 for words in pictures)
    for rule in ("prefers-color-scheme: dark", "@media print", "var(--s1)"):
        assert rule in page
    assert "#1d4ed8" not in page.partition("</style>")[2], "a colour that the dark cannot change"
    names = re.findall(r'\bid="([^"]*)"', page)
    assert len(names) == len(set(names))
    used = re.findall(r'(?:href="#|url\(#)([^")]*)', page)
    assert used
    assert set(used) <= set(names)
    assert "Recommended after 2 epochs" in page


def test_previous_results_are_kept_unless_resumed(out: Path, tmp_path: Path) -> None:
    lines = tmp_path / "resolution_sweep.jsonl"
    lines.write_bytes((out / "resolution_sweep.jsonl").read_bytes())
    journal = Journal(lines, synthetic_config(), resume=True)
    assert (journal.records, len(journal.other_records)) == ([], 5)
    journal.append(POINT, {"failed": "for a test"})
    assert len(list(read_records(lines))) == 6
    Journal(lines, synthetic_config(), resume=False)
    assert not lines.exists()
    assert len(list(read_records(tmp_path / "resolution_sweep.previous.jsonl"))) == 6


# Out of memory, and other ends of a point.

POINT = Point("three_block_cnn", 1.0, 16, "linear", 0)
RECIPE = {"data": {"shards": "", "val_fraction": 0.1}, "loader": {"batch_size": 64}, "trainer": {"epochs": 3}}


def synthetic_config(shards: Path = Path("nowhere"), **changes: Any) -> SweepConfig:
    return replace(SweepConfig(shards, "digits", "0" * 64, RECIPE, 1.0, None), **changes)


def _greedy(config: SweepConfig, point: Point, batch_size: int, accumulation: int) -> dict[str, Any]:
    if batch_size == 64:
        os.kill(os.getpid(), signal.SIGKILL)
    if batch_size == 32:
        torch.empty(1 << 60, dtype=torch.uint8)
    if batch_size == 16:
        np.ones(1 << 60, np.uint8)
    return {"learned": [batch_size, accumulation]}


def _too_large(config: SweepConfig, point: Point, batch_size: int, accumulation: int) -> dict[str, Any]:
    raise MemoryError("no room")


def _without_memory(config: SweepConfig, point: Point, batch_size: int, accumulation: int) -> dict[str, Any]:
    raise ValueError("kernel larger than the image")


def _mistaken(config: SweepConfig, point: Point, batch_size: int, accumulation: int) -> dict[str, Any]:
    raise UserError(found="a", expected="b", hint="c")


def test_out_of_memory_halves_the_batch_and_is_reported(digits_set: Path) -> None:
    *messages, record = measure_point(synthetic_config(digits_set), POINT, _greedy)
    assert [
        f"retrying with batch size {size}" in message for size, message in zip((32, 16, 8), messages, strict=True)
    ] == [True] * 3
    assert record["learned"] == [8, 8], "the updates stay those of 64 images"
    assert (record["batch_size"], record["accumulation"]) == (8, 8)
    assert [attempt["batch_size"] for attempt in record["out_of_memory"]] == [64, 32, 16]
    reasons = [attempt["reason"] for attempt in record["out_of_memory"]]
    assert "killed" in reasons[0]
    assert all("llocate" in reason for reason in reasons[1:])


def test_an_unmeasurable_point_is_a_failure_and_a_user_error_is_raised(digits_set: Path) -> None:
    *messages, record = measure_point(synthetic_config(digits_set), POINT, _too_large)
    assert len(messages) == 3
    assert record["failed"] == "out of memory at batch size 8: no room"
    assert record["bytes_at_rest"] > 0
    (record,) = measure_point(synthetic_config(digits_set), POINT, _without_memory)
    assert record["failed"] == "kernel larger than the image"
    with pytest.raises(UserError):
        list(measure_point(synthetic_config(digits_set), POINT, _mistaken))


# Equal training time.


def test_periods_continue_the_passes_and_the_schedule_completes(
    digits_set: Path,
) -> None:
    recipe = {
        **RECIPE,
        "model": {"name": "three_block_cnn"},
        "optim": {"lr": 1e-3},
        "schedule": {"name": "one_cycle", "warmup": 1},
    }
    sweep_config = synthetic_config(digits_set, recipe=recipe)
    with init_distributed("cpu") as world:
        point = replace(POINT, resolution=8, subset=0.2)
        settings = resolve_precision(sweep_config.point_config(point, 64, 1), world.device)
        data = open_data(settings, world)
        assert data.train.steps(0) == 5
        stretched = FixedStepLoader(data.train, steps=7)
        rows = [batch.source_index for number in range(3) for batch in stretched.batches(number)]
        passes = [batch.source_index for number in range(5) for batch in data.train.batches(number)]
        assert len(rows) == 21
        assert all(torch.equal(one, other) for one, other in zip(rows, passes, strict=False))
        assert [batch.step for batch in stretched.batches(1, first_step=4)] == [4, 5, 6]
        figures, history, _ = sweep_point._train(settings, replace(data, train=stretched), world)
    assert figures["updates"] == 21
    assert history[0]["lr"] > history[-1]["lr"]
    assert history[-1]["lr"] < 0.02 * settings.optim.lr


# Statistics.


def test_an_estimate_has_the_larger_of_both_errors() -> None:
    estimate = Estimate.of([0.8, 0.9, 1.0])
    assert (estimate.mean, estimate.std, estimate.n) == (pytest.approx(0.9), pytest.approx(0.1), 3)
    assert estimate.std_error == pytest.approx(0.1 / math.sqrt(3))
    assert Estimate.of([0.8, 0.9, 1.0], samples=10**6).std_error == pytest.approx(0.1 / math.sqrt(3))
    few = Estimate.of([1.0], samples=96)
    assert few.std is None
    assert few.std_error == pytest.approx(math.sqrt(0.98 * 0.02 / 100))  # (96 + 2) / (96 + 4)
    assert Estimate.of([0.5]).std_error is None


def test_growth_finds_the_exponent_and_its_error() -> None:
    exact = fit_power_law([10, 100, 1000], [2.0 * side**1.5 for side in (10, 100, 1000)])
    assert exact is not None
    assert (exact.factor, exact.exponent) == (pytest.approx(2), pytest.approx(1.5))
    assert exact.std_error == pytest.approx(0, abs=1e-9)
    # In logarithms 0, 1, 2 against 0, 1, 0: slope 0, residuals -1/3, 2/3, -1/3, so sqrt(6/9 / 1 / 2).
    bent = fit_power_law([1, math.e, math.e**2], [1, math.e, 1])
    assert bent is not None
    assert (bent.exponent, bent.std_error) == (pytest.approx(0), pytest.approx(math.sqrt(1 / 3)))
    line = fit_power_law([1, 4], [1, 2])
    assert line is not None
    assert (line.exponent, line.std_error) == (pytest.approx(0.5), None)
    assert fit_power_law([784], [1]) is None


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=9))
def test_no_point_dominates_the_front(found: list[tuple[int, int]]) -> None:
    front = [found[number] for number in pareto_front(found)]
    beaten = {one for one in found for other in found if other != one and other[0] >= one[0] and other[1] >= one[1]}
    assert set(front) == set(found) - beaten
    assert front == sorted(set(front), reverse=True)


def synthetic_record(resolution: int, accuracy: float, seed: int = 0, **changes: Any) -> dict[str, Any]:
    rate = 1e6 / resolution**2
    run = {"accuracy": accuracy, "macro_f1": accuracy, "ece": 0.02, "samples": 10_000, "updates": 50}
    run |= {"validation": {"accuracy": accuracy, "samples": 10_000}, "training_seconds": 1.0, "wall_seconds": 2.0}
    record = {
        **vars(replace(POINT, resolution=resolution, seed=seed)),
        **synthetic_config().identity(),
        "dataset": "digits",
        "image_shape": [8, 8, 1],
        "batch_size": 64,
        "accumulation": 1,
        "out_of_memory": [],
        "bytes_at_rest": 157_000,
        "bytes_pre_resized_uint8": 1797 * resolution**2,
        "bytes_pre_resized_float32": 4 * 1797 * resolution**2,
        "loader_images_per_second": {
            "median": 9e6 / resolution,
            "low": 8e6 / resolution,
            "high": 1e7 / resolution,
            "n": 5,
        },
        "loader_cpu_seconds_per_thousand": {"median": 0.01, "low": 0.009, "high": 0.011, "n": 5},
        "training_images_per_second": {"median": rate, "low": 0.95 * rate, "high": 1.05 * rate, "n": 4},
        "loader_backend": "torch",
        "training_images": 1294,
        "data_wait_share": 0.01,
        "peak_memory_bytes": 10**9,
        "peak_device_memory_bytes": None,
        "parameters": 1000,
        "precision": "fp32",
        "epochs": 5,
        "seconds": 1.0,
        "by_epochs": run,
        "by_time": copy.deepcopy(run),
        "point_seconds": 10.0,
        "environment": {"processor": "P", "device": "cpu", "cores": 2},
    }
    return record | changes


def test_the_smallest_resolution_within_one_standard_error_is_chosen() -> None:
    """At 98 % of 10,000 images one standard error is 0.14 points."""
    found = group_seeds(
        [synthetic_record(side, share) for side, share in ((14, 0.97), (28, 0.9792), (56, 0.98), (84, 0.9795))]
    )
    choice = recommend(found, BY_EPOCHS)
    assert choice is not None and choice.next_larger is not None
    assert [cell.resolution for cell in (choice.chosen, choice.best, choice.next_larger)] == [28, 56, 56]
    text = sweep_markdown(SweepResults([record for cell in found for record in cell.records], "linear"))
    assert "28x28, the smallest resolution whose validation accuracy (97.92%) lies within one standard error" in text
    assert "The next larger resolution, 56x56, costs 4.00 times the training time per image" in text
    assert "gains 0.08 points of test accuracy (standard error 0.20)" in text
    assert "to the power of 1.00 ± 0.00" in text
    alone = recommend(found[:1], BY_TIME)
    assert alone is not None and alone.next_larger is None


def test_models_at_one_resolution_share_their_tables_and_charts(tmp_path: Path) -> None:
    scores = {"three_block_cnn": 0.9, "resnet18": 0.97, "vgg16": 0.95}
    records = [synthetic_record(28, score, model=name, parameters=11_000) for name, score in scores.items()]
    records[-1]["by_time"] = {"failed": "too slow"}
    results = SweepResults(records, "linear")
    text = sweep_markdown(results)
    assert text.startswith("### Models at 28x28, all 1,294 training images") and text.count("###") == 2
    assert text.count("| resnet18 ") == text.count("| vgg16 ") == 3 and "|     11,000 |" in text
    assert "After 5 epochs: resnet18 has the best validation accuracy, 97.00%" in text
    assert "larger resolution" not in text and "models are selected on the validation split" in text
    write_png(results, tmp_path / "models.png")
    assert Image.open(tmp_path / "models.png").width > 1000
    write_page(results, tmp_path / "models.html")
    page = (tmp_path / "models.html").read_text()
    assert "cost and accuracy of each model</h1>" in page and "Training time per image" in page
    assert page.count("<svg") == 3 and ">Recommended" not in page

    few = [{**record, "subset": 0.1, "training_images": 129} for record in records]
    write_page(SweepResults([*few, *records], "linear"), tmp_path / "models.html")
    subtitle = re.search(r'<p class="muted">(.*?), on P</p>', (tmp_path / "models.html").read_text())
    assert subtitle and subtitle[1] == "Models at 28x28, all 1,294 training images", "that of the headline"

    both = SweepResults([*records, synthetic_record(56, 0.98, model="vgg16")], "linear")
    assert "### Models" not in sweep_markdown(both), "there is a resolution to recommend"


def test_points_that_only_compare_interpolations_have_their_own_table() -> None:
    record = synthetic_record(28, 0.97)
    others = [
        synthetic_record(28, 0.96, interpolation=name, by_time=None, seconds=None) for name in ("cubic", "nearest")
    ]
    text = sweep_markdown(SweepResults([*others, record], "linear"))
    assert text.index("### Interpolation at 28x28") < text.index("| nearest") < text.index("| linear")
    assert "After 1 s of training: 28x28" in text


def test_interpolations_are_not_compared_where_nothing_is_resized() -> None:
    stored = [synthetic_record(side, 0.98, image_shape=[28, 28, 1]) for side in (28, 56)]
    at = SweepResults(stored, "linear").interpolation_group()
    assert at is not None and at.resolution == 56
    assert SweepResults(stored[:1], "linear").interpolation_group() is None


def test_failures_and_smaller_batches_are_reported() -> None:
    smaller = synthetic_record(
        56, 0.98, batch_size=16, accumulation=4, out_of_memory=[{"batch_size": 64, "reason": "x"}]
    )
    failed = {**vars(replace(POINT, resolution=112)), **synthetic_config().identity(), "failed": "no room"}
    text = sweep_markdown(
        SweepResults([synthetic_record(28, 0.9), smaller, failed], "linear", ["three_block_cnn at 224x224"])
    )
    assert "out of memory at batch size 64, so measured with batch size 16 and gradient accumulation 4" in text
    assert "112x112, linear, 100% of the images, seed 0: FAILED, no room" in text
    assert "three_block_cnn at 224x224: skipped" in text


# Points.


def test_an_interrupted_sweep_covers_every_resolution() -> None:
    found = make_points(synthetic_config(), ["a", "b"], [1.0, 0.002], [56, 28], seeds=2)
    assert [(one.seed, one.subset, one.model, one.resolution) for one in found[:5]] == [
        (0, 0.002, "a", 28),
        (0, 0.002, "a", 56),
        (0, 0.002, "b", 28),
        (0, 0.002, "b", 56),
        (0, 1.0, "a", 28),
    ]
    assert len(set(found)) == len(found) == 16
    assert {one.seed for one in found[8:]} == {1}


def test_a_point_is_expected_to_take_as_much_longer_as_it_has_pixels() -> None:
    measured = [synthetic_record(28, 0.9), synthetic_record(56, 0.9, point_seconds=16.0)]
    assert expected_seconds(POINT, []) is None
    assert expected_seconds(replace(POINT, resolution=56, seed=3), measured) == pytest.approx(16)
    # Four times the pixels of 56: its 2 s of epochs become 8.
    assert expected_seconds(replace(POINT, resolution=112), measured) == pytest.approx(22)
    assert expected_seconds(replace(POINT, model="another"), measured) is None


def test_points_beyond_the_time_budget_are_skipped_and_listed(
    digits_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begun = []

    def stand_in(config: SweepConfig, point: Point) -> Any:
        begun.append(point.resolution)
        yield synthetic_record(point.resolution, 0.98)

    monkeypatch.setattr(resolution_sweep, "measure_point", stand_in)
    sweep_config = synthetic_config(digits_set)
    journal = Journal(tmp_path / "resolution_sweep.jsonl", sweep_config, resume=False)
    runner = SweepRunner(sweep_config, journal, minutes=0.3)
    runner.run([replace(POINT, resolution=side) for side in (28, 40, 112)])
    # Of the 18 s 40 pixels are expected to take 10 + 2 * 1.04, and 112 then 10 + 2 * 6.84, which is too much.
    assert begun == [28, 40]
    assert runner.skipped == ["three_block_cnn at 112x112, linear, 100% of the images, seed 0"]
    assert "112x112, linear, 100% of the images, seed 0: skipped" in capsys.readouterr().out
    assert [record["resolution"] for record in read_records(tmp_path / "resolution_sweep.jsonl")] == [28, 40]


def test_two_sweeps_do_not_write_the_same_file(digits_set: Path, tmp_path: Path) -> None:
    from shards.atomic import file_lock

    with file_lock(tmp_path / ".resolution_sweep.lock"), pytest.raises(UserError, match="another sweep"):
        run_sweep(synthetic_config(digits_set), [], 1, tmp_path / "resolution_sweep", resume=False, minutes=None)


def arguments_of(monkeypatch: pytest.MonkeyPatch, *words: object) -> Any:
    monkeypatch.setattr(sys, "argv", ["resolution_sweep.py", *map(str, words)])
    return parse()


def test_a_point_overrides_settings_of_the_recipe(digits_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = arguments_of(monkeypatch, "--config", "configs/quickstart.yaml", "--shards", digits_set, "--epochs", 3)
    sweep_config = make_config(given, QUICK)
    settings = sweep_config.settings
    assert (settings.trainer.epochs, sweep_config.seconds, sweep_config.dataset) == (3, QUICK.seconds, "digits")
    point = Point("efficientnet_b0", 0.5, 96, "lanczos", 7)
    config = sweep_config.point_config(point, 32, 2)
    assert (config.model.name, config.data.train_fraction, config.data.resolution) == ("efficientnet_b0", 0.5, 96)
    assert (config.data.interpolation, config.seed) == ("lanczos", 7)
    assert (config.loader.batch_size, config.optim.grad_accumulation) == (32, 2)
    assert config.optim.lr == settings.optim.lr
    other = make_config(arguments_of(monkeypatch, "--config", "configs/quickstart.yaml", "--shards", digits_set), QUICK)
    assert other.identity()["set"] == sweep_config.identity()["set"]
    assert other.identity()["settings"] != sweep_config.identity()["settings"]
    assert synthetic_config(recipe=RECIPE | {"seed": 5}).identity() == synthetic_config().identity()
    assert synthetic_config(seconds=2.0).identity() != synthetic_config().identity()


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--resolutions", "28,0"], "--resolutions 28,0"),
        (["--resolutions", "28,x"], "--resolutions 28,x"),
        (["--resolutions", "28.5"], "--resolutions 28.5"),
        (["--resolutions", "5000"], "5000"),
        (["--subset", "1.5"], "--subset 1.5"),
        (["--subset", "0"], "--subset 0"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--compare", "nowhere.jsonl", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_a_mistake_is_refused_before_anything_is_measured(
    digits_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], found: str
) -> None:
    arguments_of(monkeypatch, *words, "--shards", digits_set, "--out", tmp_path / "out")
    with pytest.raises(UserError) as caught:
        resolution_sweep.main()
    assert found in caught.value.found
    assert not (tmp_path / "out").exists()


def test_a_mistake_ends_with_status_2() -> None:
    process = start("--resolutions", "28,0")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "hint: --resolutions 28,56,112" in errors
    assert "Traceback" not in errors


# Comparison of two files.


def write(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_a_file_compared_with_itself_shows_no_regression(out: Path) -> None:
    path = out / "resolution_sweep.jsonl"
    text, worse = compare(path, path)
    assert not worse
    assert "REGRESSION" not in text
    assert "better" not in text
    assert text.count("training images/s") == 5


def test_the_last_data_set_of_a_file_is_compared(tmp_path: Path) -> None:
    record, other = synthetic_record(28, 0.98), synthetic_record(28, 0.5) | {"set": "other"}
    before = write(tmp_path / "a.jsonl", record)
    alone = compare(before, write(tmp_path / "b.jsonl", record))
    assert compare(before, write(tmp_path / "b.jsonl", other, record)) == alone
    with pytest.raises(UserError, match="no point that both"):
        compare(before, write(tmp_path / "b.jsonl", record, other))


def test_a_change_beyond_the_spread_of_both_files_is_a_regression(tmp_path: Path) -> None:
    before = [synthetic_record(28, share, seed) for seed, share in enumerate((0.980, 0.981, 0.982))]
    after = copy.deepcopy(before)
    for record in after:
        record["training_images_per_second"] = {"median": 1000.0, "low": 990.0, "high": 1010.0, "n": 4}  # was 1,276
        record["peak_memory_bytes"] = int(1.04e9)  # within what it varies by
        record["by_epochs"]["accuracy"] -= 0.002  # within the standard error of 0.14 points of either
        record["by_time"]["accuracy"] += 0.01
    text, worse = compare(write(tmp_path / "a.jsonl", *before), write(tmp_path / "b.jsonl", *after))
    verdicts = {
        line.split("|")[2].strip(): line.split("|")[6].strip() for line in text.splitlines() if "| three" in line
    }
    assert worse
    assert {name for name, verdict in verdicts.items() if verdict == "REGRESSION"} == {"training images/s"}
    assert {name for name, verdict in verdicts.items() if verdict == "better"} == {"accuracy, time"}
    text, worse = compare(tmp_path / "b.jsonl", tmp_path / "a.jsonl")
    assert worse, "the accuracy after a fixed time"
    assert text.count("REGRESSION") == 1


def test_a_new_failure_is_a_regression_and_another_machine_is_reported(tmp_path: Path) -> None:
    kept = synthetic_record(28, 0.98, environment={"processor": "Q", "device": "cpu", "cores": 2})
    failed = {**vars(replace(POINT, resolution=56)), **synthetic_config().identity(), "failed": "no room"}
    before = write(tmp_path / "a.jsonl", synthetic_record(28, 0.98), synthetic_record(56, 0.98))
    text, worse = compare(before, write(tmp_path / "b.jsonl", kept, failed))
    assert worse
    assert "three_block_cnn, 56, linear: REGRESSION" in text
    assert "the processors differ: P in" in text


def test_files_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    one = write(tmp_path / "a.jsonl", synthetic_record(28, 0.98))
    for name, content, found in (
        ("other.jsonl", json.dumps(synthetic_record(28, 0.98, set="1" * 64)) + "\n", "no point that both"),
        ("empty.jsonl", "", "empty"),
        ("old.jsonl", '{"name": "resolution_sweep", "resolution": 28}\n', "line 1"),
        ("binary.jsonl", "\0", "line 1"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError) as caught:
            compare(one, tmp_path / name)
        assert found in caught.value.found


def test_groups_differ_only_in_the_seed() -> None:
    found = group_seeds([synthetic_record(56, 0.9), synthetic_record(28, 0.8, 1), synthetic_record(28, 0.9, 0)])
    assert [(cell.resolution, len(cell.records)) for cell in found] == [(28, 2), (56, 1)]
    assert isinstance(found[0], SeedGroup)
    spread = found[0].spread("loader_images_per_second")
    assert (spread.n, spread.low) == (10, pytest.approx(8e6 / 28))
