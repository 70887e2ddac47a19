"""Totals and progress of an epoch, without a device synchronization per step."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch

from pipeline.loader import Batch
from trainer.loop.nan_guard import NonFiniteMonitor
from trainer.loop.state import Totals, Training
from trainer.runtime.loggers.base import MetricLogger
from trainer.runtime.profiler import DataWait
from trainer.runtime.progress import Progress


class EpochMeter:
    """Sums loss, samples, counts of predictions and seconds over an epoch; displays progress and logs steps on rank 0.

    Each rank continues its own sum across a stop, so a resumed epoch has the loss of an uninterrupted one.
    """

    def __init__(self, training: Training, loggers: Sequence[MetricLogger], monitor: NonFiniteMonitor) -> None:
        """Start to measure the rest of an epoch.

        Args:
            training: The training.
            loggers: Receivers of the records of steps; empty except on rank 0.
            monitor: Reads loss and gradient norm of each step, on a GPU some steps later.
        """
        state, world, train = training.state, training.world, training.data.train
        settings = training.config.trainer
        self._training = training
        self._before, self._here = state.epoch_totals, Totals()
        if len(state.rank_losses) == world.size:
            loss = state.rank_losses[world.rank]
        else:
            loss = state.epoch_totals.loss if world.is_main_process else 0.0
        self._loss = torch.tensor(loss, dtype=torch.float64, device=world.device)
        training.class_counts.zero_()
        if world.is_main_process:
            training.class_counts.copy_(state.class_counts)
        steps, pixels = train.steps(state.epoch), math.prod(train.stage_at(state.epoch).input_size)
        later = sum(math.prod(train.stage_at(epoch).input_size) for epoch in range(state.epoch + 1, settings.epochs))
        self._progress = Progress(
            state.epoch,
            settings.fixed_epochs,
            steps,
            state.step,
            steps_ahead=steps * later / pixels,
            seconds_left=settings.minutes and settings.minutes * 60 - state.elapsed,
        )
        self._wait = DataWait(world.device)
        self.start_waiting, self.stop_waiting = self._wait.start, self._wait.stop
        self._start = time.perf_counter()
        self._loggers, self._monitor = loggers, monitor
        self._updates = state.updates
        self._records: dict[int, tuple[int, dict[str, Any]]] = {}  # samples and record by step in the epoch
        self._values: dict[int, tuple[float, float]] = {}  # loss and gradient norm by step in the epoch
        monitor.on_read = lambda step, *values: self._values.update({step: values})
        self._logged = (self._start, 0, 0.0)

    def update(self, batch: Batch, loss: torch.Tensor) -> None:
        """Add a step.

        Args:
            batch: This rank's slice of the global batch.
            loss: Scalar on the device, summed over the slice.
        """
        self._loss += loss
        here = self._here
        here.samples += batch.global_size
        if self._training.world.is_main_process:
            rate = self._training.state.learning_rate.lr
            mean_loss = self._monitor.last_loss / len(batch.labels)
            self._progress.step(batch.step + 1, mean_loss, rate, here.samples, self._wait.seconds)
        if self._loggers:
            self._record_step(batch)
            self._log_steps()

    def _record_step(self, batch: Batch) -> None:
        """Keep what is known of an optimizer step that is to be logged."""
        state, interval = self._training.state, self._training.config.logging.every_steps
        is_update = state.updates != self._updates
        self._updates = state.updates
        if interval is None or not is_update or state.updates % interval:
            return
        start, samples, wait = self._logged
        now, images, waited = self._logged = (time.perf_counter(), self._here.samples, self._wait.seconds)
        record = {
            "step": state.updates,
            "epoch": state.epoch + 1,
            "lr": state.lr,
            "images_per_second": (images - samples) / (now - start),
            "data_wait_share": (waited - wait) / (now - start),
        }
        self._records[batch.step] = len(batch.labels), record

    def _log_steps(self) -> None:
        """Log the steps whose loss and gradient norm have been read."""
        for step in sorted(self._records.keys() & self._values.keys()):
            loss, gradient_norm = self._values[step]
            samples, record = self._records.pop(step)
            record |= {"loss": loss / samples, "gradient_norm": gradient_norm}
            for logger in self._loggers:
                logger.log_step(record)
        self._values.clear()

    def commit(self) -> None:
        """Store the totals in the training state. Synchronizes with the device, so that the seconds are correct."""
        training, state = self._training, self._training.state
        ranks = training.world.all_gather(lambda: (float(self._loss), training.class_counts.cpu()))
        state.rank_losses = [loss for loss, _ in ranks]
        state.class_counts = torch.stack([counts for _, counts in ranks]).sum(dim=0)
        self._here.seconds = time.perf_counter() - self._start
        self._wait.update()
        self._here.wait_seconds = self._wait.seconds
        state.epoch_totals = self._before + self._here
        state.epoch_totals.loss = sum(state.rank_losses)
        self._log_steps()

    def close(self) -> None:
        """End the display of progress."""
        self._progress.close()
