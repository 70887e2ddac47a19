"""Metric loggers: receivers of each epoch's metrics besides `metrics.jsonl`."""

from __future__ import annotations

import importlib.util
import logging
import os
import uuid
from pathlib import Path
from typing import Any

from shards.atomic import write_file
from shards.errors import UserError
from trainer.config.schema import Config

log = logging.getLogger(__name__)

_WANDB_ID = "wandb_id"
_TENSORBOARD = "tensorboard"


class MetricLogger:
    """A receiver of metrics. Its methods do nothing; subclasses override those that they need."""

    def log_epoch(self, record: dict[str, Any]) -> None:
        """Log the record of an epoch, as in `metrics.jsonl`."""

    def log_summary(self, summary: dict[str, Any]) -> None:
        """Log the results of a run, as in `summary.json`."""

    def close(self) -> None:
        """Write what is buffered."""


class WandbLogger(MetricLogger):
    """Weights & Biases: online with an API key, otherwise offline (files in the run directory).

    The id is stored in the run directory, so a resumed run continues under the same id.
    """

    def __init__(self, config: Config, directory: Path) -> None:
        import wandb

        try:
            mode = "online" if wandb.login(prompt=False) else "offline"
        except wandb.Error as error:  # there is a key, but it cannot be used now
            log.warning("Weights & Biases is offline (%s); upload the run later with `wandb sync`", error)
            mode = "offline"
        mode = os.environ.get("WANDB_MODE", mode)
        id_path = directory / _WANDB_ID
        if not id_path.exists():
            write_file(id_path, uuid.uuid4().hex[:12])
        self._run = wandb.init(
            id=id_path.read_text(),
            resume="allow" if mode == "online" else None,
            project=config.logging.wandb_project,
            name=directory.name if config.run.dir else f"{config.run.name} {directory.name}",
            dir=directory,
            mode=mode,  # type: ignore[arg-type]  # wandb checks the value of WANDB_MODE
            config=config.model_dump(mode="json"),
            settings=wandb.Settings(silent=True),
        )

    def log_epoch(self, record: dict[str, Any]) -> None:
        self._run.log(record, step=record["epoch"])

    def log_summary(self, summary: dict[str, Any]) -> None:
        self._run.summary.update(summary)

    def close(self) -> None:
        self._run.finish()


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
        loggers.append(WandbLogger(config, directory))
    if config.logging.tensorboard:
        loggers.append(TensorBoardLogger(directory, history))
    return loggers
