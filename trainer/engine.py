"""The loop: epochs of steps, each epoch judged on the validation part, the best one on the test part at the end."""

from __future__ import annotations

import contextlib
import functools
import logging
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.loader import Batch
from trainer import checkpoint
from trainer.arithmetic import autocast, laid_out
from trainer.decision import decide
from trainer.distributed import Vote
from trainer.evaluate import Evaluation, evaluate, logits_of
from trainer.keeper import Keeper
from trainer.loss import weighted_kl
from trainer.mixing import mix, soft_targets
from trainer.nonfinite import NonFinite, Watch, go_back, look_closely
from trainer.randomness import seed_step
from trainer.run_directory import RunDirectory
from trainer.runtime.loggers import Sink
from trainer.runtime.progress import Progress, duration
from trainer.runtime.readback import Readback
from trainer.signals import Interrupted, noted
from trainer.training import Totals, Training

log = logging.getLogger(__name__)


class Stopped(Exception):
    """A signal asked the run to stop; its state is in the last checkpoint."""

    def __init__(self, signum: int, epoch: int, step: int) -> None:
        super().__init__(signum)
        self.signum = signum
        self.epoch = epoch
        self.step = step


def fit(training: Training, directory: RunDirectory, sinks: list[Sink], source: Path | None = None) -> Evaluation:
    """Train from where the training stands to the last epoch, then evaluate the best epoch on the test part.

    Rank 0 writes checkpoints, metrics and figures into the directory. source: the checkpoint that it goes on from.
    Raises `Stopped` after a SIGINT or SIGTERM, and `UserError` when more batches than allowed are not finite.
    """
    with _kept(training, directory, source) as (keeper, received):
        _learn(training, directory, keeper, sinks, received)
        evaluation = test(training, keeper, received)
        training.profile.mark("test")
        return evaluation


def learn(training: Training, directory: RunDirectory, sinks: list[Sink], source: Path | None = None) -> None:
    """Train as `fit` does, and leave the test part alone. What a sink raises ends it, with the epoch's checkpoint."""
    with _kept(training, directory, source) as (keeper, received):
        _learn(training, directory, keeper, sinks, received)


@contextlib.contextmanager
def _kept(training: Training, directory: RunDirectory, source: Path | None) -> Iterator[tuple[Keeper, list[int]]]:
    """A keeper of checkpoints, with a first one written, and the signals that come; one of them ends in `Stopped`."""
    training.profile.mark("start")
    settings = training.config.checkpoint
    last_is_whole = source is None or source.name == checkpoint.LAST
    with (
        noted(settings.grace_seconds) as received,
        Keeper(directory, settings, training.step, last_is_whole) as keeper,
    ):
        if source is None and training.world.speaks:
            keeper.save(training.state())
        try:
            yield keeper, received
        except Interrupted:
            raise _stopped(training, received) from None


def _learn(training: Training, directory: RunDirectory, keeper: Keeper, sinks: list[Sink], received: list[int]) -> None:
    while training.epoch < training.config.trainer.epochs:
        try:
            train_epoch(training, directory, keeper, received)
        except NonFinite as found:
            go_back(training, directory, keeper, found)
            continue
        _end_epoch(training, keeper, sinks, received)
        if training.world.largest(len(received)):
            raise Interrupted


def test(training: Training, keeper: Keeper, received: list[int]) -> Evaluation:
    """Evaluate the best checkpoint on the test part, by the decision that suits it on the validation part."""
    data, settings, world = training.data, training.config.trainer, training.world
    trained = world.on_first(keeper.best)
    model = trained.build_model(world.device)
    if data.validation is not None:
        found = logits_of(model, data.validation, settings, world, received)
        tau = training.config.posthoc.tau
        training.decision = world.share(decide(*found, training.log_weights, tau, settings.monitor) if found else None)
        decided = training.decision
        trained = replace(trained, tau=decided.tau, offsets=decided.offsets, temperature=decided.temperature)
        if world.speaks:
            keeper.replace_best(trained)
    return evaluate(model, data.test, len(data.classes), settings, world, received, **trained.posthoc_kwargs())


def train_epoch(training: Training, directory: RunDirectory, keeper: Keeper, received: list[int]) -> None:
    """The steps of an epoch from where the training stands; their sums are left in `training.so_far`."""
    config, world = training.config, training.world
    steps = training.data.train.steps(training.epoch)
    accumulation = config.optim.grad_accumulation
    ahead = training.data.train.steps_ahead(training.epoch, config.trainer.epochs)
    progress = Progress(training.epoch, config.trainer.epochs, steps, training.step, ahead)
    vote = Vote(world, words=3)
    watch = Watch(training)
    earlier, here = training.so_far, Totals()
    # Added up in one sequence across a stop, so that a resumed epoch has the loss of one that was not stopped.
    loss = torch.tensor(training.loss_here, dtype=torch.float64, device=world.device)
    shown = Readback(world.device)
    training.forward.train()
    start = before = time.perf_counter()

    def take_stock() -> None:
        """Leave the sums so far in the training; waits for the device, so that the seconds are true."""
        watch.settle()
        training.losses = world.each(float(loss))
        here.seconds = time.perf_counter() - start
        training.so_far = earlier.plus(here)
        training.so_far.loss = sum(training.losses)

    with contextlib.closing(training.data.train.batches(training.epoch, training.step)) as batches:
        for batch in training.trace.over(batches, directory.trace):
            here.wait_seconds += time.perf_counter() - before
            training.profile.mark("data wait")
            window_start = batch.step - batch.step % accumulation
            window = min(accumulation, steps - window_start)
            updates = batch.step - window_start + 1 == window

            if (training.epoch, window_start) in training.skipped:
                if updates:
                    _count_update(training)
            else:
                closely = training.look_until is not None and (training.epoch, batch.step) <= training.look_until
                look = functools.partial(look_closely, training, directory, batch) if closely else None

                batch_loss = train_step(training, batch, window, updates, look)

                loss += batch_loss
                watch.note(batch.step, batch_loss)
                here.samples += batch.global_size
                if world.speaks:
                    shown.offer(batch_loss, len(batch.labels))
                    done = batch.step + 1
                    progress.step(done, shown, training.learning_rate.now, here.samples, here.wait_seconds)
            training.step = batch.step + 1
            if updates:
                stop, save, bad = vote.cast(bool(received), keeper.is_due(training.step), watch.word)
                watch.heed(bad)
                if stop:
                    break
                if save:
                    take_stock()
                    if world.speaks:
                        keeper.save(training.state())
                    training.profile.mark("checkpoint")
            training.profile.mark("logging")
            del batch  # whose memory may be the next one's
            before = time.perf_counter()
    progress.close()
    stopping = vote.finish()[0] or (world.size == 1 and bool(received))
    take_stock()
    if stopping:
        if world.speaks:
            keeper.save(training.state())
        raise _stopped(training, received)


def _stopped(training: Training, received: list[int]) -> Stopped:
    signum = training.world.share(received[0] if received else signal.SIGTERM)
    return Stopped(signum, training.epoch, training.step)


def train_step(
    training: Training,
    batch: Batch,
    window: int,
    updates: bool,
    look: Callable[[torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """Learn from one batch: mix, forward, loss, backward, and at the end of a window the update.

    window: batches whose gradients are averaged for one update; updates: whether this is the last of them.
    look: given the loss after the backward pass, to refuse the update.
    Returns this rank's loss, summed over its samples (a scalar on the device, without waiting for it).
    """
    config, world = training.config, training.world
    mixing_draws = seed_step(config.seed, training.epoch, batch.step, world.rank)
    targets = soft_targets(batch.labels, len(training.data.classes), config.loss.label_smoothing)
    mixing = config.mixup.at(training.epoch, config.trainer.epochs)
    images, targets = mix(batch.images, targets, mixing, mixing_draws)
    images = laid_out(images, config.trainer)
    training.profile.mark("mixing")
    with _gradients_shared(training.forward, updates):
        with autocast(config.trainer, world.device):
            logits = training.forward(images)
        logits = logits + training.logit_shift
        loss = weighted_kl(logits, targets, training.class_weights)
        if training.teacher is not None:
            loss = training.teacher.teach(loss, logits, images, training.class_weights)
        training.profile.mark("forward")
        # The mean over the global batch; ranks of unequal shares are averaged by DDP, hence the factor.
        (loss * (world.size / (batch.global_size * window))).backward()
        training.profile.mark("backward")
    if look is not None:
        look(loss)
    if updates:
        _update(training)
    return loss.detach()


def _update(training: Training) -> None:
    clip = training.config.optim.max_grad_norm
    if clip is not None:
        nn.utils.clip_grad_norm_(training.model.parameters(), clip)
    training.optimizer.step()
    training.optimizer.zero_grad(set_to_none=True)
    _count_update(training)
    training.profile.mark("optimiser")
    if training.average is not None:
        training.average.update(training.updates)
        training.profile.mark("average")


def _count_update(training: Training) -> None:
    """Move the schedule by an update, made or left out."""
    training.lr = training.learning_rate.now
    training.learning_rate.after_update()
    training.updates += 1


@contextlib.contextmanager
def _gradients_shared(forward: nn.Module, now: bool) -> Iterator[None]:
    """Exchange gradients between ranks in this backward pass, or only add them up here."""
    hold = isinstance(forward, DistributedDataParallel) and not now
    with forward.no_sync() if hold else contextlib.nullcontext():
        yield


def _end_epoch(training: Training, keeper: Keeper, sinks: list[Sink], received: list[int]) -> None:
    """Validate, move the schedule, keep the best weights, write the checkpoint and the epoch's record."""
    config, world, done = training.config, training.world, training.so_far
    # Batch norm's running statistics differ between ranks; what is judged and saved are rank 0's.
    world.share_tensors(list(training.model.buffers()))
    if training.average is not None:
        world.share_tensors(list(training.average.module.buffers()))
    record: dict[str, Any] = {
        "epoch": training.epoch + 1,
        "resolution": training.data.train.phase(training.epoch).resolution,
        "train_loss": done.loss / max(done.samples, 1),
        "lr": training.lr,
        "seconds": done.seconds,
        "images_per_second": done.images_per_second,
        "data_wait_share": done.wait_share,
    }
    figure = float(training.epoch + 1)  # without a validation part every epoch is the best so far
    if training.data.validation is not None:
        if world.speaks:
            # Killed while it validates, the run has this epoch's training.
            keeper.save(training.state())
            training.profile.mark("checkpoint")
        classes = len(training.data.classes)
        judged = evaluate(
            training.evaluated,
            training.data.validation,
            classes,
            config.trainer,
            world,
            received,
            offsets=training.offsets,
        )
        record["validation"] = judged.summary()
        training.profile.mark("validation")
        figure = record["validation"][config.trainer.monitor]
    training.learning_rate.after_epoch(figure)
    # Of equals the later one, which has learned longer.
    is_best = figure >= training.best
    training.epoch += 1
    if is_best:
        training.best, training.best_epoch = figure, training.epoch
    training.step = 0
    training.finished = training.finished.plus(done)
    training.so_far, training.losses = Totals(), []
    training.history.append(record)
    if world.speaks:
        keeper.save(training.state(), training.trained_model() if is_best else None)
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
