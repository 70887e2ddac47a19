"""Going on from a checkpoint: exactly where it was, or as near as settings allow that were changed on purpose."""

from __future__ import annotations

from typing import Any

from trainer.checkpoint import changed_settings
from trainer.training import Training

# What the settings say of a group of parameters; the rest of a group is the optimiser's own state.
_GROUP_SETTINGS = ("lr", "initial_lr", "max_lr", "min_lr", "weight_decay", "momentum")


def restore(training: Training, state: dict[str, Any]) -> None:
    """Put a training to where a checkpoint was.

    Where settings or data differ (`checkpoint.resume_allow_changes`), weights and the optimiser's moments go on, the
    schedule stands where it would stand had it always been as it is now, and an epoch goes on after the same share of
    its samples, at the next update.
    """
    if not changed_settings(state, training.config) and state["data"] == training.data.digest:
        training.restore(state)
        return
    train, config = training.data.train, training.config
    window = train.window
    groups = [{name: group[name] for name in _GROUP_SETTINGS if name in group} for group in _groups(training)]
    training.restore(state | {"learning_rate": training.learning_rate.state_dict()})
    if state["data"] != training.data.digest:
        train.window = window
    for group, settings in zip(_groups(training), groups, strict=True):
        group.update(settings)
    steps, accumulation = train.steps(training.epoch), config.optim.grad_accumulation
    if steps != state["steps"] or state["step"] % accumulation:
        nearest = -(-state["step"] * steps // state["steps"])
        training.step = min(steps, -(-nearest // accumulation) * accumulation)
    before = sum(-(-train.steps(epoch) // accumulation) for epoch in range(training.epoch))
    training.updates = before + -(-training.step // accumulation)
    figures = [record["validation"][config.trainer.monitor] for record in training.history if "validation" in record]
    training.learning_rate.replay(training.updates, training.epoch, figures)
    training.lr = training.learning_rate.now


def _groups(training: Training) -> list[dict[str, Any]]:
    return training.optimizer.param_groups
