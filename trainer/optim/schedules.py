"""Learning-rate schedules, by optimizer update or by epoch."""

from __future__ import annotations

import bisect
import itertools
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    LambdaLR,
    LRScheduler,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)

from trainer.config.schema import Config, ScheduleConfig


class LRSchedule:
    """The schedule of a run: told of every update and every epoch, it moves at those it follows."""

    def __init__(self, optimizer: torch.optim.Optimizer, config: Config, updates: Sequence[int]) -> None:
        """updates: of each epoch. Where they differ, an epoch of fewer moves the schedule as far, in larger moves."""
        self._optimizer = optimizer
        self._by_update = config.schedule.unit == "step" and config.schedule.name != "plateau"
        self._moves_per_epoch = max(updates) if self._by_update else 1
        self._ends = list(itertools.accumulate(updates))
        self._updates = 0
        self._scheduler = make_lr_scheduler(optimizer, config.schedule, config.trainer.epochs, self._moves_per_epoch)

    @property
    def now(self) -> float:
        return self._optimizer.param_groups[0]["lr"]

    def after_update(self) -> None:
        before = self._moves()
        self._updates += 1
        if self._by_update:
            for _ in range(self._moves() - before):
                self._scheduler.step()

    def _moves(self) -> int:
        """How far the schedule is to have moved after the updates so far."""
        epoch = bisect.bisect_right(self._ends, self._updates)
        if epoch == len(self._ends):
            return epoch * self._moves_per_epoch
        first = self._ends[epoch - 1] if epoch else 0
        in_epoch = (self._updates - first) * self._moves_per_epoch // (self._ends[epoch] - first)
        return epoch * self._moves_per_epoch + in_epoch

    def after_epoch(self, validation_figure: float) -> None:
        """validation_figure: the one that chooses the best epoch; higher is better."""
        if isinstance(self._scheduler, ReduceLROnPlateau):
            self._scheduler.step(validation_figure)
        elif not self._by_update:
            self._scheduler.step()

    def replay(self, updates: int, epochs: int, validation_figures: list[float]) -> None:
        """Move a schedule that has not moved yet as if told of all these updates, epochs and figures of epochs."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of moving without an update between
            for _ in range(updates):
                self.after_update()
            for epoch in range(epochs):
                self.after_epoch(validation_figures[epoch] if epoch < len(validation_figures) else 0.0)

    def state_dict(self) -> dict[str, Any]:
        return {"scheduler": self._scheduler.state_dict(), "updates": self._updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._scheduler.load_state_dict(state["scheduler"])
        self._updates = state["updates"]


def make_lr_scheduler(
    optimizer: torch.optim.Optimizer, settings: ScheduleConfig, epochs: int, per_epoch: int
) -> LRScheduler | ReduceLROnPlateau:
    """per_epoch: how often the schedule moves in an epoch."""
    warmup = round(settings.warmup * per_epoch)
    total = epochs * per_epoch
    if settings.name == "one_cycle":
        return OneCycleLR(
            optimizer,
            max_lr=[group["lr"] for group in optimizer.param_groups],
            # The state after the last update is never used, but the scheduler is told of it.
            total_steps=total + 1,
            pct_start=warmup / total if warmup else 0.3,
            cycle_momentum=False,
        )
    if settings.name == "plateau":
        return ReduceLROnPlateau(
            optimizer, mode="max", factor=settings.factor, patience=settings.patience, min_lr=settings.min_lr
        )
    if settings.name == "cosine":
        main: LRScheduler = CosineAnnealingLR(optimizer, T_max=max(1, total - warmup), eta_min=settings.min_lr)
    elif settings.name == "warm_restarts":
        main = CosineAnnealingWarmRestarts(
            optimizer,
            T_0=max(1, round(settings.cycle_epochs * per_epoch)),
            T_mult=settings.cycle_mult,
            eta_min=settings.min_lr,
        )
    else:
        main = ConstantLR(optimizer, factor=1.0)
    if not warmup:
        return main
    rising = LambdaLR(optimizer, lambda moves: (moves + 1) / warmup)
    return SequentialLR(optimizer, [rising, main], milestones=[warmup])
