"""Weights & Biases."""

from __future__ import annotations

import logging
import os
import uuid
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from pipeline.preview import to_pil_image
from shards.atomic import write_file
from shards.errors import first_line, quote
from trainer.config.schema import Config
from trainer.runtime.loggers import base
from trainer.runtime.loggers.base import BINS, MetricLogger, PredictionImages, finish_in_time, weight_arrays

log = logging.getLogger(__name__)

_ID = "wandb_id"


class WandbLogger(MetricLogger):
    """Weights & Biases: online with an API key, otherwise offline (files in the run directory).

    The id is stored in the run directory, so a resumed run continues under the same id. The step of W&B is the
    optimizer step; values of steps that a resumed run repeats are ignored by W&B.
    """

    def __init__(self, config: Config, directory: Path, study: str | None = None) -> None:
        """Open the run.

        Args:
            config: Settings, the hyperparameters of the run.
            directory: The run directory.
            study: Name of the study of which the run is a trial: the group of the run.
        """
        import wandb

        id_path = directory / _ID
        if not id_path.exists():
            write_file(id_path, uuid.uuid4().hex[:12])
        name = directory.name if config.run.dir else f"{config.run.name} {directory.name}"

        def init(mode: str) -> wandb.Run:
            return wandb.init(
                id=id_path.read_text(),
                resume="allow" if mode == "online" else None,
                reinit="create_new",  # the trials of a search are runs of one process
                project=config.logging.wandb_project,
                group=study,
                name=name if study is None else f"{study} {directory.parent.name} {directory.name}",
                dir=directory,
                mode=mode,  # type: ignore[arg-type]  # wandb checks the value of WANDB_MODE
                config=config.model_dump(mode="json"),
                settings=wandb.Settings(silent=True, init_timeout=base.TIMEOUT),
            )

        try:
            self._run = init(os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False) else "offline"))
        except Exception as error:  # the key, the run or the project is refused, or the server does not answer
            log.warning("Weights & Biases is offline: %s", first_line(error))
            wandb.teardown()
            self._run = init("offline")
        if self._run.settings.mode == "offline":
            log.warning("Weights & Biases: upload the run with: %s", self._sync_command())
        self._run.define_metric("*", step_metric="epoch")
        self._run.define_metric("step/*", step_metric="step")

    def log_step(self, record: dict[str, Any]) -> None:
        curves = {f"step/{name}": value for name, value in record.items() if name not in ("step", "epoch")}
        self._run.log({"step": record["step"], **curves}, step=record["step"])

    def log_epoch(self, record: dict[str, Any]) -> None:
        self._run.log(record, step=record["step"])

    def log_weights(self, record: dict[str, Any], model: nn.Module) -> None:
        import wandb

        histograms = ((name, np.histogram(values, BINS)) for name, values in weight_arrays(model))
        values = {name: wandb.Histogram(np_histogram=histogram) for name, histogram in histograms}
        self._run.log(values, step=record["step"])

    def log_test(self, images: PredictionImages) -> None:
        import wandb

        table = wandb.Table(columns=["image", "true", "predicted", "confidence", "row"])
        for each in images.errors:
            table.add_data(wandb.Image(to_pil_image(each.image)), each.true, each.predicted, each.confidence, each.row)
        values: dict[str, Any] = {
            "test/misclassified": table,
            "test/confidence": wandb.Histogram(images.confidence.tolist()),
        }
        if images.confusion is not None:
            values["test/confusion_matrix"] = wandb.plot.confusion_matrix(
                y_true=images.labels.tolist(), preds=images.predicted.tolist(), class_names=list(images.classes)
            )
        self._run.log(values)

    def log_summary(self, summary: dict[str, Any]) -> None:
        self._run.summary.update(summary)

    def close(self) -> None:
        finish_in_time(self._run.finish, f"the upload has not ended; complete it with: {self._sync_command()}")

    def _sync_command(self) -> str:
        """Return the command that uploads an offline run, or the rest of this part of an online run.

        Each start of a run writes a directory. W&B ignores steps before those that it has, so the directories of an
        offline run are uploaded by one command, which takes them in the order of their starts.
        """
        part = Path(self._run.dir).parent
        if self._run.settings.mode == "offline":
            return f"wandb sync {quote(part.parent)}"
        return f"wandb sync --no-skip-online {quote(part)}"
