"""The training loop: `fit` runs epochs of `train_step` with validation after each, `evaluate_best` tests the best."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.loader import Batch
from shards.errors import CorruptError, UserError
from trainer.checkpoint import io as checkpoint
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.checkpoint.run_dir import RunDirectory
from trainer.checkpoint.trained_model import TrainedModel
from trainer.config.schema import Config, LossConfig
from trainer.evaluate.evaluator import Evaluation, evaluate, predict_logits
from trainer.evaluate.logit_adjustment import fit_posthoc, limit_samples
from trainer.evaluate.metrics import ClassificationMetrics, count_classes_
from trainer.loop import console
from trainer.loop.epoch_meter import EpochMeter
from trainer.loop.nan_guard import NonFiniteMonitor, NonFiniteStep, save_batch
from trainer.loop.state import Totals, Training
from trainer.models.precision import autocast, to_memory_format
from trainer.models.transfer import set_training_mode
from trainer.optim.distillation import DistillationTeacher
from trainer.optim.losses import weighted_bce, weighted_focal, weighted_kl
from trainer.optim.mixup import apply_mixup_cutmix, soft_targets
from trainer.optim.schedule_free import ScheduleFreeWeights
from trainer.runtime.distributed import AsyncFlags
from trainer.runtime.loggers.base import MetricLogger
from trainer.runtime.profiler import trace_steps
from trainer.runtime.seeding import seed_step
from trainer.runtime.signals import Interrupted, raise_if_signalled, record_signals

log = logging.getLogger(__name__)

_BATCH_NORM_BATCHES = 50  # from which the statistics of batch norm are computed for averaged weights


@dataclass(frozen=True)
class RunServices:
    """The outputs of the training loop, and the signals that stop it."""

    run_dir: RunDirectory
    checkpointer: Checkpointer
    signals_received: list[int]
    loggers: list[MetricLogger]
    trace: torch.profiler.profile | None = None


@contextlib.contextmanager
def open_services(
    training: Training, run_dir: RunDirectory, loggers: list[MetricLogger], source: Path | None = None
) -> Iterator[RunServices]:
    """Open the checkpointer and record signals; a new run also writes its first checkpoint.

    Args:
        training: The training.
        run_dir: Rank 0 writes checkpoints and metrics into it.
        loggers: Further receivers of each epoch's record, on rank 0.
        source: The checkpoint that is resumed, if any.
    """
    training.profile.mark("start")
    settings, is_main_process = training.config.checkpoint, training.world.is_main_process
    traced_steps = training.config.trainer.traced_steps if is_main_process else None
    last_is_intact = source is None or source.name == checkpoint.LAST
    with (
        record_signals(settings.grace_seconds) as signals_received,
        Checkpointer(run_dir, settings, training.state.step, last_is_intact) as checkpointer,
        trace_steps(traced_steps, run_dir.trace) as trace,
    ):
        if source is None and is_main_process:
            checkpointer.save(training.checkpoint())
        if source is not None:
            _replace_lost_best(training, checkpointer)
        yield RunServices(run_dir, checkpointer, signals_received, loggers, trace)


def _replace_lost_best(training: Training, checkpointer: Checkpointer) -> None:
    """Select another best epoch if `best.pt` is of a later one than the resumed checkpoint knows.

    `best.pt` is written first, and a kill or a full disk may prevent `last.pt`. The best weights before are then lost.
    """
    state = training.state
    with contextlib.suppress(UserError):  # `evaluate_best` reports it, unless an epoch replaces it
        epoch = training.world.run_on_main(lambda: checkpointer.best().epoch)
        if 0 < state.best_epoch < epoch:
            log.warning(
                "%s is of epoch %d, later than the resumed checkpoint; the best of the epochs from %d on replaces it",
                checkpoint.BEST,
                epoch,
                state.epoch + bool(state.step),
            )
            state.best = -math.inf
            if not state.step:  # the weights are those of the last epoch
                state.best, state.best_epoch = training.last_metric(), state.epoch
                if training.world.is_main_process:
                    checkpointer.save(training.checkpoint(), training.trained_model())


def fit(training: Training, services: RunServices) -> None:
    """Train from the current state to the end: the last epoch, `trainer.minutes` or `trainer.patience`.

    Args:
        training: Changed in place.
        services: See `open_services`.

    Raises:
        Interrupted: After a signal (see `record_signals`); the checkpoint is written.
        NonFiniteLossError: A loss or gradient is not finite.
    """
    while not training.find_end():
        try:
            train_epoch(training, services)
        except NonFiniteStep as step:
            services.checkpointer.finish()
            raise save_batch(training, services.run_dir, step) from None
        _end_epoch(training, services)
        raise_if_signalled(training.world, services.signals_received)


def train_epoch(training: Training, services: RunServices) -> None:
    """Train from the current step to the end of the epoch; its totals are in `training.state.epoch_totals`.

    Raises:
        Interrupted: After a signal; the checkpoint is written.
        NonFiniteStep: A loss or gradient is not finite.
    """
    state, world, train = training.state, training.world, training.data.train
    steps, accumulation = train.steps(state.epoch), training.config.optim.grad_accumulation
    flags, monitor = AsyncFlags(world), NonFiniteMonitor(training)
    signum = 0
    set_training_mode(training.forward)

    def save_checkpoint() -> None:
        monitor.finish()
        meter.commit()
        _save_checkpoint(training, services)

    with contextlib.closing(train.batches(state.epoch, state.step)) as batches:
        # The clock of the meter starts when the transform of the epoch is built.
        meter = EpochMeter(training, services.loggers, monitor)
        for batch in batches:
            meter.stop_waiting()
            training.profile.mark("data wait")
            first_microbatch = batch.step - batch.step % accumulation
            accumulation_steps = min(accumulation, steps - first_microbatch)
            is_last_microbatch = batch.step - first_microbatch + 1 == accumulation_steps
            loss = train_step(training, batch, accumulation_steps, is_last_microbatch, monitor)
            meter.update(batch, loss)
            state.step = batch.step + 1
            if is_last_microbatch:
                is_due = world.is_main_process and services.checkpointer.is_due(state.step)  # its clock counts
                received = max(services.signals_received, default=0)
                signum, saves, milliseconds = flags.reduce(received, is_due, training.milliseconds)
                fraction = training.time_fraction(milliseconds)
                state.learning_rate.step_time(fraction)
                if signum or fraction >= 1:
                    break
                if saves:
                    save_checkpoint()
            if services.trace is not None:
                services.trace.step()
            training.profile.mark("logging")
            del batch  # free it before the loader allocates the next one
            meter.start_waiting()
    meter.close()
    if signum := max(signum, flags.wait()[0]):
        save_checkpoint()
        raise Interrupted(signum)
    monitor.finish()
    meter.commit()


def _save_checkpoint(training: Training, services: RunServices) -> None:
    if training.world.is_main_process:
        services.checkpointer.save(training.checkpoint())
    training.profile.mark("checkpoint")


def train_step(
    training: Training,
    batch: Batch,
    accumulation_steps: int,
    is_last_microbatch: bool,
    monitor: NonFiniteMonitor | None = None,
) -> torch.Tensor:
    """Train on one batch: mixup, forward, loss, backward, and the update after the last microbatch.

    Args:
        training: Changed in place.
        batch: This rank's slice of a global batch.
        accumulation_steps: Batches whose gradients are averaged for one update.
        is_last_microbatch: Whether this batch is the last of them.
        monitor: Checks loss and gradient before the update.

    Returns:
        This rank's loss, summed over its samples: a scalar on the device. No synchronization takes place.
    """
    loss = forward_backward(training, batch, accumulation_steps, is_last_microbatch)
    if is_last_microbatch:
        training.state.scaler.unscale_(training.state.optimizer)
    if monitor is not None:
        monitor.check_batch(batch.step, loss, is_last_microbatch)
    if is_last_microbatch:
        _update(training)
    return loss


def forward_backward(
    training: Training, batch: Batch, accumulation_steps: int, is_last_microbatch: bool
) -> torch.Tensor:
    """Add the gradients of one batch; see `train_step`."""
    config, world, epoch = training.config, training.world, training.state.epoch
    images, targets, is_mixed = mix_batch(
        config, epoch, batch.step, world.rank, batch.images, batch.labels, len(training.data.classes)
    )
    training.profile.mark("mixing")
    forward = training.forward
    skip_all_reduce: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if isinstance(forward, DistributedDataParallel) and not is_last_microbatch:
        skip_all_reduce = forward.no_sync()
    with skip_all_reduce:
        with autocast(config.trainer, world.device):
            logits = forward(images)
        loss = compute_loss(
            logits, targets, images, training.logit_adjustment, training.class_weights, training.teacher, config.loss
        )
        if not is_mixed:
            count_classes_(training.class_counts, batch.labels, logits.detach() - training.decision_offsets)
        training.profile.mark("forward")
        # The mean over the global batch. DDP averages over ranks, whose slices differ in size, hence the factor.
        training.state.scaler.scale(loss * (world.size / (batch.global_size * accumulation_steps))).backward()
        training.profile.mark("backward")
    return loss.detach()


def mix_batch(
    config: Config, epoch: int, step: int, rank: int, images: torch.Tensor, labels: torch.Tensor, classes: int
) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Seed the step, smooth the labels, and apply mixup or CutMix.

    Args:
        config: The settings.
        epoch: From 0.
        step: From 0.
        rank: The rank of the batch.
        images: float32 [n, channels, H, W].
        labels: int64 [n].
        classes: Number of classes C.

    Returns:
        The images in the memory format of the model, targets float32 [n, C], and whether they were mixed.
    """
    rng = seed_step(config.seed, epoch, step, rank)
    smooth = soft_targets(labels, classes, config.loss.label_smoothing)
    mixup, repeats = config.mixup.at(epoch, config.trainer.epochs), config.loader.repeated_augmentation
    images, targets = apply_mixup_cutmix(images, smooth, mixup, rng, repeats)
    return to_memory_format(images, config.trainer), targets, targets is not smooth


def compute_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    images: torch.Tensor,
    logit_adjustment: torch.Tensor,
    class_weights: torch.Tensor,
    teacher: DistillationTeacher | None,
    settings: LossConfig,
) -> torch.Tensor:
    """Compute the training loss, summed over the batch.

    Args:
        logits: [n, C].
        targets: float32 [n, C].
        images: The model input, for the teacher.
        logit_adjustment: float32 [C], added to the logits.
        class_weights: float32 [C].
        teacher: The teacher of knowledge distillation, if any.
        settings: Name and parameter of the loss.
    """
    adjusted = logits + logit_adjustment
    if settings.name == "bce":
        loss = weighted_bce(adjusted, targets, class_weights)
    elif settings.name == "focal":
        loss = weighted_focal(adjusted, targets, class_weights, settings.focal_gamma)
    else:
        loss = weighted_kl(adjusted, targets, class_weights)
    return loss if teacher is None else teacher.distillation_loss(loss, logits, images)


def _update(training: Training) -> None:
    """Clip the gradients and step the optimizer, the moving average and the schedule.

    In fp16, the scaler skips the optimizer on the device if a gradient has overflowed. No value is read, so the step
    counts as an update of the moving average and the schedule.
    """
    state, max_grad_norm = training.state, training.config.optim.max_grad_norm
    if max_grad_norm is not None:
        nn.utils.clip_grad_norm_(state.model.parameters(), max_grad_norm)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    state.updates += 1
    training.profile.mark("optimizer")
    if state.ema is not None:
        state.ema.update(state.updates)
        training.profile.mark("EMA")
    state.lr = state.learning_rate.lr
    state.learning_rate.step_update()


def _end_epoch(training: Training, services: RunServices) -> None:
    """Validate, step the schedule, update the best epoch, and write checkpoint and record."""
    state, config, world, totals = training.state, training.config, training.world, training.state.epoch_totals
    if isinstance(state.ema, ScheduleFreeWeights):
        seed_step(config.seed, state.epoch, state.step, world.rank)  # of drop path, also if validation is resumed
        with contextlib.closing(training.data.train.batches(state.epoch)) as batches:
            some = itertools.islice(batches, _BATCH_NORM_BATCHES)
            images = (to_memory_format(batch.images, config.trainer) for batch in some)
            state.ema.refresh(images, autocast(config.trainer, world.device))
    # Batch norm's running statistics differ between ranks; rank 0's are evaluated and saved.
    world.broadcast_tensors_(list(state.model.buffers()))
    if state.ema is not None:
        world.broadcast_tensors_(list(state.ema.module.buffers()))
    record: dict[str, Any] = {
        "epoch": state.epoch + 1,
        "step": state.updates,
        "resolution": training.data.train.stage_at(state.epoch).resolution,
        "train_loss": totals.loss / max(totals.samples, 1),
        **_train_metrics(state.class_counts),
        "lr": state.lr,
        "seconds": totals.seconds,
        "images_per_second": totals.images_per_second,
        "data_wait_share": totals.wait_fraction,
    }
    if training.data.validation is not None:
        _save_checkpoint(training, services)  # a kill during validation costs no training
        evaluation = evaluate(
            state.eval_model,
            training.data.validation,
            config.trainer,
            world,
            services.signals_received,
            offsets=training.offsets,
        )
        record["validation"] = evaluation.summary()
        training.profile.mark("validation")
    state.history.append(record)
    metric = training.last_metric()
    state.learning_rate.step_epoch(metric)
    is_best = metric >= state.best  # on ties keep the later epoch
    state.epoch += 1
    if is_best:
        state.best, state.best_epoch = metric, state.epoch
    state.step = 0
    state.total = state.total + totals
    state.epoch_totals, state.rank_losses = Totals(), []
    state.class_counts = torch.zeros_like(state.class_counts)
    if world.is_main_process:
        services.checkpointer.save(training.checkpoint(), training.trained_model() if is_best else None)
        for logger in services.loggers:
            logger.log_weights(record, state.eval_model)
            logger.log_epoch(record)
        console.print_epoch(record, config.trainer, is_best)
    training.profile.mark("end of epoch")


def _train_metrics(class_counts: torch.Tensor) -> dict[str, float]:
    """Return accuracy and macro F1 of an epoch's predictions; nothing if every batch was mixed."""
    metrics = ClassificationMetrics(*class_counts.numpy())
    return {"train_accuracy": metrics.accuracy, "train_macro_f1": metrics.macro_f1} if metrics.samples else {}


def evaluate_best(training: Training, services: RunServices) -> Evaluation:
    """Evaluate the best epoch on the test split, calibrated on the validation split if there is one.

    All checkpoints are on disk when it returns.

    Raises:
        Interrupted: After a signal.
        UserError: A checkpoint cannot be written.
    """
    data, settings, world, state = training.data, training.config.trainer, training.world, training.state

    def load_best() -> TrainedModel:
        best = services.checkpointer.best()
        if (best.classes, best.channels, best.epoch) != (data.classes, data.spec.image_shape[2], state.best_epoch):
            raise CorruptError(
                found=f"{services.run_dir.best}, with epoch {best.epoch} and {len(best.classes)} classes",
                expected=f"epoch {state.best_epoch} of this run, with {len(data.classes)} classes",
                hint=checkpoint.HINT,
            )
        return best

    trained = world.run_on_main(load_best)
    model = trained.build_model(world.device)
    if data.validation is not None:
        loader = limit_samples(data.validation, len(data.classes))
        outputs = predict_logits(model, loader, settings, world, services.signals_received)
        if outputs is not None:
            tau, monitor = training.config.posthoc.tau, settings.monitor
            training.posthoc = fit_posthoc(outputs.logits, outputs.labels, training.log_class_weights, tau, monitor)
        training.posthoc = posthoc = world.broadcast_object(training.posthoc)
        trained = replace(trained, tau=posthoc.tau, offsets=posthoc.offsets, temperature=posthoc.temperature)
        if world.is_main_process:
            services.checkpointer.replace_best(trained)
    evaluation = evaluate(model, data.test, settings, world, services.signals_received, **trained.posthoc_kwargs())
    training.profile.mark("test")
    world.run_on_main(services.checkpointer.ensure_saved)
    return evaluation
