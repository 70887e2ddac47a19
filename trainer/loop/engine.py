"""The training loop: epochs of steps, validation after each, and a test of the best epoch at the end."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.loader import Batch
from trainer.checkpoint import io as checkpoint
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.checkpoint.run_dir import RunDirectory
from trainer.evaluate.evaluator import Evaluation, evaluate, predict_logits
from trainer.evaluate.logit_adjustment import fit_posthoc
from trainer.loop.epoch_meter import EpochMeter
from trainer.loop.nan_guard import NonFiniteMonitor, NonFiniteStep, save_batch
from trainer.loop.state import Totals, Training
from trainer.models.precision import autocast, to_memory_format
from trainer.optim.losses import weighted_kl
from trainer.optim.mixup import apply_mixup_cutmix, soft_targets
from trainer.runtime.distributed import AsyncFlags
from trainer.runtime.loggers import MetricLogger
from trainer.runtime.progress import print_epoch
from trainer.runtime.seeding import seed_step
from trainer.runtime.signals import Interrupted, record_signals

GradientCheck = Callable[[int, torch.Tensor, bool], None]


class Stopped(Exception):
    """A signal stopped the run; its state is in the last checkpoint."""

    def __init__(self, signum: int, epoch: int, step: int) -> None:
        super().__init__(signum)
        self.signum = signum
        self.epoch = epoch
        self.step = step


@dataclass(frozen=True)
class Services:
    """Where the loop writes, and the signals that it obeys."""

    run_dir: RunDirectory
    checkpointer: Checkpointer
    signals_received: list[int]
    loggers: list[MetricLogger]


def fit(
    training: Training, run_dir: RunDirectory, loggers: list[MetricLogger], source: Path | None = None
) -> Evaluation:
    """Train from the current state to the last epoch, then evaluate the best epoch on the test split.

    Args:
        training: Changed in place.
        run_dir: Rank 0 writes checkpoints and metrics into it.
        loggers: Further receivers of an epoch's record, on rank 0.
        source: The checkpoint that is resumed, if any.

    Raises:
        Stopped: After a SIGINT or SIGTERM.
        NonFiniteLossError: A loss or gradient is not finite.
    """
    with _services(training, run_dir, loggers, source) as services:
        _train(training, services)
        evaluation = test(training, services)
        training.profile.mark("test")
        return evaluation


def fit_without_test(
    training: Training, run_dir: RunDirectory, loggers: list[MetricLogger], source: Path | None = None
) -> None:
    """Train as `fit` does, without the test. An exception of a logger ends it after the epoch's checkpoint."""
    with _services(training, run_dir, loggers, source) as services:
        _train(training, services)


@contextlib.contextmanager
def _services(
    training: Training, run_dir: RunDirectory, loggers: list[MetricLogger], source: Path | None
) -> Iterator[Services]:
    """Open the checkpointer, write a first checkpoint and record signals; `Interrupted` becomes `Stopped`."""
    training.profile.mark("start")
    settings = training.config.checkpoint
    last_is_complete = source is None or source.name == checkpoint.LAST
    with (
        record_signals(settings.grace_seconds) as signals_received,
        Checkpointer(run_dir, settings, training.state.step, last_is_complete) as checkpointer,
    ):
        if source is None and training.world.is_main_process:
            checkpointer.save(training.checkpoint())
        try:
            yield Services(run_dir, checkpointer, signals_received, loggers)
        except Interrupted:
            raise _stopped(training, signals_received) from None


def _train(training: Training, services: Services) -> None:
    while training.state.epoch < training.config.trainer.epochs:
        try:
            train_epoch(training, services)
        except NonFiniteStep as found:
            services.checkpointer.finish()
            raise save_batch(training, services.run_dir, found) from None
        _end_epoch(training, services)
        if training.world.all_reduce_max(len(services.signals_received)):
            raise Interrupted


def train_epoch(training: Training, services: Services) -> None:
    """Train from the current step to the end of the epoch; its totals are in `training.state.epoch_totals`.

    Raises:
        Stopped: A signal came; the checkpoint is written.
        NonFiniteStep: A loss or gradient is not finite.
    """
    state, world, train = training.state, training.world, training.data.train
    steps, accumulation = train.steps(state.epoch), training.config.optim.grad_accumulation
    flags, monitor, meter = AsyncFlags(world, 2), NonFiniteMonitor(training), EpochMeter(training)
    training.forward.train()

    def commit() -> None:
        monitor.finish()
        meter.commit()

    with contextlib.closing(train.batches(state.epoch, state.step)) as batches:
        for batch in training.trace.over(batches, services.run_dir.trace):
            meter.stop_waiting()
            training.profile.mark("data wait")
            first_microbatch = batch.step - batch.step % accumulation
            accumulation_steps = min(accumulation, steps - first_microbatch)
            is_last_microbatch = batch.step - first_microbatch + 1 == accumulation_steps
            loss = train_step(training, batch, accumulation_steps, is_last_microbatch, monitor.check_batch)
            meter.update(batch, loss)
            state.step = batch.step + 1
            if is_last_microbatch:
                signalled, due = bool(services.signals_received), services.checkpointer.is_due(state.step)
                stop, save = flags.reduce(signalled, due)
                if stop:
                    break
                if save:
                    commit()
                    _save_checkpoint(training, services)
            training.profile.mark("logging")
            del batch  # free it before the loader allocates the next one
            meter.start_waiting()
    meter.close()
    stop = flags.wait()[0] or (world.size == 1 and bool(services.signals_received))
    commit()
    if stop:
        _save_checkpoint(training, services)
        raise _stopped(training, services.signals_received)


def _save_checkpoint(training: Training, services: Services) -> None:
    if training.world.is_main_process:
        services.checkpointer.save(training.checkpoint())
    training.profile.mark("checkpoint")


def _stopped(training: Training, signals_received: list[int]) -> Stopped:
    signum = training.world.broadcast_object(signals_received[0] if signals_received else signal.SIGTERM)
    return Stopped(signum, training.state.epoch, training.state.step)


def train_step(
    training: Training,
    batch: Batch,
    accumulation_steps: int,
    is_last_microbatch: bool,
    gradient_check: GradientCheck | None = None,
) -> torch.Tensor:
    """Train on one batch: mixup, forward, loss, backward, and the update after the last microbatch.

    Args:
        training: Changed in place.
        batch: This rank's share of a global batch.
        accumulation_steps: Batches whose gradients are averaged for one update.
        is_last_microbatch: Whether this batch is the last of them.
        gradient_check: Called with step, loss and `is_last_microbatch` before the update.

    Returns:
        This rank's loss, summed over its samples: a scalar on the device, without waiting for it.
    """
    config, world, epoch = training.config, training.world, training.state.epoch
    mixing_draws = seed_step(config.seed, epoch, batch.step, world.rank)
    targets = soft_targets(batch.labels, len(training.data.classes), config.loss.label_smoothing)
    images, targets = apply_mixup_cutmix(
        batch.images, targets, config.mixup.at(epoch, config.trainer.epochs), mixing_draws
    )
    images = to_memory_format(images, config.trainer)
    training.profile.mark("mixing")
    with _gradient_sync(training.forward, is_last_microbatch):
        with autocast(config.trainer, world.device):
            logits = training.forward(images)
        logits = logits + training.logit_shift
        loss = weighted_kl(logits, targets, training.class_weights)
        if training.teacher is not None:
            loss = training.teacher.distillation_loss(loss, logits, images, training.class_weights)
        training.profile.mark("forward")
        # The mean over the global batch; DDP averages ranks of unequal shares, hence the factor.
        (loss * (world.size / (batch.global_size * accumulation_steps))).backward()
        training.profile.mark("backward")
    if gradient_check is not None:
        gradient_check(batch.step, loss, is_last_microbatch)
    if is_last_microbatch:
        _update(training)
    return loss.detach()


def _update(training: Training) -> None:
    """Clip the gradients and step the optimizer, the moving average and the schedule."""
    state, max_grad_norm = training.state, training.config.optim.max_grad_norm
    if max_grad_norm is not None:
        nn.utils.clip_grad_norm_(state.model.parameters(), max_grad_norm)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.updates += 1
    training.profile.mark("optimiser")
    if state.ema is not None:
        state.ema.update(state.updates)
        training.profile.mark("average")
    state.lr = state.learning_rate.lr
    state.learning_rate.step_update()


@contextlib.contextmanager
def _gradient_sync(forward: nn.Module, enabled: bool) -> Iterator[None]:
    """All-reduce gradients in this backward pass, or only accumulate them."""
    skip = isinstance(forward, DistributedDataParallel) and not enabled
    with forward.no_sync() if skip else contextlib.nullcontext():
        yield


def _end_epoch(training: Training, services: Services) -> None:
    """Validate, step the schedule, update the best epoch, write checkpoint and record."""
    state, config, world, totals = training.state, training.config, training.world, training.state.epoch_totals
    # Batch norm's running statistics differ between ranks; rank 0's are evaluated and saved.
    world.broadcast_tensors_(list(state.model.buffers()))
    if state.ema is not None:
        world.broadcast_tensors_(list(state.ema.module.buffers()))
    record: dict[str, Any] = {
        "epoch": state.epoch + 1,
        "resolution": training.data.train.stage_at(state.epoch).resolution,
        "train_loss": totals.loss / max(totals.samples, 1),
        "lr": state.lr,
        "seconds": totals.seconds,
        "images_per_second": totals.images_per_second,
        "data_wait_share": totals.wait_fraction,
    }
    metric = float(state.epoch + 1)  # without a validation split every epoch is the best so far
    if training.data.validation is not None:
        _save_checkpoint(training, services)  # a kill during validation costs no training
        record["validation"] = _validate(training, services.signals_received).summary()
        training.profile.mark("validation")
        metric = record["validation"][config.trainer.monitor]
    state.learning_rate.step_epoch(metric)
    is_best = metric >= state.best  # on ties keep the later epoch
    state.epoch += 1
    if is_best:
        state.best, state.best_epoch = metric, state.epoch
    state.step = 0
    state.total = state.total.plus(totals)
    state.epoch_totals, state.rank_losses = Totals(), []
    state.history.append(record)
    if world.is_main_process:
        services.checkpointer.save(training.checkpoint(), training.trained_model() if is_best else None)
        for logger in services.loggers:
            logger.log_epoch(record)
        print_epoch(record, config.trainer.epochs, is_best)
    training.profile.mark("end of epoch")


def _validate(training: Training, signals_received: list[int]) -> Evaluation:
    return evaluate(
        training.state.eval_model,
        training.data.validation,
        len(training.data.classes),
        training.config.trainer,
        training.world,
        signals_received,
        offsets=training.offsets,
    )


def test(training: Training, services: Services) -> Evaluation:
    """Evaluate the best epoch on the test split, calibrated on the validation split if there is one."""
    data, settings, world = training.data, training.config.trainer, training.world
    trained = world.run_on_main(services.checkpointer.best)
    model = trained.build_model(world.device)
    if data.validation is not None:
        found = predict_logits(model, data.validation, settings, world, services.signals_received)
        tau = training.config.posthoc.tau
        decided = fit_posthoc(*found, training.log_weights, tau, settings.monitor) if found else None
        training.decision = decided = world.broadcast_object(decided)
        trained = replace(trained, tau=decided.tau, offsets=decided.offsets, temperature=decided.temperature)
        if world.is_main_process:
            services.checkpointer.replace_best(trained)
    classes, posthoc = len(data.classes), trained.posthoc_kwargs()
    return evaluate(model, data.test, classes, settings, world, services.signals_received, **posthoc)
