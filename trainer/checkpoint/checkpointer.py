"""Writes a run's checkpoints while it trains on, in the order in which they were taken."""

from __future__ import annotations

import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch

from trainer.checkpoint import io as checkpoint
from trainer.checkpoint.run_dir import RunDirectory
from trainer.checkpoint.trained_model import TrainedModel
from trainer.config.schema import CheckpointConfig

log = logging.getLogger(__name__)


class Checkpointer:
    """Takes copies of the training's state on rank 0 and writes them in a thread of its own; leaving it waits for that.

    A disk that does not take a checkpoint is warned of, and training goes on: the checkpoint before it stands. Where
    `last.pt` tells of a best epoch, `best.pt` holds that epoch or one after it: it is written first, and as long as it
    cannot be, `last.pt` stays as it was.
    """

    def __init__(self, directory: RunDirectory, settings: CheckpointConfig, step: int, keeps_last: bool) -> None:
        """step: of the epoch that the training stands at. keeps_last: whether the `last.pt` that is there is whole."""
        self._directory = directory
        self._settings = settings
        self._keeps_last = keeps_last
        self._unsaved_best: TrainedModel | None = None
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoints")
        self._writing: Future[None] | None = None
        self._saved_step = step
        self._saved_at = time.monotonic()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.finish()
        finally:
            self._writer.shutdown()

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint within the epoch is due after `step` steps of it, by `checkpoint.every_...`."""
        minutes, steps = self._settings.every_minutes, self._settings.every_steps
        if steps is not None and step // steps > self._saved_step // steps:
            return True
        return minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes

    def save(self, state: dict[str, Any], best: TrainedModel | None = None) -> None:
        """Copy a state, and the one to be kept as the best, and begin to write them; waits for those before.

        `metrics.jsonl` is written with them, so that it holds the epochs that `last.pt` tells of.
        """
        self.finish()
        self._saved_step, self._saved_at = state["step"], time.monotonic()
        self._writing = self._writer.submit(
            self._write, _copy(state), best and replace(best, weights=_copy(best.weights))
        )

    def finish(self) -> None:
        """Wait until everything is written (or was refused)."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def best(self) -> TrainedModel:
        """The best checkpoint, also one that the disk did not take. Raises `UserError` if it cannot be read."""
        self.finish()
        return self._unsaved_best or TrainedModel.load(self._directory.best)

    def replace_best(self, best: TrainedModel) -> None:
        """Write the best checkpoint again, with what was found out about it since; or warn that the disk is full."""
        self.finish()
        self._unsaved_best = best
        try:
            checkpoint.save(self._directory.best, best.state_dict())
            self._unsaved_best = None
        except OSError as error:
            log.warning("%s stays as it was: %s", self._directory.best, error.strerror or error)

    def _write(self, state: dict[str, Any], best: TrainedModel | None) -> None:
        self._unsaved_best = best or self._unsaved_best
        try:
            if self._unsaved_best is not None:
                checkpoint.save(self._directory.best, self._unsaved_best.state_dict())
                self._unsaved_best = None
            checkpoint.save_last(self._directory.checkpoints, state, keep=self._keeps_last)
            self._keeps_last = True
            self._directory.write_history(state["history"])
        except OSError as error:
            log.warning(
                "no checkpoint of epoch %d after step %d: %s in %s; training goes on, and the checkpoint before it "
                "stands. Free some room there (df -h)",
                state["epoch"] + 1,
                state["step"],
                error.strerror or error,
                self._directory.checkpoints,
            )


def _copy(value: Any) -> Any:
    """The same with tensors that later steps do not change, in the processor's memory."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copy(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copy(inner) for inner in value)
    return value
