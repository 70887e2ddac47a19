"""What a run changes as it learns: the model and what trains it, where it stands, and how that is kept."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from trainer.arithmetic import memory_format
from trainer.average import Average
from trainer.compiled import compiled
from trainer.data import TrainingData
from trainer.decision import Decision, log_weights
from trainer.distributed import World
from trainer.loss import class_weights, log_priors
from trainer.model import check_sides, make_model
from trainer.optimizer import LearningRate, make_optimizer
from trainer.randomness import seed_weights
from trainer.runtime.profiler import NoProfile, Profile, TimeProfile, Trace
from trainer.settings import Config
from trainer.teacher import Teacher, open_teacher
from trainer.trained_model import TrainedModel


@dataclass
class Totals:
    """Sums over the training steps of an epoch (or of all epochs): loss over samples, samples, seconds."""

    loss: float = 0.0
    samples: int = 0
    seconds: float = 0.0
    wait_seconds: float = 0.0

    def plus(self, other: Totals) -> Totals:
        return Totals(
            self.loss + other.loss,
            self.samples + other.samples,
            self.seconds + other.seconds,
            self.wait_seconds + other.wait_seconds,
        )

    @property
    def images_per_second(self) -> float:
        return self.samples / self.seconds if self.seconds else 0.0

    @property
    def wait_share(self) -> float:
        return self.wait_seconds / self.seconds if self.seconds else 0.0


@dataclass
class Training:
    """Everything that a run changes as it learns, and what it needs to do so."""

    config: Config
    world: World
    data: TrainingData
    model: nn.Module
    """The network itself, as it is saved."""
    forward: nn.Module
    """What is called: the network, compiled and wrapped for several ranks if need be."""
    average: Average | None
    optimizer: torch.optim.Optimizer
    learning_rate: LearningRate
    class_weights: torch.Tensor
    logit_shift: torch.Tensor
    """float32 [C], what is added to the logits in training (`loss.logit_adjustment`)."""
    log_weights: NDArray[np.float32]
    """[C], of the weights that `posthoc.tau` undoes."""
    teacher: Teacher | None
    profile: Profile
    trace: Trace
    epoch: int = 0
    step: int = 0
    updates: int = 0
    so_far: Totals = field(default_factory=Totals)
    """Of the current epoch, before a stop."""
    losses: list[float] = field(default_factory=list)
    """What each rank added to the loss of `so_far`, so that each of them adds up in one sequence across a stop."""
    finished: Totals = field(default_factory=Totals)
    """Of the epochs that are over; its loss means nothing."""
    history: list[dict[str, Any]] = field(default_factory=list)
    best: float = -1.0
    """The best validation figure so far, and the epoch (from 1) that reached it."""
    best_epoch: int = 0
    lr: float = 0.0
    """Learning rate of the last update."""
    decision: Decision | None = None
    """By which the best weights are tested; None before the test and without a validation part."""
    skipped: set[tuple[int, int]] = field(default_factory=set)
    """(epoch, first step) of the updates that are left out because a batch's loss or gradient is not finite."""
    look_until: tuple[int, int] | None = None
    """(epoch, step) up to which every batch is looked at before its update, to find such a batch."""
    earlier_seconds: float = 0.0
    """Of the processes that this one continues."""
    started: float = field(default_factory=time.perf_counter)

    @property
    def elapsed(self) -> float:
        """Seconds since the run began, without the time it was stopped."""
        return self.earlier_seconds + time.perf_counter() - self.started

    @property
    def evaluated(self) -> nn.Module:
        """The weights that are judged and kept: the moving average where there is one."""
        return self.average.module if self.average is not None else self.model

    @property
    def tau(self) -> float:
        """That epochs are judged by; one that is tuned is so at the end."""
        return 0.0 if self.config.posthoc.tau == "auto" else self.config.posthoc.tau

    @property
    def offsets(self) -> NDArray[np.float32]:
        """[C], taken from the logits to judge an epoch."""
        return np.float32(self.tau) * self.log_weights

    def state(self) -> dict[str, Any]:
        """Everything that a later process needs to go on exactly here; tensors and plain values only."""
        return {
            **self.identity(),
            "window": self.data.train.window,
            "model": self.model.state_dict(),
            "average": self.average.module.state_dict() if self.average is not None else None,
            "optimizer": self.optimizer.state_dict(),
            "learning_rate": self.learning_rate.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "steps": self.data.train.steps(self.epoch),
            "updates": self.updates,
            "so_far": vars(self.so_far).copy(),
            "losses": self.losses,
            "skipped": sorted(self.skipped),
            "finished": vars(self.finished).copy(),
            "history": self.history,
            "best": self.best,
            "best_epoch": self.best_epoch,
            "lr": self.lr,
            "elapsed": self.elapsed,
        }

    def trained_model(self) -> TrainedModel:
        """The weights that are judged, with what it takes to use them."""
        spec = self.data.spec
        return TrainedModel(
            weights=self.evaluated.state_dict(),
            config=self.config,
            classes=self.data.classes,
            data_digest=self.data.digest,
            image_shape=spec.image_shape,
            mean=spec.mean,
            std=spec.std,
            adapter_state=self.data.adapter.state_dict(),
            epoch=self.epoch,
            tau=self.tau,
            offsets=self.offsets,
        )

    def identity(self) -> dict[str, Any]:
        """What a checkpoint is compared by."""
        return {
            "classes": list(self.data.classes),
            "data": self.data.digest,
            "recipe": self.config.recipe(),
        }

    @property
    def loss_here(self) -> float:
        """What this rank goes on adding the epoch's losses to."""
        if len(self.losses) == self.world.size:
            return self.losses[self.world.rank]
        return self.so_far.loss if self.world.speaks else 0.0

    def restore(self, state: dict[str, Any]) -> None:
        # The order that was begun with goes on, whatever the memory of this machine would allow.
        self.data.train.window = state["window"]
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.average.module.load_state_dict(state["average"] or state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.learning_rate.load_state_dict(state["learning_rate"])
        self.epoch, self.step, self.updates = state["epoch"], state["step"], state["updates"]
        self.so_far, self.finished = Totals(**state["so_far"]), Totals(**state["finished"])
        self.losses, self.skipped = state["losses"], {tuple(place) for place in state["skipped"]}
        self.history, self.best, self.best_epoch = state["history"], state["best"], state["best_epoch"]
        self.lr, self.earlier_seconds = state["lr"], state["elapsed"]
        self.started = time.perf_counter()


def make_training(config: Config, data: TrainingData, world: World, resuming: bool = False) -> Training:
    """Build the model and what trains it, with first weights that depend on the seed alone.

    resuming: the weights will be those of a checkpoint, so published or given ones need not be at hand.
    """
    seed_weights(config.seed)
    settings = (
        config.model.model_copy(update={"pretrained": False, "init_checkpoint": None}) if resuming else config.model
    )
    channels = data.spec.image_shape[2]
    model = make_model(settings, channels, len(data.classes), data.classes)
    check_sides(model, settings.name, channels, {side for _, side in config.data.resolution_by_epoch()})
    model.to(world.device, memory_format=memory_format(config.trainer))
    forward = compiled(model, config.trainer, world.device, len(data.train.phases))
    if world.size > 1:
        gpu = [world.device.index] if world.device.type == "cuda" else None
        forward = DistributedDataParallel(
            forward,
            device_ids=gpu,
            # A static graph has to exchange gradients in its first backward pass, which accumulation puts off.
            static_graph=config.optim.grad_accumulation == 1,
            gradient_as_bucket_view=True,
            # Batch norm trains on each rank's own batch; rank 0's running statistics are shared when they are used.
            forward_sync_buffers=False,
        )
    optimizer = make_optimizer(model, config.optim)
    updates = [-(-data.train.steps(epoch) // config.optim.grad_accumulation) for epoch in range(config.trainer.epochs)]
    profile: Profile = NoProfile()
    if config.trainer.profile:
        profile = TimeProfile(world.device)
        data.train.timed = profile.timed
    return Training(
        config=config,
        world=world,
        data=data,
        model=model,
        forward=forward,
        average=Average(model, config.trainer.ema_decay) if config.trainer.ema_decay else None,
        optimizer=optimizer,
        learning_rate=LearningRate(optimizer, config, updates),
        class_weights=class_weights(data.counts, config.loss).to(world.device),
        logit_shift=(config.loss.logit_adjustment * log_priors(data.counts)).to(world.device),
        log_weights=log_weights(data.counts, config.loss),
        teacher=open_teacher(config, data.classes, data.spec.mean, data.spec.std, world.device),
        profile=profile,
        trace=Trace(config.trainer.traced_steps if world.speaks else None, world.device),
    )
