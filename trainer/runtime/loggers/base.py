"""The interface of metric loggers, and a wrapper whose failures do not stop a run."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from shards.atomic import write_file
from shards.errors import first_line
from shards.remote.base import call_with_timeout

log = logging.getLogger(__name__)

TIMEOUT = 60.0  # seconds, of a server
BINS = 64  # of a histogram of weights


@dataclass(frozen=True)
class PredictedImage:
    """A picture with its prediction."""

    image: NDArray[np.uint8]
    """Model input [H, W, C]."""
    predicted: str
    """Predicted class."""
    confidence: float
    """Probability of the predicted class."""
    true: str | None
    """True class, if known."""
    row: int | None = None
    """Row in the raw source, if there is one."""


@dataclass(frozen=True)
class PredictionImages:
    """Pictures of the predictions on the test split, for loggers that show them."""

    classes: tuple[str, ...]
    labels: NDArray[np.int64]
    """[N], true classes."""
    predicted: NDArray[np.int64]
    """[N], predicted classes."""
    confidence: NDArray[np.float32]
    """[N], probability of the predicted class."""
    confusion: Image.Image | None
    """The confusion matrix; None with many classes."""
    errors: list[PredictedImage]
    """The most confident errors."""
    sheet: Image.Image | None
    """Contact sheet of `errors`; None if there are none."""


class MetricLogger:
    """A receiver of metrics. Its methods do nothing; subclasses override those that they need."""

    def log_step(self, record: dict[str, Any]) -> None:
        """Log the record of an optimizer step, as in `steps.jsonl`."""

    def log_epoch(self, record: dict[str, Any]) -> None:
        """Log the record of an epoch, as in `metrics.jsonl`."""

    def log_weights(self, record: dict[str, Any], model: nn.Module) -> None:
        """Log histograms of the weights at the end of an epoch."""

    def log_test(self, images: PredictionImages) -> None:
        """Log pictures of the predictions on the test split."""

    def log_summary(self, summary: dict[str, Any]) -> None:
        """Log the results of a run, as in `summary.json`."""

    def close(self) -> None:
        """Write what is buffered."""


class GuardedLogger(MetricLogger):
    """A logger that cannot stop a run: at its first exception it is closed, with a warning.

    Args:
        name: Name of the service, for the warning.
        open_logger: Opens the logger.
    """

    def __init__(self, name: str, open_logger: Callable[[], MetricLogger]) -> None:
        self._name = name
        self._logger = MetricLogger()
        self._attempt(lambda: setattr(self, "_logger", open_logger()))

    def log_step(self, record: dict[str, Any]) -> None:
        self._attempt(lambda: self._logger.log_step(record))

    def log_epoch(self, record: dict[str, Any]) -> None:
        self._attempt(lambda: self._logger.log_epoch(record))

    def log_weights(self, record: dict[str, Any], model: nn.Module) -> None:
        self._attempt(lambda: self._logger.log_weights(record, model))

    def log_test(self, images: PredictionImages) -> None:
        self._attempt(lambda: self._logger.log_test(images))

    def log_summary(self, summary: dict[str, Any]) -> None:
        self._attempt(lambda: self._logger.log_summary(summary))

    def close(self) -> None:
        closing, self._logger = self._logger, MetricLogger()
        self._attempt(closing.close)

    def _attempt(self, operation: Callable[[], None]) -> None:
        try:
            operation()
        except Exception as error:
            log.warning("%s failed: %s. Training continues without it.", self._name, first_line(error))
            failed, self._logger = self._logger, MetricLogger()
            with suppress(Exception):
                failed.close()


class StepFile(MetricLogger):
    """`steps.jsonl` in the run directory: one line per logged step."""

    def __init__(self, path: Path, step: int) -> None:
        """Open the file.

        Args:
            path: The file. Lines of steps that a resumed run repeats are removed.
            step: Optimizer steps that are done.
        """
        self._path = path
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            write_file(path, "".join(line for line in lines if _step_of(line) <= step))

    def log_step(self, record: dict[str, Any]) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in record.items()}
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(finite) + "\n")


def _step_of(line: str) -> float:
    """The step of a line; infinite for the rest of a line that a killed process left."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return math.inf


def finish_in_time(finish: Callable[[], None], failure: str) -> None:
    """Run the last upload in a thread, as it may wait for hours for a server that does not answer.

    Raises:
        TimeoutError: It has not ended after 60 seconds; the message is `failure`.
    """
    try:
        call_with_timeout(TIMEOUT, finish)
    except TimeoutError:
        raise TimeoutError(failure) from None


def flat_metrics(record: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Return the finite numbers of nested metrics by name: those of a section `validation` as `validation/accuracy`."""
    flat: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, dict):
            flat |= flat_metrics(value, f"{name}/")
        elif isinstance(value, int | float) and name not in ("epoch", "step") and math.isfinite(value):
            flat[prefix + name] = value
    return flat


def test_metrics(summary: dict[str, Any]) -> dict[str, float]:
    """Return the metrics of the test split in `summary.json` as `flat_metrics`."""
    names = ("accuracy", "balanced_accuracy", "top5_accuracy", "macro_f1", "weighted_f1", "calibration")
    return flat_metrics({name: summary[name] for name in names if name in summary}, "test/")


def weight_arrays(model: nn.Module) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Yield (`weights/NAME`, values) of each kernel and weight matrix, for histograms."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            yield f"weights/{name}", parameter.detach().float().cpu().numpy()
