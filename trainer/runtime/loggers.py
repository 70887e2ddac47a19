"""Metric loggers: receivers of each epoch's metrics besides `metrics.jsonl`."""

from __future__ import annotations

import importlib.util
import logging
import os
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shards.atomic import write_file
from shards.errors import UserError, first_line, quote
from trainer.config.schema import Config

log = logging.getLogger(__name__)

_WANDB_ID = "wandb_id"
_WANDB_TIMEOUT = 60.0  # seconds
_TENSORBOARD = "tensorboard"


class MetricLogger:
    """A receiver of metrics. Its methods do nothing; subclasses override those that they need."""

    def log_epoch(self, record: dict[str, Any]) -> None:
        """Log the record of an epoch, as in `metrics.jsonl`."""

    def log_summary(self, summary: dict[str, Any]) -> None:
        """Log the results of a run, as in `summary.json`."""

    def close(self) -> None:
        """Write what is buffered."""


class GuardedLogger(MetricLogger):
    """A logger that cannot stop a run: at its first exception it is closed with a warning.

    Args:
        name: Name of the service, for the warning.
        open_logger: Opens the logger.
    """

    def __init__(self, name: str, open_logger: Callable[[], MetricLogger]) -> None:
        self._name = name
        self._logger = MetricLogger()
        self._attempt(lambda: setattr(self, "_logger", open_logger()))

    def log_epoch(self, record: dict[str, Any]) -> None:
        self._attempt(lambda: self._logger.log_epoch(record))

    def log_summary(self, summary: dict[str, Any]) -> None:
        self._attempt(lambda: self._logger.log_summary(summary))

    def close(self) -> None:
        self._attempt(lambda: self._logger.close())

    def _attempt(self, operation: Callable[[], None]) -> None:
        try:
            operation()
        except Exception as error:
            log.warning("%s failed: %s. Training continues without it.", self._name, first_line(error))
            self._logger = MetricLogger()


class WandbLogger(MetricLogger):
    """Weights & Biases: online with an API key, otherwise offline (files in the run directory).

    The id is stored in the run directory, so a resumed run continues under the same id.
    """

    def __init__(self, config: Config, directory: Path) -> None:
        import wandb

        id_path = directory / _WANDB_ID
        if not id_path.exists():
            write_file(id_path, uuid.uuid4().hex[:12])

        def init(mode: str) -> wandb.Run:
            return wandb.init(
                id=id_path.read_text(),
                resume="allow" if mode == "online" else None,
                project=config.logging.wandb_project,
                name=directory.name if config.run.dir else f"{config.run.name} {directory.name}",
                dir=directory,
                mode=mode,  # type: ignore[arg-type]  # wandb checks the value of WANDB_MODE
                config=config.model_dump(mode="json"),
                settings=wandb.Settings(silent=True, init_timeout=_WANDB_TIMEOUT),
            )

        try:
            self._run = init(os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False) else "offline"))
        except Exception as error:  # the key, the run or the project is refused, or the server does not answer
            log.warning("Weights & Biases is offline: %s", first_line(error))
            wandb.teardown()
            self._run = init("offline")
        if self._run.settings.mode == "offline":
            log.warning("Weights & Biases: upload the run with: wandb sync %s", quote(Path(self._run.dir).parent))

    def log_epoch(self, record: dict[str, Any]) -> None:
        self._run.log(record, step=record["epoch"])

    def log_summary(self, summary: dict[str, Any]) -> None:
        self._run.summary.update(summary)

    def close(self) -> None:
        # The upload may wait hours for a server that has gone.
        thread = threading.Thread(target=self._run.finish, name="wandb finish", daemon=True)
        thread.start()
        thread.join(_WANDB_TIMEOUT)
        if thread.is_alive():
            raise TimeoutError(
                f"no end of the upload; complete it with: wandb sync {quote(Path(self._run.dir).parent)}"
            )


class TensorBoardLogger(MetricLogger):
    """Event files in the run directory; steps are epochs."""

    def __init__(self, directory: Path, history: list[dict[str, Any]]) -> None:
        """Open the event files.

        Args:
            directory: The run directory.
            history: Records of the epochs before a resumed run. Events of later epochs are purged.
        """
        from torch.utils.tensorboard import SummaryWriter

        # A run that was killed between its last checkpoint and that epoch's event lacks the event: write it again.
        self._writer = SummaryWriter(directory / _TENSORBOARD, purge_step=max(1, len(history)))
        for record in history[-1:]:
            self.log_epoch(record)

    def log_epoch(self, record: dict[str, Any]) -> None:
        self._add(record, "training", record["epoch"])

    def log_summary(self, summary: dict[str, Any]) -> None:
        metrics = {name: summary[name] for name in ("accuracy", "macro_f1", "weighted_f1", "calibration")}
        self._add(metrics, "test", summary["epochs"])

    def close(self) -> None:
        self._writer.close()

    def _add(self, metrics: dict[str, Any], section: str, epoch: int) -> None:
        for name, value in metrics.items():
            if isinstance(value, dict):
                self._add(value, name, epoch)
            elif name != "epoch":
                self._writer.add_scalar(f"{section}/{name}", value, epoch)
        self._writer.flush()  # a killed run keeps its epochs


def check_installed(config: Config) -> None:
    """Raise `UserError` if a requested logger needs a package that is not installed."""
    if config.logging.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UserError(
            found="logging.tensorboard=true, but no package tensorboard",
            expected="tensorboard installed, or logging.tensorboard=false",
            hint="pip install -e '.[tensorboard]'",
        )


def open_loggers(config: Config, directory: Path, history: list[dict[str, Any]]) -> list[MetricLogger]:
    """Open the requested loggers.

    Args:
        config: Settings of the run.
        directory: The run directory.
        history: Records of the epochs before a resumed run.
    """
    loggers: list[MetricLogger] = []
    if config.logging.wandb == "auto":
        loggers.append(GuardedLogger("Weights & Biases", lambda: WandbLogger(config, directory)))
    if config.logging.tensorboard:
        loggers.append(GuardedLogger("TensorBoard", lambda: TensorBoardLogger(directory, history)))
    return loggers
