"""A completed run: its settings, best checkpoint and metrics, and the data set of its test."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards import Manifest, UserError, open_split
from shards.remote.datasets import resolve_dataset
from shards.stores.base import Store
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

    @classmethod
    def open(cls, path: Path) -> CompletedRun:
        """Read a run directory.

        Raises:
            UserError: The directory holds no run, or one that is not complete.
        """
        directory = RunDirectory(path)
        trained = load_trained_model(path)
        if not directory.summary_path.exists():
            raise UserError(
                found=f"{path}, a run that is not complete",
                expected="a run with the metrics of its test (summary.json)",
                hint=f"resume it: python -m trainer.run {directory.config} resume=auto run.dir={path}",
            )
        return cls(
            directory,
            trained,
            directory.read_summary(),
            [json.loads(line) for line in directory.metrics.read_text().splitlines()],
            json.loads(directory.environment.read_text()),
        )

    @property
    def config(self) -> Config:
        return self.trained.config

    def data(self, shards: str | None = None) -> tuple[Manifest, Store]:
        """Open the data set of the run.

        Args:
            shards: Directory or address of the data set, if it has moved.

        Returns:
            The manifest of the training split, and the test split.

        Raises:
            UserError: The data set cannot be read, or is another one.
        """
        address = shards or self.config.data.shards
        try:
            directory = resolve_dataset(address)
            train, store = Manifest.read(directory / "train"), open_split(directory, "test")
        except UserError as error:
            if shards:
                raise
            hint = f"name the directory of the run's data set: --shards DIR ({error.hint})"
            raise UserError(found=error.found, expected=error.expected, hint=hint) from None
        if not self.trained.data_digest.startswith(train.digest() + store.manifest.digest()):
            raise UserError(
                found=f"{address}, another packed data set than that of the run",
                expected="the data set of the run",
                hint="name its directory: --shards DIR",
            )
        return train, store
