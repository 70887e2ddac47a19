"""The run directory: settings, environment, metrics, checkpoints and report of a run."""

from __future__ import annotations

import contextlib
import itertools
import json
from contextlib import AbstractContextManager
from datetime import datetime
from pathlib import Path
from typing import Any

from shards.atomic import file_lock, make_directory, read_file, write_file
from shards.errors import UserError, errors_as_corrupt, os_errors_as_user_errors, quote
from trainer.checkpoint import io as checkpoint
from trainer.checkpoint import run_files
from trainer.config.load import MAX_YAML_BYTES, read_yaml, validate
from trainer.config.schema import Config

DEFAULT_ROOT = Path("runs")
_LOCK = ".lock"


class RunDirectory:
    """Paths of the files of a run, and methods that write them on rank 0."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.best = self.checkpoints / checkpoint.BEST
        self.metrics = path / "metrics.jsonl"
        self.environment = path / "env.json"
        self.config = path / "config.yaml"
        self.summary_path = path / "summary.json"
        self.report = path / "report.html"
        self.predictions = path / "predictions.npz"
        self.trace = path / "trace.json.gz"
        self.profile = path / "profile.json"
        self._initial_files: dict[Path, str] = {}  # contents that begin wrote, for restore

    def lock(self) -> AbstractContextManager[None]:
        """Create the directory, and lock it against other processes while the context is open."""
        make_directory(self.checkpoints)
        busy = UserError(
            found=f"another process that trains in {self.path}",
            expected="one run in a directory at a time",
            hint="wait until it has ended, or choose another run.dir",
        )
        return file_lock(self.checkpoints / _LOCK, busy)

    def discard_if_empty(self) -> None:
        """Remove the directory of a run that has written no file."""
        for directory in (self.checkpoints, self.path):
            with contextlib.suppress(OSError):  # it does not exist, or is not empty
                directory.rmdir()

    def begin(self, config: Config, environment: dict[str, Any], history: list[dict[str, Any]]) -> None:
        """Write the settings, the environment and the metrics of the epochs that are complete.

        The summary of a complete run that continues with more epochs is removed.
        """
        self.summary_path.unlink(missing_ok=True)
        self._initial_files = {
            self.config: config.to_yaml(),
            self.environment: json.dumps(environment, indent=1) + "\n",
        }
        for path, content in self._initial_files.items():
            write_file(path, content)
        self.write_history(history)

    def restore(self) -> None:
        """Create the directory again, with settings and environment, after it was removed or moved."""
        make_directory(self.checkpoints)
        for path, content in self._initial_files.items():
            write_file(path, content)

    def write_history(self, history: list[dict[str, Any]]) -> None:
        """Replace `metrics.jsonl` by one record per epoch."""
        write_file(self.metrics, "".join(json.dumps(record) + "\n" for record in history))

    def write_summary(self, summary: dict[str, Any]) -> None:
        write_file(self.summary_path, json.dumps(summary, indent=1) + "\n")

    def read_summary(self) -> dict[str, Any]:
        return run_files.read_json(self.summary_path, run_files.Summary, self.hint)

    def read_settings(self) -> tuple[str, Config]:
        """Return `config.yaml` as text and as settings."""
        with errors_as_corrupt(self.config, self.hint):
            text = read_file(self.config, MAX_YAML_BYTES).decode()
        return text, validate(read_yaml(self.config), str(self.config))

    def has_only_weights(self) -> bool:
        """Whether there are weights but no checkpoint to resume, as in an ensemble and in a run that was pulled."""
        return self.best.exists() and not checkpoint.has_checkpoint(self.checkpoints)

    @property
    def hint(self) -> str:
        """How the results of a run are computed again from its checkpoints."""
        if self.has_only_weights():
            return "pull the run again, or combine the runs again"
        summary, settings, run = map(quote, (self.summary_path, self.config, f"run.dir={self.path}"))
        return f"rm -rf {summary}; python -m trainer.run {settings} resume=auto {run}"


def choose_run_dir(config: Config, earlier: Path | None = None) -> tuple[RunDirectory, bool]:
    """Choose the directory of a run.

    Args:
        config: `run.dir`, `run.name` and `resume`.
        earlier: The directory of this run before torchrun restarted its processes.

    Returns:
        The directory, and whether it holds a checkpoint to resume.

    Raises:
        UserError: `run.dir` holds a run and `resume` is not `auto`; or only weights, which a new run would replace; or
            files that are no run.
    """
    resume = config.resume == "auto"
    path = earlier or config.run.dir
    if path is not None:
        directory = RunDirectory(path)
        is_run = earlier is not None or directory.config.exists()
        if directory.has_only_weights():
            raise UserError(
                found=f"run.dir={path}, which holds weights but no checkpoint to resume: the run was downloaded or "
                "combined, or the disk was full",
                expected=f"a run with checkpoints/{checkpoint.LAST}, or a new directory",
                hint=f"choose another run.dir; {quote(f'model.init_checkpoint={directory.best}')} starts from these "
                "weights, if they are those of one network",
            )
        if is_run and not (resume or earlier):
            raise UserError(
                found=f"run.dir={path}, which holds a run",
                expected="a new directory",
                hint="add resume=auto to resume it, or choose another run.dir",
            )
        if not is_run and path.exists() and not _is_unused(path):
            raise UserError(
                found=f"run.dir={path}, which exists and is no run",
                expected="a new or empty directory",
                hint="choose another run.dir",
            )
        return directory, is_run and checkpoint.has_checkpoint(directory.checkpoints)
    root = DEFAULT_ROOT / config.run.name
    if resume:
        runs = [RunDirectory(path) for path in sorted(root.glob("*/"), reverse=True)]  # names are dates
        for run in runs:
            if checkpoint.has_checkpoint(run.checkpoints) and not run.summary_path.exists():
                return run, True
    return RunDirectory(_new_directory(root)), False


def _new_directory(root: Path) -> Path:
    """Make a directory named by date and time; runs that start in the same second get different ones."""
    make_directory(root)
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    with os_errors_as_user_errors(root):
        for name in itertools.chain([stamp], (f"{stamp}_{number}" for number in itertools.count(2))):
            with contextlib.suppress(FileExistsError):
                (root / name).mkdir()
                return root / name
    raise AssertionError("unreachable")


def _is_unused(path: Path) -> bool:
    """Whether a directory holds only what a run that was killed at its start leaves: hidden files and directories."""
    return path.is_dir() and all(inner.is_dir() or inner.name.startswith(".") for inner in path.rglob("*"))
