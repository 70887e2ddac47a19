"""Training end to end: real processes, really stopped, resumed, and shared among ranks."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, assert_user_error, free_port, pack_splits, run_module, synthetic_splits
from support.run_outcome import assert_same_run, history, weights
from support.training_runs import QUICK, stop_in_epoch, train, train_here

from pipeline.transforms.build import choose_backend
from shards import UserError
from trainer.checkpoint.run_dir import RunDirectory
from trainer.loop import engine


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, synthetic_set: Path) -> Path:
    """A recipe with everything that has a state: accumulation, mixing, dropout, average, restarts."""
    path = tmp_path_factory.mktemp("recipe") / "quick.yaml"
    path.write_text(yaml.safe_dump(QUICK | {"data": QUICK["data"] | {"shards": str(synthetic_set)}}))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, recipe: Path) -> Path:
    """The run directory of the recipe, trained without a stop."""
    directory = tmp_path_factory.mktemp("runs") / "whole"
    process = train(recipe, directory)
    assert process.returncode == 0, process.stdout + process.stderr
    return directory


def test_a_run_leaves_what_the_design_says_and_learns(finished: Path) -> None:
    files = {path.relative_to(finished).as_posix() for path in finished.rglob("*") if path.is_file()}
    assert files == {
        "config.yaml",
        "env.json",
        "metrics.jsonl",
        "summary.json",
        "predictions.npz",
        "report.html",
        "checkpoints/last.pt",
        "checkpoints/previous.pt",
        "checkpoints/best.pt",
    }
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["samples"] == 90
    assert summary["accuracy"] > 0.9
    assert summary["epochs"] == 3
    assert summary["resolution"] == 20
    assert summary["parameters"] > 1000
    assert summary["images_per_second"] > 0
    assert 0 <= summary["data_wait_share"] < 1
    assert summary["validation"]["samples"] == 70
    predictions = np.load(finished / "predictions.npz")
    assert float(np.mean(predictions["labels"] == predictions["predicted"])) == summary["accuracy"]
    assert sorted(predictions["rows"]) == list(range(90))


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_stopped_by_a_signal_and_resumed_is_bit_identical(
    how: signal.Signals, finished: Path, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "run"
    assert stop_in_epoch(recipe, directory, epoch=1, how=how, delay=0.3) == 128 + how
    state = torch.load(directory / "checkpoints" / "last.pt", weights_only=True)
    assert (state["epoch"], state["step"] > 0, state["step"] % 2) == (1, True, 0), (
        "stopped within epoch 2, at an update"
    )
    assert not (directory / "summary.json").exists()
    assert train_here(monkeypatch, recipe, directory, "resume=auto") == 0
    assert_same_run(finished, directory)


def test_killed_and_resumed_is_bit_identical(
    finished: Path, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "run"
    assert stop_in_epoch(recipe, directory, epoch=1, how=signal.SIGKILL, delay=0.2) == -signal.SIGKILL
    assert train_here(monkeypatch, recipe, directory, "resume=auto") == 0
    assert_same_run(finished, directory)


def test_the_other_backend_reaches_the_same_figures(
    finished: Path, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train_here(monkeypatch, recipe, tmp_path / "run", "loader.backend=dali") == 0
    first, second = history(finished), history(tmp_path / "run")
    for expected, found in zip(first, second, strict=True):
        assert found["train_loss"] == pytest.approx(expected["train_loss"], rel=0.02)


def test_a_finished_run_is_left_alone(finished: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    assert train_here(monkeypatch, recipe, finished, "resume=auto") == 0
    assert "already complete" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before
    process = train(recipe, finished)
    assert_user_error(process, "resume=auto")


def test_two_ranks_train_and_three_evaluate_the_same(recipe: Path, tmp_path: Path, synthetic_set: Path) -> None:
    directory = tmp_path / "run"
    process = train(recipe, directory, ranks=2)
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stdout.count("report ") == 1
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["accuracy"] > 0.9
    assert summary["samples"] == 90

    found = {}
    for ranks in (1, 3):
        out = tmp_path / f"{ranks}.json"
        arguments = ("trainer.evaluate", directory, synthetic_set, "--json", out)
        if ranks > 1:
            launcher = (f"--nproc_per_node={ranks}", f"--master_port={free_port()}", "-m")
            process = run_module("torch.distributed.run", *launcher, *arguments)
        else:
            process = run_module(*arguments)
        assert process.returncode == 0, process.stderr
        found[ranks] = json.loads(out.read_text())
    for figure in ("accuracy", "macro_f1", "weighted_f1", "samples"):
        assert found[1][figure] == found[3][figure] == summary[figure]


def test_evaluate_writes_the_summary_figures_of_any_set_with_the_same_classes(
    finished: Path, synthetic_set: Path, digits_set: Path, tmp_path: Path
) -> None:
    out = tmp_path / "metrics.json"
    process = run_module("trainer.evaluate", finished, synthetic_set, "--json", out)
    assert process.returncode == 0, process.stderr
    summary, metrics = json.loads((finished / "summary.json").read_text()), json.loads(out.read_text())
    same = (
        "accuracy",
        "macro_f1",
        "weighted_f1",
        "samples",
        "loss",
        "epochs",
        "best_epoch",
        "resolution",
        "parameters",
    )
    for figure in same:
        assert metrics[figure] == summary[figure]
    assert set(metrics) >= {"seconds", "images_per_second", "data_wait_share"}
    assert_user_error(run_module("trainer.evaluate", finished, digits_set), "classes")
    assert_user_error(run_module("trainer.evaluate", tmp_path, synthetic_set), "best.pt")


def test_resuming_refuses_other_classes_and_other_recipes(
    finished: Path, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more_classes = pack_splits(synthetic_splits(classes=7), tmp_path / "seven")
    other_pack = pack_splits(synthetic_splits(), tmp_path / "other", seed=5)
    for overrides, words in (
        ([f"data.shards={more_classes}"], "7 classes"),
        ([f"data.shards={other_pack}"], "packed otherwise"),
        (["optim.lr=0.1"], "optim.lr=0.001"),
    ):
        with pytest.raises(UserError, match=words):
            train_here(monkeypatch, recipe, finished, "resume=auto", *overrides)


def test_dry_run_shows_and_writes_nothing(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert train_here(monkeypatch, recipe, tmp_path / "run", "--dry-run") == 0
    output = capsys.readouterr().out
    for words in (
        "lr: 0.001",
        "[31, 1, 20, 20]",
        "parameters",
        "20 per epoch, 10 optimizer steps",
        "one step      loss",
    ):
        assert words in output
    assert not (tmp_path / "run").exists()


def test_mistakes_end_in_one_message(recipe: Path, tmp_path: Path, synthetic_set: Path) -> None:
    assert_user_error(train(recipe, tmp_path / "run", "data.resolution=0"), "data.resolution")
    assert_user_error(train(recipe, tmp_path / "run", "optim.learning_rate=1"), "did you mean optim.lr")
    assert_user_error(train(recipe, tmp_path / "run", f"data.shards={tmp_path}"), "manifest.json")
    assert_user_error(train(recipe, Path("/proc/none/run")), "/proc/none")
    assert not (tmp_path / "run").exists()


def test_several_ranks_meet_a_mistake_with_one_message(recipe: Path, finished: Path, tmp_path: Path) -> None:
    """Whether all ranks meet it (a model's name) or the first alone (a directory that holds a run)."""
    for directory, override, words in (
        (tmp_path / "run", "model.name=efficientnet_bb", "did you mean"),
        (finished, "seed=0", "resume=auto"),
    ):
        process = train(recipe, directory, override, ranks=2)
        assert process.returncode != 0
        assert process.stderr.count("\nexpected: ") == 1, process.stderr
        assert words in process.stderr
        assert "UserError" not in process.stderr, "no rank ends in a traceback of its own"


def test_a_signal_while_it_validates_the_last_epoch_loses_nothing(
    finished: Path, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "run"
    evaluate, calls = engine.evaluate, []

    def signalled(*arguments: object, **options: object) -> object:
        calls.append(arguments)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "evaluate", signalled)
        assert train_here(patch, recipe, directory) == 128 + signal.SIGTERM
    state = torch.load(directory / "checkpoints" / "last.pt", weights_only=True)
    assert (state["epoch"], state["step"]) == (2, 20), "the epoch's training is saved before it is validated"
    assert len(history(directory)) == 2, "and not validated after the signal"
    assert not (directory / "summary.json").exists(), "the test part is not touched after the signal"
    assert train_here(monkeypatch, recipe, directory, "resume=auto") == 0
    assert_same_run(finished, directory)


def test_resuming_needs_no_first_weights(
    finished: Path, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first_weights, directory = tmp_path / "first.pth", tmp_path / "run"
    torch.save(weights(finished), first_weights)
    override = f"model.init_checkpoint={first_weights}"
    assert stop_in_epoch(recipe, directory, 1, signal.SIGTERM, 0.1, override) == 128 + signal.SIGTERM
    first_weights.unlink()
    assert train_here(monkeypatch, recipe, directory, "resume=auto", override) == 0


def test_a_directory_in_use_is_refused(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "run"
    with RunDirectory(directory).lock(), pytest.raises(UserError, match="another process"):
        train_here(monkeypatch, recipe, directory)


def test_checkpoints_of_others_and_parts_that_are_missing_are_named(
    finished: Path, recipe: Path, synthetic_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "summary.json").unlink()
    for name in ("last.pt", "previous.pt", "best.pt"):
        torch.save({"other": torch.zeros(1)}, run / "checkpoints" / name)
    with pytest.raises(UserError, match=r"key .* is missing"):
        train_here(monkeypatch, recipe, run, "resume=auto")
    assert_user_error(run_module("trainer.evaluate", run, synthetic_set), "key ", " is missing")
    half = tmp_path / "half"
    shutil.copytree(synthetic_set / "train", half / "train")
    with pytest.raises(UserError, match="without its test split"):
        train_here(monkeypatch, recipe, tmp_path / "new", f"data.shards={half}")
    with pytest.raises(UserError, match="which is none"):
        train_here(monkeypatch, recipe, tmp_path / "new", "data.val_fraction=0.0001")


def test_a_file_that_cannot_be_written_is_refused_before_evaluating(finished: Path, synthetic_set: Path) -> None:
    for place, words in (("/nonexistent/x.json", "mkdir -p /nonexistent"), ("/tmp", "/tmp, a directory")):
        process = run_module("trainer.evaluate", finished, synthetic_set, "--json", place)
        assert_user_error(process, words)
        assert "accuracy" not in process.stdout


def test_a_tampered_shard_is_never_trained_on(recipe: Path, tmp_path: Path) -> None:
    shards = pack_splits(synthetic_splits(), tmp_path / "set")
    shard = shards / "train" / "shard-00000.tar"
    content = bytearray(shard.read_bytes())
    content[5000] ^= 1
    shard.chmod(0o644)
    shard.write_bytes(content)
    assert_user_error(train(recipe, tmp_path / "run", f"data.shards={shards}"), "shard-00000.tar", "shards.verify")


@pytest.mark.parametrize("key", ["", "0" * 40])
def test_weights_and_biases_runs_offline_without_a_key_or_a_server(recipe: Path, tmp_path: Path, key: str) -> None:
    process = run_module(
        "trainer.run",
        recipe,
        f"run.dir={tmp_path / 'run'}",
        "logging.wandb=auto",
        "trainer.epochs=2",
        WANDB_API_KEY=key,
        WANDB_BASE_URL="http://127.0.0.1:9",
        HOME=str(tmp_path),
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert ("Weights & Biases is offline" in process.stderr) == bool(key)
    assert list((tmp_path / "run").glob("wandb/offline-run-*/run-*.wandb"))


@pytest.mark.gpu
def test_trains_on_a_gpu(recipe: Path, tmp_path: Path) -> None:
    # Not by a warm process: the processes that compile kernels end if their parent is not the one that started them.
    command = [sys.executable, "-m", "trainer.run", str(recipe), f"run.dir={tmp_path / 'run'}"]
    process = subprocess.run(
        [*command, "device=cuda", "trainer.precision=bf16"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stdout + process.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    environment = json.loads((tmp_path / "run" / "env.json").read_text())
    assert summary["accuracy"] > 0.9
    assert environment["backend"].startswith(choose_backend("auto", "cuda", False)[0])
