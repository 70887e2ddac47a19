"""Opens the loggers that the settings request."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from shards.errors import UserError
from trainer.config.schema import Config
from trainer.runtime.loggers.base import GuardedLogger, MetricLogger, StepFile
from trainer.runtime.loggers.mlflow_logger import MlflowLogger
from trainer.runtime.loggers.tensorboard_logger import TensorBoardLogger
from trainer.runtime.loggers.wandb_logger import WandbLogger

STEPS = "steps.jsonl"


def check_installed(config: Config) -> None:
    """Raise `UserError` if a requested logger needs a package that is not installed."""
    for name in ("tensorboard", "mlflow"):
        if getattr(config.logging, name) and importlib.util.find_spec(name) is None:
            raise UserError(
                found=f"logging.{name}=true, but no package {name}",
                expected=f"{name} installed, or logging.{name}=false",
                hint=f'pip install -e ".[{name}]"',
            )


def open_loggers(
    config: Config, directory: Path, history: list[dict[str, Any]], step: int, study: str | None = None
) -> list[MetricLogger]:
    """Open the requested loggers.

    Args:
        config: Settings of the run.
        directory: The run directory.
        history: Records of the epochs before a resumed run.
        step: Optimizer steps before a resumed run.
        study: Name of the study of which the run is a trial.
    """
    settings = config.logging
    requested = {
        STEPS: (settings.every_steps, lambda: StepFile(directory / STEPS, step)),
        "Weights & Biases": (settings.wandb == "auto", lambda: WandbLogger(config, directory, study)),
        "TensorBoard": (settings.tensorboard, lambda: TensorBoardLogger(config, directory, history, step)),
        "MLflow": (settings.mlflow, lambda: MlflowLogger(config, directory, study)),
    }
    return [GuardedLogger(name, open_logger) for name, (is_on, open_logger) in requested.items() if is_on]
