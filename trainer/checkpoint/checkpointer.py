"""Asynchronous checkpoints: the state is copied, and a thread writes it while training continues."""

from __future__ import annotations

import errno
import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch
from torch.utils._pytree import tree_map

from shards.errors import os_errors_as_user_errors
from trainer.checkpoint import io as checkpoint
from trainer.checkpoint.run_dir import RunDirectory
from trainer.checkpoint.trained_model import TrainedModel
from trainer.config.schema import CheckpointConfig

log = logging.getLogger(__name__)

_DISK_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))  # Windows has no EDQUOT


class Checkpointer:
    """Writes the checkpoints of a run on rank 0, in the order of `save`; a context manager that waits at its end.

    If the disk is full, a warning is logged, training continues, and the previous checkpoint stays; `ensure_saved`
    tries again at the end. If the run directory is missing, it is created again with settings, metrics, the newest
    state and the best model that was passed to this object. `best.pt` is written before `last.pt`, so it holds the best
    epoch that `last.pt` names, or a later one.

    Args:
        run_dir: The run directory.
        settings: When checkpoints are due.
        step: Steps of the current epoch that are done.
        last_is_intact: Whether an existing `last.pt` can be read, so that it becomes `previous.pt`.
    """

    def __init__(self, run_dir: RunDirectory, settings: CheckpointConfig, step: int, last_is_intact: bool) -> None:
        self._run_dir = run_dir
        self._settings = settings
        self._last_is_intact = last_is_intact
        self._best: TrainedModel | None = None  # the last that was passed to save or replace_best
        self._best_is_written = True
        self._unsaved_state: dict[str, Any] | None = None
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoints")
        self._writing: Future[None] | None = None
        self._last_step, self._last_time = step, time.monotonic()  # of the last checkpoint, saved or due

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self.finish()
        finally:
            self._writer.shutdown()

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is due after `step` steps of the epoch, by `every_steps` or `every_minutes`.

        True once for each checkpoint: several ranks save it a step later.
        """
        minutes, steps, now = self._settings.every_minutes, self._settings.every_steps, time.monotonic()
        is_due = steps is not None and step // steps > self._last_step // steps
        is_due |= minutes is not None and now - self._last_time >= 60 * minutes
        if is_due:
            self._last_step, self._last_time = step, now
        return is_due

    def save(self, state: dict[str, Any], best: TrainedModel | None = None) -> None:
        """Copy a state and start to write it; waits for the previous write.

        Args:
            state: Contents of `last.pt`. `metrics.jsonl` is replaced by its history.
            best: The model for `best.pt`, if this epoch is the best.
        """
        self.finish()
        self._last_step, self._last_time = state["step"], time.monotonic()
        self._writing = self._writer.submit(
            self._write, _copy(state), best and replace(best, weights=_copy(best.weights))
        )

    def finish(self) -> None:
        """Wait for the write in progress."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def best(self) -> TrainedModel:
        """Return the best checkpoint, even if it could not be written.

        Raises:
            UserError: It cannot be read.
        """
        self.finish()
        if self._best is not None and not self._best_is_written:
            return self._best
        return TrainedModel.load(self._run_dir.best)

    def replace_best(self, best: TrainedModel) -> None:
        """Set the best checkpoint with its post-hoc calibration, which `ensure_saved` writes."""
        self.finish()
        self._best, self._best_is_written = best, False

    def ensure_saved(self) -> None:
        """Write the newest state and the best checkpoint if they are not on disk.

        Raises:
            UserError: They cannot be written.
        """
        self.finish()
        with os_errors_as_user_errors(self._run_dir.checkpoints):
            self._write_unsaved()

    def _write_unsaved(self) -> None:
        if not self._run_dir.checkpoints.is_dir():
            log.warning("%s was removed or moved during the run, and is written again", self._run_dir.path)
            self._run_dir.restore()
            self._best_is_written = False
        if self._best is not None and not self._best_is_written:
            checkpoint.save(self._run_dir.best, self._best.state_dict())
            self._best_is_written = True
        if self._unsaved_state is not None:
            checkpoint.save_last(self._run_dir.checkpoints, self._unsaved_state, keep=self._last_is_intact)
            self._last_is_intact = True
            self._run_dir.write_history(self._unsaved_state["history"])
            self._unsaved_state = None

    def _write(self, state: dict[str, Any], best: TrainedModel | None) -> None:
        self._unsaved_state = state
        if best is not None:
            self._best, self._best_is_written = best, False
        try:
            self._write_unsaved()
        except OSError as error:
            log.warning(
                "checkpoint for epoch %d, step %d not written to %s: %s. Training continues%s.%s",
                state["epoch"] + 1,
                state["step"],
                self._run_dir.checkpoints,
                error.strerror or error,
                "; the previous checkpoint is intact" if checkpoint.has_checkpoint(self._run_dir.checkpoints) else "",
                " Free disk space (df -h)." if error.errno in _DISK_FULL else "",
            )


def _copy(state: Any) -> Any:
    """Copy nested dicts and lists, and tensors to the CPU, so that later steps do not change them."""
    copied = tree_map(
        lambda leaf: leaf.detach().to("cpu", non_blocking=True, copy=True) if isinstance(leaf, torch.Tensor) else leaf,
        state,
    )
    if torch.cuda.is_initialized():
        torch.cuda.current_stream().synchronize()  # once for all tensors
    return copied
