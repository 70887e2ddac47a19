"""A finished run as others read it: its settings, its best checkpoint, its figures, and the set it was tested on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards import Manifest, UserError, open_split
from shards.remote.sets import resolve_dataset
from shards.stores.base import Store
from trainer.checkpoint.run_dir import RunDirectory
from trainer.checkpoint.trained_model import TrainedModel, load_trained_model
from trainer.config.schema import Config


@dataclass(frozen=True)
class CompletedRun:
    """trained: the best epoch. summary, history, environment: as in summary.json, metrics.jsonl, env.json."""

    directory: RunDirectory
    trained: TrainedModel
    summary: dict[str, Any]
    history: list[dict[str, Any]]
    environment: dict[str, Any]

    @classmethod
    def open(cls, path: Path) -> CompletedRun:
        """Read a run's directory. Raises `UserError` if it holds no run, or one that is not finished."""
        directory = RunDirectory(path)
        trained = load_trained_model(path)
        if not directory.summary_path.exists():
            raise UserError(
                found=f"{path}, a run that is not finished",
                expected="one that was tested (summary.json), and so has its temperature and its figures",
                hint=f"go on with it: python -m trainer.run CONFIG resume=auto run.dir={path}",
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
        """The manifest of the train part, and the test part. shards: where the packed set is, if not where it was.

        Raises `UserError` if the set is not there, or is another.
        """
        place = shards or self.config.data.shards
        try:
            directory = resolve_dataset(place)
            train, store = Manifest.read(directory / "train"), open_split(directory, "test")
        except UserError as error:
            if shards:
                raise
            hint = f"name the place where the run's packed set is now: --shards DIR ({error.hint})"
            raise UserError(found=error.found, expected=error.expected, hint=hint) from None
        if not self.trained.data_digest.startswith(train.digest() + store.manifest.digest()):
            raise UserError(
                found=f"{place}, another packed set than the run was trained on",
                expected="that one, by which it was tested",
                hint="name the place where it is now: --shards DIR",
            )
        return train, store
