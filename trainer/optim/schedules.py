"""Learning-rate schedules, by optimizer step or by epoch."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from importlib.metadata import version
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

from shards.errors import UserError, first_line
from trainer.config.schema import Config


class LRSchedule:
    """Learning-rate schedule of a run, which steps after optimizer steps or after epochs by `schedule.unit`.

    With `trainer.minutes` it follows the clock instead: `step_time` moves it to a fraction of its length.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, config: Config, updates: Sequence[int]) -> None:
        """Build the schedule.

        Args:
            optimizer: The optimizer whose learning rate is set.
            config: The recipe.
            updates: Optimizer steps of each epoch. If they differ, every epoch advances the schedule equally far.
        """
        self._optimizer = optimizer
        # The scheduler sets the rate of this group. Each group of the model has that rate times its `lr_scale`.
        self._base = torch.optim.SGD([torch.zeros(())], config.optim.lr)
        self._by_time = config.trainer.minutes is not None
        self._by_update = config.schedule.unit == "step" and config.schedule.name != "plateau"
        self._sign = -1 if config.trainer.monitor == "loss" else 1
        self._steps_per_epoch = max(updates) if self._by_update else 1
        self._ends = list(itertools.accumulate(updates))
        self._updates = 0
        self._total = config.trainer.epochs * self._steps_per_epoch
        self._scheduler = make_lr_scheduler(self._base, config, self._steps_per_epoch)
        self._base.step()  # torch warns of schedules that step before their optimizer
        self._set_rates()

    @property
    def lr(self) -> float:
        """Current learning rate, of parameters without a scale."""
        return self._base.param_groups[0]["lr"]

    def _set_rates(self) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = self.lr * group.get("lr_scale", 1.0)

    def _advance(self, position: int) -> None:
        """Step the scheduler until it has taken `position` steps."""
        for _ in range(position - self._scheduler.last_epoch):
            self._scheduler.step()
        self._set_rates()

    def step_update(self) -> None:
        """Advance after an optimizer step."""
        self._updates += 1
        if self._by_update and not self._by_time:
            self._advance(self._position())

    def step_time(self, fraction: float) -> None:
        """Advance to a fraction of `trainer.minutes`. A plateau schedule advances by epochs only."""
        if self._by_time and not isinstance(self._scheduler, ReduceLROnPlateau):
            self._advance(int(min(fraction, 1.0) * self._total))

    def _position(self) -> int:
        """Steps of the scheduler that correspond to the optimizer steps so far."""
        epoch = bisect.bisect_right(self._ends, self._updates)
        if epoch == len(self._ends):
            return epoch * self._steps_per_epoch
        first = self._ends[epoch - 1] if epoch else 0
        in_epoch = (self._updates - first) * self._steps_per_epoch // (self._ends[epoch] - first)
        return epoch * self._steps_per_epoch + in_epoch

    def step_epoch(self, metric: float) -> None:
        """Advance after an epoch with this value of `trainer.monitor`, negated if lower values are better."""
        if isinstance(self._scheduler, ReduceLROnPlateau):
            self._scheduler.step(self._sign * metric)
            self._set_rates()
        elif not self._by_update and not self._by_time:
            self._advance(min(self._scheduler.last_epoch + 1, self._total))

    def replay(self, updates: int, epochs: int, metrics: list[float], fraction: float = 0.0) -> None:
        """Advance a new schedule to a later point of the run.

        Args:
            updates: Optimizer steps.
            epochs: Epochs.
            metrics: The values of `step_epoch` for the first epochs; missing ones count as 0.
            fraction: Fraction of `trainer.minutes`.
        """
        for _ in range(updates):
            self.step_update()
        for epoch in range(epochs):
            self.step_epoch(metrics[epoch] if epoch < len(metrics) else 0.0)
        self.step_time(fraction)

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {"scheduler": self._scheduler.state_dict(), "updates": self._updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of a checkpoint."""
        self._scheduler.load_state_dict(state["scheduler"])
        self._updates = state["updates"]
        self._base.param_groups[0]["lr"] = self._scheduler.get_last_lr()[0]
        self._set_rates()


class TimmSchedule:
    """A schedule of timm, a function of the number of steps, with the interface of torch's schedulers."""

    def __init__(self, optimizer: torch.optim.Optimizer, config: Config, steps_per_epoch: int) -> None:
        """Build `schedule.name` with timm's `create_scheduler_v2`.

        Two defaults differ from timm's. `warmup_lr` is the learning rate divided by the number of warm-up steps, where
        the warm-up of cosine and warm_restarts starts too; timm's 1e-5 may be above the learning rate. `decay_rate`,
        the exponent of poly, is 1; with timm's 0.1, the last of 1,000 steps would have half the learning rate.

        Raises:
            UserError: The installed timm has no such schedule.
        """
        from timm.scheduler import create_scheduler_v2

        settings = config.schedule
        lengths = {"num_epochs": config.trainer.epochs, "warmup_epochs": settings.warmup, "min_lr": settings.min_lr}
        warmup_steps = max(1, round(settings.warmup * steps_per_epoch))
        defaults = {"warmup_lr": optimizer.param_groups[0]["lr"] / warmup_steps}
        if settings.name == "poly":
            defaults["decay_rate"] = 1.0
        self._optimizer = optimizer
        self._scheduler, _ = create_scheduler_v2(
            optimizer,
            settings.name,
            step_on_epochs=False,
            updates_per_epoch=steps_per_epoch,
            **lengths | defaults | settings.options,
        )
        if self._scheduler is None:  # wsd and rsqrt before 1.0.31
            raise UserError(
                found=f"schedule.name={settings.name}, which timm {version('timm')} does not have",
                expected="timm 1.0.31 or newer for wsd and rsqrt",
                hint="pip install 'timm>=1.0.31', or choose another schedule.name",
            )
        self.last_epoch = -1
        self.step()

    def step(self) -> None:
        """Advance by one step."""
        self.last_epoch += 1
        self._scheduler.step_update(self.last_epoch)

    def get_last_lr(self) -> list[float]:
        """Return the learning rate of each group."""
        return [group["lr"] for group in self._optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Return the number of steps."""
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the number of steps."""
        self.last_epoch = state["last_epoch"]
        self._scheduler.step_update(self.last_epoch)


def make_lr_scheduler(
    optimizer: torch.optim.Optimizer, config: Config, steps_per_epoch: int
) -> LRScheduler | ReduceLROnPlateau | TimmSchedule:
    """Build the scheduler, which makes `steps_per_epoch` steps in each epoch.

    Raises:
        UserError: `schedule.options` has an argument that the schedule does not take.
    """
    try:
        if config.schedule.options:
            _try_steps(config, steps_per_epoch)
        return _make_lr_scheduler(optimizer, config, steps_per_epoch)
    except (TypeError, ValueError, ArithmeticError, AssertionError, AttributeError, LookupError) as error:
        raise UserError(
            found=f"schedule.name={config.schedule.name} with schedule.options={config.schedule.options}, which "
            f"raises: {first_line(error)}",
            expected="arguments of torch's scheduler, or of timm.scheduler.create_scheduler_v2 for timm's",
            hint="change schedule.options or schedule.warmup",
        ) from None


def _try_steps(config: Config, steps_per_epoch: int) -> None:
    """Make the first steps of a schedule: some options are used, and checked, only in a step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], config.optim.lr)
    scheduler = _make_lr_scheduler(optimizer, config, steps_per_epoch)
    optimizer.step()
    for _ in range(min(config.schedule.patience + 3, config.trainer.epochs * steps_per_epoch)):
        scheduler.step(0.0) if isinstance(scheduler, ReduceLROnPlateau) else scheduler.step()


def _make_lr_scheduler(
    optimizer: torch.optim.Optimizer, config: Config, steps_per_epoch: int
) -> LRScheduler | ReduceLROnPlateau | TimmSchedule:
    settings = config.schedule
    warmup = round(settings.warmup * steps_per_epoch)
    total = config.trainer.epochs * steps_per_epoch
    if settings.name == "one_cycle":
        return OneCycleLR(
            optimizer,
            max_lr=[group["lr"] for group in optimizer.param_groups],
            # The scheduler also steps after the last update, whose learning rate is never used.
            total_steps=total + 1,
            cycle_momentum=False,
            **{"pct_start": warmup / total if warmup else 0.3} | settings.options,
        )
    if settings.name == "plateau":
        return ReduceLROnPlateau(
            optimizer,
            mode="min" if config.trainer.monitor == "loss" else "max",
            factor=settings.factor,
            patience=settings.patience,
            min_lr=settings.min_lr,
            **settings.options,
        )
    if settings.name not in ("cosine", "warm_restarts", "constant"):
        return TimmSchedule(optimizer, config, steps_per_epoch)
    if settings.name == "cosine":
        length = max(1, total - warmup)
        main: LRScheduler = CosineAnnealingLR(optimizer, length, settings.min_lr, **settings.options)
    elif settings.name == "warm_restarts":
        main = CosineAnnealingWarmRestarts(
            optimizer,
            T_0=max(1, round(settings.cycle_epochs * steps_per_epoch)),
            T_mult=settings.cycle_mult,
            eta_min=settings.min_lr,
            **settings.options,
        )
    else:
        main = ConstantLR(optimizer, factor=1.0, **settings.options)
    if not warmup:
        return main
    warming_up = LambdaLR(optimizer, lambda step: (step + 1) / warmup)
    return SequentialLR(optimizer, [warming_up, main], milestones=[warmup])
