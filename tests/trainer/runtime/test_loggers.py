"""Where figures go besides metrics.jsonl: once each, and into the same run after a stop."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from conftest import ROOT
from support import warm_process
from support.wandb_server import wandb_server

from shards import UserError
from trainer.config.load import validate
from trainer.config.schema import Config
from trainer.run import main as run_main
from trainer.runtime.loggers import base, wandb_logger
from trainer.runtime.loggers import open as loggers
from trainer.runtime.loggers.base import GuardedLogger
from trainer.runtime.loggers.open import check_installed, open_loggers
from trainer.runtime.loggers.tensorboard_logger import TensorBoardLogger
from trainer.runtime.loggers.wandb_logger import WandbLogger

CONFIG = Config(data={"shards": "x"})


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, synthetic_set: Path) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "loggers.yaml"
    content = {
        "data": {"shards": str(synthetic_set), "resolution": 12},
        "loader": {"batch_size": 32, "backend": "torch"},
        "model": {"name": "three_block_cnn"},
        "trainer": {"epochs": 3, "precision": "fp32"},
        "logging": {"tensorboard": True},
    }
    path.write_text(yaml.safe_dump(content))
    return path


def scalars(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag to (step, value), as TensorBoard shows them."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(directory / "tensorboard"))
    events.Reload()
    return {tag: [(each.step, each.value) for each in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def record(epoch: int, loss: float) -> dict[str, Any]:
    return {"epoch": epoch, "step": 10 * epoch, "train_loss": loss, "validation": {"accuracy": loss / 2}}


def test_tensorboard_has_every_epoch_once_after_a_kill(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-u", "-m", "trainer.run", str(recipe), f"run.dir={run}"]
    process = warm_process.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("epoch 2/3"):
            break
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert [step for step, _ in scalars(run)["training/train_loss"]][:2] == [1, 2]
    time.sleep(1.1)  # the files' names, by which they are read, tell their second

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["trainer.run", str(recipe), f"run.dir={run}", "resume=auto"])
        assert run_main() == 0
    history = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((run / "summary.json").read_text())
    found = scalars(run)
    for tag, figure in (
        ("training/train_loss", lambda each: each["train_loss"]),
        ("validation/accuracy", lambda each: each["validation"]["accuracy"]),
        ("training/images_per_second", lambda each: each["images_per_second"]),
    ):
        assert [step for step, _ in found[tag]] == [1, 2, 3], tag
        assert [value for _, value in found[tag]] == pytest.approx([figure(each) for each in history], rel=1e-5)
    assert found["test/accuracy"] == [(3, pytest.approx(summary["accuracy"], rel=1e-5))]
    assert found["calibration/ece"] == [(3, pytest.approx(summary["calibration"]["ece"], rel=1e-4))]


@pytest.mark.parametrize(("written", "kept"), [(0, 0), (0, 1), (1, 1), (1, 2), (2, 2), (2, 0), (2, 1), (3, 2)])
def test_tensorboard_follows_the_checkpoint(written: int, kept: int, tmp_path: Path) -> None:
    """written: epochs with an event when the run was killed; kept: those of its checkpoint."""
    pytest.importorskip("tensorboard")
    first = TensorBoardLogger(CONFIG, tmp_path, [], 0)
    for epoch in range(1, written + 1):
        first.log_epoch(record(epoch, 10.0 * epoch))
    # TensorBoard reads files in the order of their names, which begin with the second of their start.
    for file in (tmp_path / "tensorboard").glob("events*"):
        file.rename(file.with_name(re.sub(r"\d+", "0000000001", file.name, count=1)))
    history = [record(epoch, 10.0 * epoch) for epoch in range(1, kept + 1)]
    second = TensorBoardLogger(CONFIG, tmp_path, history, 10 * kept)
    for epoch in range(kept + 1, 5):
        second.log_epoch(record(epoch, 10.0 * epoch + 1))
    second.close()
    first.close()
    expected = [(epoch, 10.0 * epoch + (epoch > kept)) for epoch in range(1, 5)]
    assert scalars(tmp_path)["training/train_loss"] == expected


def test_a_missing_package_is_named_before_anything_runs(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = validate(yaml.safe_load(recipe.read_text()), str(recipe))
    check_installed(config)
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as caught:
        check_installed(config)
    assert caught.value.hint == 'pip install -e ".[tensorboard]"'
    check_installed(Config(data={"shards": "x"}))


def test_weights_and_biases_goes_on_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    class Quiet:
        settings = SimpleNamespace(mode="online")

        def finish(self) -> None: ...

        def define_metric(self, name: str, **options: Any) -> None: ...

    import wandb

    monkeypatch.setattr(wandb, "init", lambda **options: asked.append(options) or Quiet())
    monkeypatch.delenv("WANDB_MODE", raising=False)
    config = Config(data={"shards": "x"}, logging={"wandb": "auto"})
    for place, logged_in in (("a", True), ("a", True), ("a", False), ("b", True)):
        (tmp_path / place).mkdir(exist_ok=True)
        monkeypatch.setattr(wandb, "login", lambda logged_in=logged_in, **_: logged_in)
        _, logger = open_loggers(config, tmp_path / place, [], 0)
        assert isinstance(logger, GuardedLogger) and isinstance(logger._logger, WandbLogger)
        logger.close()
    first, again, offline, other = asked
    assert first["id"] == again["id"] == offline["id"] == (tmp_path / "a" / "wandb_id").read_text()
    assert other["id"] != first["id"]
    assert first["resume"] == again["resume"] == "allow", "a run that the server knows goes on, another begins"
    assert offline["resume"] is None, "there is no server to ask"
    assert first["group"] is None
    trial = tmp_path / "study" / "trials" / "0007" / "seed-1"
    trial.mkdir(parents=True)
    open_loggers(config, trial, [], 0, "study")[1].close()
    assert (asked[-1]["group"], asked[-1]["name"]) == ("study", "study 0007 seed-1")
    assert asked[-1]["reinit"] == "create_new", "trials of one process are runs of their own"


@pytest.mark.parametrize(
    "status", [409, *(pytest.param(status, marks=pytest.mark.slow) for status in (401, 403, 404, 429, 500))]
)
def test_a_run_that_weights_and_biases_refuses_is_logged_offline(
    status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(base, "TIMEOUT", 20.0)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with wandb_server(status) as (environment, _):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        _, logger = open_loggers(Config(data={"shards": "x"}, logging={"wandb": "auto"}), tmp_path, [], 0)
        logger.log_epoch(record(1, 0.5))
        logger.close()
    (written,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    messages = [each.getMessage() for each in caplog.records if each.name == wandb_logger.log.name]
    assert len(messages) == 2 and messages[0].startswith("Weights & Biases is offline: ")
    assert messages[1] == f"Weights & Biases: upload the run with: wandb sync {written.parent.parent}"


def synced_by(messages: list[str]) -> set[Path]:
    """The files that the last command of the messages would upload."""
    from click.testing import CliRunner
    from wandb.cli.cli import cli

    message = next(each for each in reversed(messages) if "wandb sync" in each)
    command = shlex.split(message[message.index("wandb sync") :].removesuffix(". Training continues without it."))
    result = CliRunner().invoke(cli, [*command[1:], "--dry-run"])
    assert result.exit_code == 0, result.output
    return {
        Path(line.removeprefix("wandb:").strip()).resolve() for line in result.output.splitlines() if ".wandb" in line
    }


@pytest.fixture
def wandb_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The directory of a run. Its parts are named after the second of their start."""
    import wandb

    monkeypatch.chdir("/")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    wandb.teardown()  # it keeps its mode
    (tmp_path / "a run").mkdir()
    yield tmp_path / "a run"
    wandb.teardown()


def test_one_command_uploads_all_parts_of_an_offline_run(
    wandb_run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    parts: set[Path] = set()
    for epoch in (1, 2, 3):
        time.sleep(1.01 - time.time() % 1)
        _, logger = open_loggers(Config(data={"shards": "x"}, logging={"wandb": "auto"}), wandb_run, [], 0)
        logger.log_epoch(record(epoch, 0.5))
        logger.close()
        found = set(wandb_run.glob("wandb/offline-run-*/run-*.wandb"))
        assert len(found - parts) == 1 and synced_by(caplog.messages) == found
        parts = found


def test_a_command_completes_the_upload_of_an_online_part(
    wandb_run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    parts: set[Path] = set()
    with wandb_server() as (environment, _):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        for _ in range(2):
            time.sleep(1.01 - time.time() % 1)
            _, logger = open_loggers(Config(data={"shards": "x"}, logging={"wandb": "auto"}), wandb_run, [], 0)
            assert isinstance(logger, GuardedLogger) and isinstance(logger._logger, WandbLogger)
            run, finish = logger._logger._run, logger._logger._run.finish
            with monkeypatch.context() as patch:
                patch.setattr(base, "TIMEOUT", 0.0)
                patch.setattr(run, "finish", lambda: time.sleep(0.1))
                logger.close()
            found = set(wandb_run.glob("wandb/run-*/run-*.wandb"))
            assert len(found - parts) == 1 and synced_by(caplog.messages) == found - parts
            parts = found
            finish()
