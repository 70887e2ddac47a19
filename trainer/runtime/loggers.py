"""Where a run's figures go besides its `metrics.jsonl`: anything that takes an epoch's record and the summary."""

from __future__ import annotations

import importlib.util
import logging
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from shards.atomic import write_file
from shards.errors import UserError
from trainer.settings import Config

log = logging.getLogger(__name__)

_WANDB_ID = "wandb_id"
_TENSORBOARD = "tensorboard"


class MetricLogger(Protocol):
    def log_epoch(self, record: dict[str, Any]) -> None: ...

    def log_summary(self, summary: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class WandbLogger:
    """Weights & Biases: online with an API key, offline (files in the run directory) without.

    A run that goes on is the same one there: its id is kept in the run directory.
    """

    def __init__(self, config: Config, directory: Path) -> None:
        import wandb

        try:
            mode = "online" if wandb.login(prompt=False) else "offline"
        except wandb.Error as error:  # a key, and no way to use it now
            log.warning("Weights & Biases runs offline (%s); `wandb sync` sends it later", error)
            mode = "offline"
        mode = os.environ.get("WANDB_MODE", mode)
        kept = directory / _WANDB_ID
        if not kept.exists():
            write_file(kept, uuid.uuid4().hex[:12])
        self._run = wandb.init(
            id=kept.read_text(),
            resume="allow" if mode == "online" else None,
            project=config.logging.wandb_project,
            name=directory.name if config.run.dir else f"{config.run.name} {directory.name}",
            dir=directory,
            mode=mode,
            config=config.model_dump(mode="json"),
            settings=wandb.Settings(silent=True),
        )

    def log_epoch(self, record: dict[str, Any]) -> None:
        self._run.log(record, step=record["epoch"])

    def log_summary(self, summary: dict[str, Any]) -> None:
        self._run.summary.update(summary)

    def close(self) -> None:
        self._run.finish()


class TensorBoardLogger:
    """Event files in the run directory; steps are epochs."""

    def __init__(self, directory: Path, history: list[dict[str, Any]]) -> None:
        """history: of the epochs before, where a run goes on. What was written of later ones counts no more."""
        from torch.utils.tensorboard import SummaryWriter

        # Killed between the last checkpoint and its event, the run lacks that one: it is written again.
        self._writer = SummaryWriter(directory / _TENSORBOARD, purge_step=max(1, len(history)))
        for record in history[-1:]:
            self.log_epoch(record)

    def log_epoch(self, record: dict[str, Any]) -> None:
        self._add({name: value for name, value in record.items() if name != "epoch"}, "training", record["epoch"])

    def log_summary(self, summary: dict[str, Any]) -> None:
        figures = {name: summary[name] for name in ("accuracy", "macro_f1", "weighted_f1", "calibration")}
        self._add(figures, "test", summary["epochs"])

    def close(self) -> None:
        self._writer.close()

    def _add(self, figures: dict[str, Any], section: str, epoch: int) -> None:
        for name, value in _flat(figures, section):
            self._writer.add_scalar(name, value, epoch)
        self._writer.flush()  # a killed run has its epochs


def _flat(figures: dict[str, Any], section: str) -> Iterator[tuple[str, float]]:
    for name, value in figures.items():
        if isinstance(value, dict):
            yield from _flat(value, name)
        else:
            yield f"{section}/{name}", value


def check_installed(config: Config) -> None:
    """Raise `UserError` if a sink that is asked for needs a package that is not there."""
    if config.logging.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UserError(
            found="logging.tensorboard=true, and no package tensorboard",
            expected="it installed, or the sink left out",
            hint="pip install 'inkstream[tensorboard]'",
        )


def open_loggers(config: Config, directory: Path, history: list[dict[str, Any]]) -> list[MetricLogger]:
    """Those that are asked for. history: records of the epochs before, where a run goes on."""
    sinks: list[MetricLogger] = []
    if config.logging.wandb == "auto":
        sinks.append(WandbLogger(config, directory))
    if config.logging.tensorboard:
        sinks.append(TensorBoardLogger(directory, history))
    return sinks
