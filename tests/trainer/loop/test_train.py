"""A run is complete when everything it reports is on disk; signals, terminals and loggers do not lose it."""

from __future__ import annotations

import errno
import json
import os
import pty
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, pack_splits, synthetic_splits
from support import warm_process

from shards import UserError, atomic
from shards.errors import DiskFullError
from trainer.checkpoint.run_dir import RunDirectory, choose_run_dir
from trainer.checkpoint.trained_model import load_trained_model
from trainer.config.schema import Config
from trainer.loop import engine
from trainer.loop import train as train_module
from trainer.run import main as run_main
from trainer.runtime import rendezvous
from trainer.runtime.loggers import open as loggers
from trainer.runtime.loggers.base import GuardedLogger, MetricLogger

RESULTS = ("config.yaml", "env.json", "metrics.jsonl", "predictions.npz", "report.html", "summary.json")
CLOCKED = {"seconds", "training_seconds", "images_per_second", "data_wait_share"}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("recipe")
    splits = synthetic_splits(train=90, test=20, classes=2, shape=(12, 12, 1), transposed=False)
    shards = pack_splits(splits, directory / "set", block_size=16)
    path = directory / "small.yaml"
    settings = {
        "data": {"shards": str(shards), "resolution": 12, "val_fraction": 0.2},
        "loader": {"batch_size": 32},
        "model": {"name": "three_block_cnn"},
        "trainer": {"epochs": 2, "precision": "fp32"},
    }
    path.write_text(yaml.safe_dump(settings))
    return path


def train(recipe: Path, directory: Path, *overrides: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["trainer.run", str(recipe), f"run.dir={directory}", *overrides])
        return run_main()


@pytest.fixture(scope="module")
def undisturbed(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("undisturbed") / "run"
    assert train(recipe, directory) == 0
    return directory


def results(directory: Path) -> dict[str, Any]:
    """Everything that a complete run reports, without times."""
    trained = load_trained_model(directory)
    summary = json.loads((directory / "summary.json").read_text())
    epochs = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    with np.load(directory / "predictions.npz") as predictions:
        arrays = {name: predictions[name].tolist() for name in predictions.files}
    return {
        "weights": {name: weight.tolist() for name, weight in trained.weights.items()},
        "best": (trained.epoch, trained.temperature, trained.tau, trained.posthoc_kwargs()["offsets"].tolist()),
        "summary": {name: value for name, value in summary.items() if name not in CLOCKED},
        "epochs": [{name: value for name, value in epoch.items() if name not in CLOCKED} for epoch in epochs],
        "predictions": arrays,
    }


class TestFullDisk:
    @pytest.mark.parametrize(
        ("code", "every"),
        [(errno.ENOSPC, 5), (errno.EIO, 9), pytest.param(errno.ENOSPC, 1, marks=pytest.mark.slow)],
    )
    def test_at_any_write_the_run_is_complete_or_can_be_resumed(
        self, code: int, every: int, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """From the n-th replacement of a file on, every one fails; with space again, the same command completes it."""
        assert train(recipe, tmp_path / "undisturbed", "trainer.epochs=1") == 0
        expected, replace = results(tmp_path / "undisturbed"), os.replace
        for first in range(0, 30, every):
            directory, count = tmp_path / f"run{first}", 0

            def failing(*arguments: Any, first: int = first) -> None:
                nonlocal count
                count += 1
                if count > first:
                    raise OSError(code, os.strerror(code))
                replace(*arguments)

            with monkeypatch.context() as patch:
                patch.setattr(atomic.os, "replace", failing)
                try:
                    status = train(recipe, directory, "trainer.epochs=1")
                except UserError as error:
                    status = 2
                    kind = "no space left on device" if code == errno.ENOSPC else os.strerror(code)
                    assert f"{kind}: {directory}" in error.found
            if status == 0:
                assert results(directory) == expected
                assert count <= first
                return
            assert not (directory / "summary.json").exists(), first
            assert train(recipe, directory, "trainer.epochs=1", "resume=auto") == 0
            assert results(directory) == expected, first
            assert not [path for path in directory.rglob(".*") if path.name.endswith(".partial")]

    def test_the_last_best_epoch_is_written_when_there_is_space_again(
        self, recipe: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The disk is full during the epochs, and has space at the end."""
        save = engine.checkpoint.save

        def failing(path: Path, state: dict[str, Any]) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        evaluate_best = engine.evaluate_best
        monkeypatch.setattr(engine.checkpoint, "save", failing)

        def with_space(*arguments: Any) -> Any:
            engine.checkpoint.save = save
            return evaluate_best(*arguments)

        monkeypatch.setattr(engine, "evaluate_best", with_space)
        assert train(recipe, tmp_path / "run") == 0
        assert results(tmp_path / "run") == results(undisturbed)

    def test_the_message_names_disk_and_file(
        self, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        savez = np.savez_compressed

        def failing(file: Any, **arrays: Any) -> None:
            savez(file, **arrays)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(np, "savez_compressed", failing)
        with pytest.raises(DiskFullError) as caught:
            train(recipe, tmp_path / "run")
        assert caught.value.found == f"no space left on device: {tmp_path / 'run' / 'predictions.npz'}"
        assert not (tmp_path / "run" / "predictions.npz").exists()


class TestBeginning:
    def test_a_run_killed_while_it_writes_its_settings_starts_again(
        self, recipe: Path, undisturbed: Path, tmp_path: Path
    ) -> None:
        directory = tmp_path / "run"
        (directory / "checkpoints").mkdir(parents=True)
        (directory / ".config.yaml.partial").write_text("data: {sha")
        (directory / "checkpoints" / ".lock").touch()
        assert train(recipe, directory) == 0
        assert results(directory) == results(undisturbed)

    def test_a_directory_with_other_files_is_refused(self, recipe: Path, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").write_text("mine")
        with pytest.raises(UserError, match="exists and is no run"):
            train(recipe, tmp_path)

    def test_runs_of_the_same_second_get_different_directories(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        config = Config(data={"shards": "x"}, run={"name": "same"})
        with ThreadPoolExecutor(8) as pool:
            directories = list(pool.map(lambda _: choose_run_dir(config)[0].path, range(24)))
        assert len(set(directories)) == 24

    def test_a_run_that_fails_before_its_first_file_leaves_no_directory(
        self, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["trainer.run", str(recipe), "model.name=no_such_network"])
        with pytest.raises(UserError):
            run_main()
        assert not [path for path in tmp_path.rglob("*") if path.name != "runs" and path.parent.name != "runs"]


def test_more_epochs_continue_a_complete_run(recipe: Path, undisturbed: Path, tmp_path: Path) -> None:
    """The hint of the refusal works as typed."""
    directory = tmp_path / "run"
    assert train(recipe, directory) == 0
    with pytest.raises(UserError) as caught:
        train(recipe, directory, "resume=auto", "trainer.epochs=3")
    assert "'checkpoint.resume_allow_changes=[trainer.epochs]'" in caught.value.hint
    allowed = "checkpoint.resume_allow_changes=[trainer.epochs]"
    assert train(recipe, directory, "resume=auto", "trainer.epochs=3", allowed) == 0
    summary = RunDirectory(directory).read_summary()
    assert summary["epochs"] == 3
    assert len((directory / "metrics.jsonl").read_text().splitlines()) == 3
    first = (directory / "metrics.jsonl").read_text().splitlines()[0]
    assert json.loads(first)["train_loss"] == results(undisturbed)["epochs"][0]["train_loss"]


@pytest.mark.parametrize("overrides", [[], ["trainer.timeout_minutes=0.002"]])
def test_other_ranks_wait_for_a_download(overrides: list[str], recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heartbeats are sent while the data set is downloaded, and not afterwards."""
    store, key = torch.distributed.HashStore(), "inkstream/rendezvous/heartbeats"
    monkeypatch.setattr(rendezvous, "elastic_agent_store", lambda _: store)

    def download(address: str) -> None:
        deadline = time.monotonic() + 60
        while store.add(key, 0) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    monkeypatch.setattr(train_module, "resolve_dataset", download)
    train_module._load_settings(recipe, ["trainer.timeout_minutes=0.001", *overrides])
    sent = store.add(key, 0)
    time.sleep(0.1)
    assert sent == store.add(key, 0) >= 2


def test_another_number_of_threads_is_a_warning(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    directory, threads = tmp_path / "run", torch.get_num_threads()
    assert train(recipe, directory, "trainer.epochs=1") == 0
    allowed = ("resume=auto", "trainer.epochs=2", "checkpoint.resume_allow_changes=[trainer.epochs]")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: threads + 3)
        assert train(recipe, directory, *allowed) == 0
    assert f"was written with {threads} threads, this process has {threads + 3}" in caplog.text
    assert f"OMP_NUM_THREADS={threads}." in caplog.text
    caplog.clear()
    assert train(recipe, directory, *allowed) == 0, "complete"
    assert "threads" in caplog.text, "the last checkpoint was written with the other number"


@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGTERM", "SIGINT"])
def test_signals_of_terminals_and_schedulers_write_a_checkpoint(
    name: str, recipe: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    number, step = getattr(signal, name), engine.train_step

    def signalled(training: Any, batch: Any, *arguments: Any) -> torch.Tensor:
        if (training.state.epoch, batch.step) == (1, 0):
            signal.raise_signal(number)
        return step(training, batch, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "train_step", signalled)
        assert train(recipe, tmp_path / "run") == 128 + number
    assert train(recipe, tmp_path / "run", "resume=auto") == 0
    assert results(tmp_path / "run") == results(undisturbed)


def test_an_ignored_signal_stays_ignored(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As under nohup."""
    step = engine.train_step

    def signalled(*arguments: Any) -> torch.Tensor:
        signal.raise_signal(signal.SIGHUP)
        return step(*arguments)

    monkeypatch.setattr(engine, "train_step", signalled)
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert train(recipe, tmp_path / "run") == 0
    finally:
        signal.signal(signal.SIGHUP, previous)


class TestOutput:
    def complete(self, recipe: Path, directory: Path, stdout: int, stderr: int, **environment: str) -> int:
        process = warm_process.Popen(
            [sys.executable, "-m", "trainer.run", str(recipe), f"run.dir={directory}"],
            cwd=ROOT,
            stdout=stdout,
            stderr=stderr,
            env={**os.environ, **environment},
        )
        return process.wait(timeout=60)

    def test_a_terminal_that_is_gone_does_not_stop_a_run(self, recipe: Path, undisturbed: Path, tmp_path: Path) -> None:
        terminal, slave = pty.openpty()
        os.close(terminal)
        assert self.complete(recipe, tmp_path / "run", slave, slave) == 0
        os.close(slave)
        assert results(tmp_path / "run") == results(undisturbed)

    def test_nor_a_closed_pipe(self, recipe: Path, tmp_path: Path) -> None:
        reading, writing = os.pipe()
        os.close(reading)
        assert self.complete(recipe, tmp_path / "run", writing, writing) == 0
        os.close(writing)
        assert (tmp_path / "run" / "summary.json").exists()

    def test_nor_a_full_log_device(self, recipe: Path, tmp_path: Path) -> None:
        with open("/dev/full", "w") as full:
            assert self.complete(recipe, tmp_path / "run", full.fileno(), subprocess.STDOUT) == 0
        assert (tmp_path / "run" / "summary.json").exists()


class TestLoggers:
    class Failing(MetricLogger):
        def log_epoch(self, record: dict[str, Any]) -> None:
            raise ConnectionError("run deleted\nby someone")

        def __init__(self) -> None:
            self.closed = 0

        def close(self) -> None:
            self.closed += 1
            raise ConnectionError("still deleted")

    def test_one_that_fails_is_closed_with_a_warning(self, caplog: pytest.LogCaptureFixture) -> None:
        failing = self.Failing()
        logger = GuardedLogger("Weights & Biases", lambda: failing)
        for epoch in (1, 2):
            logger.log_epoch({"epoch": epoch})
        assert failing.closed == 1
        logger.close()
        assert failing.closed == 1, "once"
        assert [record.getMessage() for record in caplog.records] == [
            "Weights & Biases failed: run deleted. Training continues without it."
        ]

    def test_one_that_does_not_open_is_a_warning(self, caplog: pytest.LogCaptureFixture) -> None:
        def refuse() -> MetricLogger:
            raise PermissionError(errno.EACCES, "Permission denied")

        logger = GuardedLogger("TensorBoard", refuse)
        logger.log_epoch({"epoch": 1})
        logger.log_summary({})
        logger.close()
        assert len(caplog.records) == 1 and "TensorBoard failed" in caplog.text

    def test_a_run_completes_with_a_logger_that_fails(
        self, recipe: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(loggers, "TensorBoardLogger", lambda *arguments: self.Failing())
        assert train(recipe, tmp_path / "run", "logging.tensorboard=true") == 0
        assert results(tmp_path / "run")["weights"] == results(undisturbed)["weights"]
