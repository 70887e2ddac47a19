"""TensorBoard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from trainer.config.schema import Config, flatten
from trainer.runtime.loggers.base import BINS, MetricLogger, PredictionImages, flat_metrics, test_metrics, weight_arrays

_DIRECTORY = "tensorboard"


class TensorBoardLogger(MetricLogger):
    """Event files in the run directory, by epoch, and in its subdirectory `steps`, by optimizer step."""

    def __init__(self, config: Config, directory: Path, history: list[dict[str, Any]], step: int) -> None:
        """Open the event files.

        Args:
            config: Settings, the hyperparameters of the run.
            directory: The run directory.
            history: Records of the epochs before a resumed run. Events of later epochs are purged.
            step: Optimizer steps that are done. Events of later steps are purged.
        """
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        self._writer = SummaryWriter(directory / _DIRECTORY, purge_step=max(1, len(history)))
        self._steps = SummaryWriter(directory / _DIRECTORY / "steps", purge_step=step + 1)
        plain = {
            name: value if isinstance(value, bool | int | float | str) else str(value)
            for name, value in flatten(config.model_dump(mode="json"))
        }
        experiment, start, self._end = hparams(plain, {"test/accuracy": 0.0, "validation/accuracy": 0.0})
        for summary in (experiment, start):
            self._writer._get_file_writer().add_summary(summary, 0)
        self._epoch = len(history)
        # A run that was killed between its last checkpoint and that epoch's event lacks the event: write it again.
        for record in history[-1:]:
            self.log_epoch(record)

    def log_step(self, record: dict[str, Any]) -> None:
        for name, value in record.items():
            if name != "step":
                self._steps.add_scalar(f"step/{name}", value, record["step"])

    def log_epoch(self, record: dict[str, Any]) -> None:
        self._add(flat_metrics(record, "training/"), record["epoch"])

    def log_weights(self, record: dict[str, Any], model: nn.Module) -> None:
        for name, values in weight_arrays(model):
            self._writer.add_histogram(name, values, record["epoch"], bins=BINS)

    def log_test(self, images: PredictionImages) -> None:
        epoch = self._epoch
        for name, picture in (("confusion_matrix", images.confusion), ("misclassified", images.sheet)):
            if picture is not None:
                self._writer.add_image(f"test/{name}", np.asarray(picture), epoch, dataformats="HWC")
        self._writer.add_histogram("test/confidence", images.confidence, epoch)

    def log_summary(self, summary: dict[str, Any]) -> None:
        self._add(test_metrics(summary), self._epoch)
        self._writer._get_file_writer().add_summary(self._end, self._epoch)

    def close(self) -> None:
        self._writer.close()
        self._steps.close()

    def _add(self, metrics: dict[str, float], epoch: int) -> None:
        self._epoch = epoch
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, epoch)
        for writer in (self._writer, self._steps):
            writer.flush()  # a killed run keeps its epochs
