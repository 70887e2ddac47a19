"""A run is a directory: what was asked, on what it ran, every epoch's figures, the checkpoints, the report."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from shards.atomic import file_lock, make_directory, write_file
from shards.errors import UserError
from trainer.checkpoint import io as checkpoint
from trainer.config.schema import Config

DEFAULT_ROOT = Path("runs")
_CONFIG = "config.yaml"
_SUMMARY = "summary.json"
_LOCK = ".lock"


class RunDirectory:
    """Names and writes the files of a run. Only rank 0 makes one that writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.best = self.checkpoints / checkpoint.BEST
        self.metrics = path / "metrics.jsonl"
        self.environment = path / "env.json"
        self.config = path / _CONFIG
        self.summary_path = path / _SUMMARY
        self.report = path / "report.html"
        self.predictions = path / "predictions.npz"
        self.trace = path / "trace.json.gz"
        self.profile = path / "profile.json"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Make the directory and keep other processes from training in it."""
        make_directory(self.checkpoints)
        busy = UserError(
            found=f"another process that trains in {self.path}",
            expected="one run in a directory at a time",
            hint="wait for it to end, or choose another run.dir",
        )
        with file_lock(self.checkpoints / _LOCK, busy):
            yield

    def begin(self, config: Config, environment: dict[str, Any]) -> None:
        """Write down the settings and the environment."""
        write_file(self.config, config.to_yaml())
        write_file(self.environment, json.dumps(environment, indent=1) + "\n")

    def write_history(self, history: list[dict[str, Any]]) -> None:
        """Replace metrics.jsonl by the epochs that a checkpoint tells of."""
        write_file(self.metrics, "".join(json.dumps(record) + "\n" for record in history))

    def write_summary(self, summary: dict[str, Any]) -> None:
        write_file(self.summary_path, json.dumps(summary, indent=1) + "\n")

    def read_summary(self) -> dict[str, Any]:
        return json.loads(self.summary_path.read_text())


def choose_run_dir(config: Config, earlier: Path | None = None) -> tuple[RunDirectory, bool]:
    """The directory of this run, and whether it continues what is there.

    earlier: the directory that this run was given before its processes were started again; then it is that one.
    Raises `UserError` if run.dir holds a run (or anything else) and resume is not asked for.
    """
    if earlier is not None:
        directory = RunDirectory(earlier)
        return directory, checkpoint.has_checkpoint(directory.checkpoints)
    resume = config.resume == "auto"
    if config.run.dir is not None:
        directory = RunDirectory(config.run.dir)
        if (directory.path / _CONFIG).exists():
            if resume:
                return directory, checkpoint.has_checkpoint(directory.checkpoints)
            raise UserError(
                found=f"run.dir={directory.path}, which holds a run",
                expected="a new directory",
                hint="resume=auto continues it; another run.dir begins anew",
            )
        if directory.path.exists() and not _is_unused(directory.path):
            raise UserError(
                found=f"run.dir={directory.path}, which exists and is no run",
                expected="a new or empty directory",
                hint="choose another run.dir",
            )
        return directory, False
    root = DEFAULT_ROOT / config.run.name
    if resume:
        # Names are dates, so the last in order is the newest.
        unfinished = [
            path.parent
            for path in sorted(root.glob("*/checkpoints"))
            if checkpoint.has_checkpoint(path) and not (path.parent / _SUMMARY).exists()
        ]
        if unfinished:
            return RunDirectory(unfinished[-1]), True
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    directory = RunDirectory(root / stamp)
    number = 2
    while directory.path.exists():
        directory = RunDirectory(root / f"{stamp}_{number}")
        number += 1
    return directory, False


def _is_unused(path: Path) -> bool:
    """Whether a directory holds no file, or only the lock of a run that was killed before it began."""
    return path.is_dir() and all(inner.is_dir() or inner.name == _LOCK for inner in path.rglob("*"))
