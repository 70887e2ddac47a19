"""Optimisers by name, and learning-rate schedules by step or epoch."""

from __future__ import annotations

import warnings
from typing import Any

import timm.optim
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

from trainer.settings import Config, Optim, Schedule

_TIMM_NAMES = {"adam": "adam", "adamw": "adamw", "lion": "lion", "sgd_lookahead": "lookahead_sgd"}


def make_optimizer(model: torch.nn.Module, settings: Optim) -> torch.optim.Optimizer:
    """timm's optimiser over a model's parameters; biases and norms are not decayed."""
    options = {"momentum": settings.momentum} if settings.name == "sgd_lookahead" else {}
    return timm.optim.create_optimizer_v2(
        model, opt=_TIMM_NAMES[settings.name], lr=settings.lr, weight_decay=settings.weight_decay, **options
    )


class LearningRate:
    """The schedule of a run: told of every update and every epoch, it moves at those it follows."""

    def __init__(self, optimizer: torch.optim.Optimizer, config: Config, updates_per_epoch: int) -> None:
        self._optimizer = optimizer
        self._by_update = config.schedule.unit == "step" and config.schedule.name != "plateau"
        per_epoch = updates_per_epoch if self._by_update else 1
        self._scheduler = _make_scheduler(optimizer, config.schedule, config.trainer.epochs, per_epoch)

    @property
    def now(self) -> float:
        return self._optimizer.param_groups[0]["lr"]

    def after_update(self) -> None:
        if self._by_update:
            self._scheduler.step()

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
        return self._scheduler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._scheduler.load_state_dict(state)


def _make_scheduler(
    optimizer: torch.optim.Optimizer, settings: Schedule, epochs: int, per_epoch: int
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
            T_0=max(1, round(settings.period * per_epoch)),
            T_mult=settings.multiplier,
            eta_min=settings.min_lr,
        )
    else:
        main = ConstantLR(optimizer, factor=1.0)
    if not warmup:
        return main
    rising = LambdaLR(optimizer, lambda moves: (moves + 1) / warmup)
    return SequentialLR(optimizer, [rising, main], milestones=[warmup])
