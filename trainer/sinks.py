"""Where a run's figures go besides its `metrics.jsonl`: anything that takes an epoch's record and the summary."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any, Protocol

from trainer.settings import Config

log = logging.getLogger(__name__)


class Sink(Protocol):
    def epoch(self, record: dict[str, Any]) -> None: ...

    def summary(self, summary: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class WandbSink:
    """Weights & Biases: online with an API key, offline (files in the run directory) without."""

    def __init__(self, config: Config, directory: Path) -> None:
        import wandb

        try:
            mode = "online" if wandb.login(prompt=False) else "offline"
        except wandb.Error as error:  # a key, and no way to use it now
            log.warning("Weights & Biases runs offline (%s); `wandb sync` sends it later", error)
            mode = "offline"
        self._run = wandb.init(
            project=config.logging.wandb_project,
            name=directory.name if config.run.dir else f"{config.run.name} {directory.name}",
            dir=directory,
            mode=os.environ.get("WANDB_MODE", mode),
            config=config.model_dump(mode="json"),
            settings=wandb.Settings(silent=True),
        )

    def epoch(self, record: dict[str, Any]) -> None:
        self._run.log(record, step=record["epoch"])

    def summary(self, summary: dict[str, Any]) -> None:
        self._run.summary.update(summary)

    def close(self) -> None:
        self._run.finish()


def open_sinks(config: Config, directory: Path) -> list[Sink]:
    return [WandbSink(config, directory)] if config.logging.wandb == "auto" else []
