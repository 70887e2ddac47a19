"""MLflow."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from shards.atomic import write_file
from trainer.config.schema import Config, flatten
from trainer.runtime.loggers.base import MetricLogger, PredictionImages, finish_in_time, flat_metrics, test_metrics

_ID = "mlflow_run_id"
_MAX_VALUE = 500  # characters of a parameter
_MAX_PARAMETERS = 100  # of a request
# A server that does not answer delays a run by minutes, unless the variables are set.
_LIMITS = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "20", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2"}


class MlflowLogger(MetricLogger):
    """A run of the experiment `run.name` (a trial: of its study) at `MLFLOW_TRACKING_URI`, or MLflow's default place.

    The id is stored in the run directory, so a resumed run continues. Steps that it repeats are not logged again.
    """

    def __init__(self, config: Config, directory: Path, study: str | None = None) -> None:
        """Open the run.

        Args:
            config: Settings, the parameters of the run.
            directory: The run directory.
            study: Name of the study of which the run is a trial.
        """
        for name, value in _LIMITS.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = MlflowClient()
        path = directory / _ID
        if path.exists():
            self._id = path.read_text(encoding="utf-8")
            self._client.update_run(self._id, status="RUNNING")
        else:
            name = study or config.run.name
            experiment = self._client.get_experiment_by_name(name)
            experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(name)
            run_name = directory.name if study is None else f"{directory.parent.name} {directory.name}"
            self._id = self._client.create_run(experiment_id, run_name=run_name).info.run_id
            write_file(path, self._id)
            settings = flatten(config.model_dump(mode="json"))
            parameters = [Param(name, str(value)[:_MAX_VALUE]) for name, value in settings]
            for start in range(0, len(parameters), _MAX_PARAMETERS):
                self._client.log_batch(self._id, params=parameters[start : start + _MAX_PARAMETERS])
        # The last step that was logged, of steps and of epochs.
        self._last = {name: self._last_step(name) for name in ("step/loss", "train_loss")}
        self._pending: list[Any] = []
        self._status = "KILLED"

    def log_step(self, record: dict[str, Any]) -> None:
        if record["step"] > self._last["step/loss"]:
            self._log(flat_metrics(record, "step/"), record["step"])

    def log_epoch(self, record: dict[str, Any]) -> None:
        if record["step"] > self._last["train_loss"]:
            self._log(flat_metrics(record) | {"epoch": record["epoch"]}, record["step"])

    def log_test(self, images: PredictionImages) -> None:
        for name, picture in (("confusion_matrix", images.confusion), ("misclassified", images.sheet)):
            if picture is not None:
                self._client.log_image(self._id, picture, f"test/{name}.png")

    def log_summary(self, summary: dict[str, Any]) -> None:
        self._log(test_metrics(summary), 0)
        self._status = "FINISHED"

    def close(self) -> None:
        def finish() -> None:
            for operation in self._pending:
                operation.wait()
            self._client.set_terminated(self._id, self._status)

        finish_in_time(finish, "the server has not received all metrics")

    def _last_step(self, name: str) -> int:
        return max((metric.step for metric in self._client.get_metric_history(self._id, name)), default=-1)

    def _log(self, metrics: dict[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        values = [Metric(name, value, now, step) for name, value in metrics.items()]
        # A thread sends them, so a step does not wait for the server.
        self._pending.append(self._client.log_batch(self._id, metrics=values, synchronous=False))
