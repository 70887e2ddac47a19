"""Resuming from a checkpoint: bit-identical, or as close as changed settings allow."""

from __future__ import annotations

from typing import Any

from trainer.checkpoint.io import changed_settings
from trainer.loop.state import Training

# Options of a parameter group that come from the settings; the rest is the optimizer's own state.
_GROUP_SETTINGS = ("lr", "initial_lr", "max_lr", "min_lr", "weight_decay", "momentum")


def restore(training: Training, saved: dict[str, Any]) -> None:
    """Continue a training from a checkpoint.

    Where settings or data differ (`checkpoint.resume_allow_changes`), weights and the optimizer's moments are kept, the
    schedule stands where it would stand had it always been as it is now, and the epoch continues after the same
    fraction of its samples, at the next update.

    Args:
        training: A new training; changed in place.
        saved: Contents of a checkpoint that `check_fits` accepted.
    """
    if not changed_settings(saved, training.config) and saved["data"] == training.data.digest:
        training.restore(saved)
        return
    state, train, config = training.state, training.data.train, training.config
    window = train.window
    groups = [{name: group[name] for name in _GROUP_SETTINGS if name in group} for group in _groups(training)]
    training.restore(saved | {"learning_rate": state.learning_rate.state_dict()})
    if saved["data"] != training.data.digest:
        train.window = window
    for group, settings in zip(_groups(training), groups, strict=True):
        group.update(settings)
    steps, accumulation = train.steps(state.epoch), config.optim.grad_accumulation
    if steps != saved["steps"] or saved["step"] % accumulation:
        nearest = -(-saved["step"] * steps // saved["steps"])
        state.step = min(steps, -(-nearest // accumulation) * accumulation)
    before = sum(-(-train.steps(epoch) // accumulation) for epoch in range(state.epoch))
    state.updates = before + -(-state.step // accumulation)
    metrics = [record["validation"][config.trainer.monitor] for record in state.history if "validation" in record]
    state.learning_rate.replay(state.updates, state.epoch, metrics)
    state.lr = state.learning_rate.lr


def _groups(training: Training) -> list[dict[str, Any]]:
    return training.state.optimizer.param_groups
