"""A completed run: its settings, best checkpoint and metrics, and the data set of its test."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from shards import Manifest, UserError, open_split
from shards.errors import CorruptError, quote
from shards.remote.datasets import resolve_dataset
from shards.stores.base import Store
from trainer.checkpoint import run_files
from trainer.checkpoint.run_dir import RunDirectory
from trainer.checkpoint.trained_model import TrainedModel, load_trained_model
from trainer.config.schema import Config


@dataclass(frozen=True)
class CompletedRun:
    """The contents of a run directory."""

    directory: RunDirectory
    trained: TrainedModel
    """The best epoch."""
    summary: dict[str, Any]
    """`summary.json`."""
    history: list[dict[str, Any]]
    """`metrics.jsonl`."""
    environment: dict[str, Any]
    """`env.json`."""
    predictions: dict[str, NDArray]
    """`predictions.npz`."""

    @classmethod
    def open(cls, path: Path) -> CompletedRun:
        """Read a run directory.

        Raises:
            UserError: The directory holds no run, one that is not complete, or files that are damaged or do not belong
                together.
        """
        directory = RunDirectory(path)
        trained = load_trained_model(path)
        if not directory.summary_path.exists():
            raise UserError(
                found=f"{path}, a run that is not complete",
                expected="a run with the metrics of its test (summary.json)",
                hint=f"resume it: python -m trainer.run {quote(directory.config)} resume=auto "
                + quote(f"run.dir={path}"),
            )
        hint = directory.hint
        run = cls(
            directory,
            trained,
            directory.read_summary(),
            run_files.read_history(directory.metrics, hint),
            run_files.read_json(directory.environment, run_files.Environment, hint),
            run_files.read_predictions(directory.predictions, len(trained.classes), hint),
        )
        run._check_consistency()
        return run

    def _check_consistency(self) -> None:
        """Raise `UserError` if a file belongs to another run."""
        summary, predictions = self.summary, self.predictions
        facts: tuple[tuple[str, str, Any, Any], ...] = (
            ("model", "best.pt", self.config.model.name, summary["model"]),
            ("epoch", "best.pt", self.trained.epoch, summary["best_epoch"]),
            ("temperature", "best.pt", self.trained.temperature, summary["calibration"]["temperature"]),
            ("number of epochs", "metrics.jsonl", len(self.history), summary["epochs"]),
            ("number of images", "predictions.npz", len(predictions["rows"]), summary["samples"]),
            (
                "accuracy",
                "predictions.npz",
                float((predictions["labels"] == predictions["predicted"]).mean()),
                summary["accuracy"],
            ),
            ("data set", "env.json", self.environment["data"], self.trained.data_identity),
        )
        for what, name, value, expected in facts:
            is_equal = math.isclose(value, expected) if isinstance(value, float) else value == expected
            if not is_equal:
                raise CorruptError(
                    found=f"{self.directory.path}, whose files are of different runs: {what} {value} in {name}",
                    expected=f"{what} {expected}, as in the run's other files",
                    hint=self.directory.hint,
                )

    @property
    def config(self) -> Config:
        return self.trained.config

    def checkpoint_sha256(self) -> str:
        """Return the checksum of the best checkpoint, which exported files name."""
        return hashlib.sha256(self.directory.best.read_bytes()).hexdigest()

    def data(self, shards: str | None = None) -> tuple[Manifest, Store]:
        """Open the data set of the run.

        Args:
            shards: Directory or address of the data set, if it has moved.

        Returns:
            The manifest of the training split, and the split of the test: the training split of a fold (`data.fold`).

        Raises:
            UserError: The data set cannot be read, or is another one.
        """
        address = shards or self.config.data.shards
        try:
            directory = resolve_dataset(address)
            train, test = (Manifest.read(directory / split) for split in ("train", "test"))
            store = open_split(directory, "train" if self.config.data.fold else "test")
        except UserError as error:
            if shards:
                raise
            hint = f"name the directory of the run's data set: --shards DIR ({error.hint})"
            raise UserError(found=error.found, expected=error.expected, hint=hint) from None
        if not self.trained.data_identity.startswith(train.identity() + test.identity()):
            raise UserError(
                found=f"{address}, another packed data set than that of the run",
                expected="the data set of the run",
                hint="name its directory: --shards DIR",
            )
        return train, store
