"""Resume a training from a checkpoint, also with other settings or data."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import torch

from pipeline.sampler import SAMPLER_VERSION
from shards.errors import errors_as_corrupt
from trainer.checkpoint import io as checkpoint
from trainer.checkpoint import run_files
from trainer.checkpoint.compat import changed_settings, check_fits, check_structure, explain_structure
from trainer.checkpoint.run_dir import RunDirectory
from trainer.config.schema import OPTIMIZERS, Config
from trainer.data.training_data import TrainingData
from trainer.loop.state import Training, make_training
from trainer.loop.step_check import check_batch_sizes, check_memory
from trainer.runtime.distributed import World

log = logging.getLogger(__name__)

# Contents of a parameter group that steps change. Its other options come from the settings.
_GROUP_STATE = {"params", "lr", "lookahead_step", "step", "weight_sum"}


def open_training(
    config: Config, data: TrainingData, world: World, run_dir: RunDirectory, resuming: bool
) -> tuple[Training, Path | None]:
    """Build the training of a run, and load the newest checkpoint of its directory if it is resumed.

    Returns:
        The training, and the checkpoint that was loaded; None in a new run.

    Raises:
        UserError: There is no intact checkpoint, settings or data do not fit it, or a batch is too small or too large.
    """

    def load() -> tuple[dict[str, Any], Path]:
        saved, source = checkpoint.load_newest(run_dir.checkpoints)
        with errors_as_corrupt(source, checkpoint.HINT):
            check_fits(saved, config, data.classes, data.identity, source)
        if saved["step"] and saved.get("sampler_version") != SAMPLER_VERSION:
            log.warning(
                "%s was written within an epoch by another version, which divided the samples into other batches. The "
                "rest of epoch %d repeats some samples and omits others; later epochs are complete.",
                source,
                saved["epoch"] + 1,
            )
        threads = torch.get_num_threads()
        if world.device.type == "cpu" and saved.get("threads", threads) != threads:
            log.warning(
                "%s was written with %s threads, this process has %d: sums are added in another order, so the weights "
                "will differ in their last bits. For bit-identical weights set OMP_NUM_THREADS=%s.",
                source,
                saved["threads"],
                threads,
                saved["threads"],
            )
        return saved, source

    saved, source = world.run_on_main(load) if resuming else (None, None)
    training = make_training(config, data, world, resuming)
    check_batch_sizes(training)
    check_memory(training)
    if saved is not None and source is not None:
        with errors_as_corrupt(source, checkpoint.HINT):
            try:
                restore(training, saved)
            except (KeyError, RuntimeError, ValueError):
                explain_structure(saved, config, source)
                raise
    return training, source


def restore(training: Training, saved: dict[str, Any]) -> None:
    """Load a checkpoint. The result is bit-identical to an uninterrupted training if nothing has changed.

    If settings or data differ (`checkpoint.resume_allow_changes`), the weights and the optimizer's moments are loaded.
    The schedule continues as if the new settings had been used from the start. The epoch continues after the same
    fraction of its samples, at the next update.

    Args:
        training: A new training; changed in place.
        saved: Contents of a checkpoint that `check_fits` accepted.

    Raises:
        Exception: The checkpoint is damaged.
    """
    is_same_data = saved["data"] == training.data.identity
    is_same = is_same_data and not changed_settings(saved, training.config)
    new = training.checkpoint()
    skipped = {"recipe", "classes", "ema", *(() if is_same else ("learning_rate", "scaler"))}
    for name in (new.keys() & saved.keys()) - skipped:
        check_structure(saved[name], new[name], name)
    state, train, config = training.state, training.data.train, training.config
    if is_same_data:
        # The order of samples depends on the shuffle window, so the run keeps its window whatever the memory.
        train.window, train.window_of_shards = saved["window"], saved.get("window_of_shards", False)
    groups = state.optimizer.param_groups
    state.load_state_dict(saved if is_same else saved | {"learning_rate": new["learning_rate"]})
    kept = _GROUP_STATE if is_same else _GROUP_STATE - {"lr"}
    for group, own in zip(state.optimizer.param_groups, groups, strict=True):
        group.update({name: value for name, value in own.items() if name not in kept})
    if not is_same:
        steps, accumulation = train.steps(state.epoch), config.optim.grad_accumulation
        if steps != saved["steps"] or saved["step"] % accumulation:
            nearest = -(-saved["step"] * steps // saved["steps"])
            state.step = min(steps, -(-nearest // accumulation) * accumulation)
        state.updates = _count_updates(training)
        metrics = training.metrics()
        validated = ["validation" in record for record in state.history[: state.best_epoch]]
        if validated and validated[-1]:  # trainer.monitor may be another one
            state.best = metrics[sum(validated) - 1]
        elif validated and training.data.validation is not None:  # no epoch had a validation split
            state.best = -math.inf
        fraction = training.time_fraction(int(state.earlier_seconds * 1000))
        state.learning_rate.replay(state.updates, state.epoch, metrics, fraction)
        state.lr = state.learning_rate.lr
    _check_restored(training)


def _check_restored(training: Training) -> None:
    """Raise `ValueError` if the parts of a state contradict each other."""
    state, train, window = training.state, training.data.train, training.data.train.window
    run_files.check_history(state.history)
    if len(state.history) != state.epoch or not min(1, state.epoch) <= state.best_epoch <= state.epoch:
        raise ValueError(
            f"a history of {len(state.history)} epochs, the best {state.best_epoch}, in epoch {state.epoch}"
        )
    if not (window is None or (isinstance(window, int) and window > 0)):
        raise ValueError(f"window {window}")
    if not all(isinstance(loss, float) for loss in state.rank_losses):
        raise ValueError("rank_losses are no numbers")
    if state.class_counts.dtype != torch.int64:
        raise ValueError("class_counts are no counts")
    updates = _count_updates(training)
    ends_by_clock = training.config.trainer.minutes is not None  # within an epoch
    if not 0 <= state.step <= train.steps(state.epoch) or not (
        state.updates == updates or (ends_by_clock and 0 <= state.updates < updates)
    ):
        raise ValueError(f"step {state.step} and {state.updates} updates in epoch {state.epoch}")
    # timm's optimizers also have factors of other shapes.
    for parameter, values in state.optimizer.state.items() if training.config.optim.name in OPTIMIZERS else ():
        if any(
            isinstance(value, torch.Tensor) and value.ndim and value.shape != parameter.shape
            for value in values.values()
        ):
            raise ValueError("a state of the optimizer has another shape than its parameter")


def _count_updates(training: Training) -> int:
    """Optimizer steps up to the current step."""
    state, train = training.state, training.data.train
    steps = [*map(train.steps, range(state.epoch)), state.step]
    return sum(-(-count // training.config.optim.grad_accumulation) for count in steps)
