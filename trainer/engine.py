"""The loop: epochs of steps, each epoch judged on the validation part, the best one on the test part at the end."""

from __future__ import annotations

import contextlib
import logging
import signal
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.loader import Batch
from trainer import checkpoint
from trainer.arithmetic import autocast, laid_out
from trainer.distributed import StopVote
from trainer.evaluate import Evaluation, evaluate, model_of, temperature_of
from trainer.loss import weighted_kl
from trainer.mixing import mix, soft_targets
from trainer.progress import Progress, duration
from trainer.randomness import seed_step
from trainer.readback import Readback
from trainer.run_directory import RunDirectory
from trainer.sinks import Sink
from trainer.training import Totals, Training

log = logging.getLogger(__name__)


class Stopped(Exception):
    """A signal asked the run to stop; its state is in the last checkpoint."""

    def __init__(self, signum: int, epoch: int, step: int) -> None:
        super().__init__(signum)
        self.signum = signum
        self.epoch = epoch
        self.step = step


def fit(training: Training, directory: RunDirectory, sinks: list[Sink]) -> Evaluation:
    """Train from where the training stands to the last epoch, then evaluate the best epoch on the test part.

    Rank 0 writes checkpoints, metrics and figures into the directory. Raises `Stopped` after a SIGINT or SIGTERM.
    """
    training.profile.mark("start")
    with _signals() as received:
        while training.epoch < training.config.trainer.epochs:
            train_epoch(training, directory, received)
            _end_epoch(training, directory, sinks)
            if int(training.world.sum(torch.tensor(len(received)))):
                raise _stopped(training, received)
    evaluation = test(training, directory)
    training.profile.mark("test")
    return evaluation


def test(training: Training, directory: RunDirectory) -> Evaluation:
    """Evaluate the best checkpoint on the test part, with the temperature that suits it on the validation part."""
    data, settings, world = training.data, training.config.trainer, training.world
    state = world.share(checkpoint.load(directory.best) if world.speaks else None)
    model = model_of(state, training.config, world.device)
    if data.validation is not None:
        state["temperature"] = temperature_of(model, data.validation, settings, world)
        if world.speaks:
            checkpoint.save(directory.best, state)
    return evaluate(model, data.test, len(data.classes), settings, world, temperature=state["temperature"])


def train_epoch(training: Training, directory: RunDirectory, received: list[int]) -> None:
    """The steps of an epoch from where the training stands; their sums are left in `training.so_far`."""
    config, world = training.config, training.world
    steps = training.data.train.steps(training.epoch)
    accumulation = config.optim.accumulation
    ahead = training.data.train.steps_ahead(training.epoch, config.trainer.epochs)
    progress = Progress(training.epoch, config.trainer.epochs, steps, training.step, ahead)
    vote = StopVote(world)
    here = Totals()
    # Added up in one sequence across a stop, so that a resumed epoch has the loss of one that was not stopped.
    before_stop = training.so_far.loss if world.speaks else 0.0
    loss = torch.tensor(before_stop, dtype=torch.float64, device=world.device)
    shown = Readback(world.device)
    training.forward.train()
    start = before = time.perf_counter()
    with contextlib.closing(training.data.train.batches(training.epoch, training.step)) as batches:
        for batch in training.trace.over(batches, directory.trace):
            here.wait_seconds += time.perf_counter() - before
            training.profile.mark("data wait")
            window_start = batch.step - batch.step % accumulation
            window = min(accumulation, steps - window_start)
            updates = batch.step - window_start + 1 == window

            batch_loss = train_step(training, batch, window, updates)

            loss += batch_loss
            here.samples += batch.global_size
            training.step = batch.step + 1
            if world.speaks:
                shown.offer(batch_loss, len(batch.labels))
                progress.step(training.step, shown, training.learning_rate.now, here.samples, here.wait_seconds)
            if updates and vote.cast(bool(received)):
                break
            training.profile.mark("logging")
            before = time.perf_counter()
    progress.close()
    stopping = vote.finish() or (world.size == 1 and bool(received))
    total_loss = float(world.sum(loss.cpu()))  # waits for the device, so that the seconds below are true
    here.seconds = time.perf_counter() - start
    training.so_far.add(here)
    training.so_far.loss = total_loss
    if stopping:
        if world.speaks:
            checkpoint.save(directory.last, training.state())
        raise _stopped(training, received)


def _stopped(training: Training, received: list[int]) -> Stopped:
    signum = training.world.share(received[0] if received else signal.SIGTERM)
    return Stopped(signum, training.epoch, training.step)


def train_step(training: Training, batch: Batch, window: int, updates: bool) -> torch.Tensor:
    """Learn from one batch: mix, forward, loss, backward, and at the end of a window the update.

    window: batches whose gradients are averaged for one update; updates: whether this is the last of them.
    Returns this rank's loss, summed over its samples (a scalar on the device, without waiting for it).
    """
    config, world = training.config, training.world
    mixing_draws = seed_step(config.seed, training.epoch, batch.step, world.rank)
    targets = soft_targets(batch.labels, len(training.data.classes), config.loss.label_smoothing)
    images, targets = mix(batch.images, targets, config.mixing, mixing_draws)
    images = laid_out(images, config.trainer)
    training.profile.mark("mixing")
    with _gradients_shared(training.forward, updates):
        with autocast(config.trainer, world.device):
            logits = training.forward(images)
        loss = weighted_kl(logits, targets, training.class_weights)
        training.profile.mark("forward")
        # The mean over the global batch; ranks of unequal shares are averaged by DDP, hence the factor.
        (loss * (world.size / (batch.global_size * window))).backward()
        training.profile.mark("backward")
    if updates:
        _update(training)
    return loss.detach()


def _update(training: Training) -> None:
    clip = training.config.optim.clip_norm
    if clip is not None:
        nn.utils.clip_grad_norm_(training.model.parameters(), clip)
    training.optimizer.step()
    training.optimizer.zero_grad(set_to_none=True)
    training.lr = training.learning_rate.now
    training.learning_rate.after_update()
    training.updates += 1
    training.profile.mark("optimiser")
    if training.average is not None:
        training.average.update(training.updates)
        training.profile.mark("average")


@contextlib.contextmanager
def _gradients_shared(forward: nn.Module, now: bool) -> Iterator[None]:
    """Exchange gradients between ranks in this backward pass, or only add them up here."""
    hold = isinstance(forward, DistributedDataParallel) and not now
    with forward.no_sync() if hold else contextlib.nullcontext():
        yield


def _end_epoch(training: Training, directory: RunDirectory, sinks: list[Sink]) -> None:
    """Validate, move the schedule, keep the best weights, write the checkpoint and the epoch's record."""
    config, world, done = training.config, training.world, training.so_far
    # Batch norm's running statistics differ between ranks; what is judged and saved are rank 0's.
    world.share_tensors(list(training.model.buffers()))
    if training.average is not None:
        world.share_tensors(list(training.average.module.buffers()))
    record: dict[str, Any] = {
        "epoch": training.epoch + 1,
        "resolution": training.data.train.phase(training.epoch).resolution,
        "train_loss": done.loss / done.samples,
        "lr": training.lr,
        "seconds": done.seconds,
        "images_per_second": done.images_per_second,
        "data_wait_share": done.wait_share,
    }
    figure = float(training.epoch + 1)  # without a validation part every epoch is the best so far
    if training.data.validation is not None:
        if world.speaks:
            # Killed while it validates, the run has this epoch's training.
            checkpoint.save(directory.last, training.state())
            training.profile.mark("checkpoint")
        classes = len(training.data.classes)
        judged = evaluate(training.evaluated, training.data.validation, classes, config.trainer, world)
        record["validation"] = judged.summary()
        training.profile.mark("validation")
        figure = record["validation"][config.trainer.select]
    training.learning_rate.after_epoch(figure)
    # Of equals the later one, which has learned longer.
    is_best = figure >= training.best
    training.epoch += 1
    if is_best:
        training.best, training.best_epoch = figure, training.epoch
    training.step = 0
    training.finished.add(done)
    training.so_far = Totals()
    training.history.append(record)
    if world.speaks:
        if is_best:
            checkpoint.save(directory.best, training.best_state())
        checkpoint.save(directory.last, training.state())
        directory.write_history(training.history)
        for sink in sinks:
            sink.epoch(record)
        print(_line(record, config.trainer.epochs, is_best), flush=True)
    training.profile.mark("end of epoch")


def _line(record: dict[str, Any], epochs: int, is_best: bool) -> str:
    validation = record.get("validation")
    judged = ""
    if validation:
        judged = f"  validation accuracy {validation['accuracy']:.2%}  macro F1 {validation['macro_f1']:.2%}"
    return (
        f"epoch {record['epoch']}/{epochs}  loss {record['train_loss']:.4f}{judged}  lr {record['lr']:.2e}  "
        f"{record['images_per_second']:,.0f} images/s  data wait {record['data_wait_share']:.1%}  "
        f"{duration(record['seconds'])}{'  best' if is_best and validation else ''}"
    )


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Note SIGINT and SIGTERM instead of dying; the list holds what came. A second one ends at once."""
    received: list[int] = []

    def note(signum: int, frame: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(signum)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
