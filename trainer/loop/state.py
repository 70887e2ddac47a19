"""The training state that a checkpoint holds, and the objects that a training needs besides."""

from __future__ import annotations

import inspect
import math
import operator
import time
from dataclasses import astuple, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.sampler import SAMPLER_VERSION
from trainer.checkpoint.compat import check_initial_weights
from trainer.checkpoint.trained_model import TrainedModel
from trainer.config.schema import Config
from trainer.data.training_data import TrainingData
from trainer.evaluate.logit_adjustment import PosthocCalibration, log_class_weights, training_logit_bias
from trainer.models.compile import compile_model
from trainer.models.factory import apply_training_options, check_resolutions, make_model
from trainer.models.precision import make_grad_scaler, memory_format
from trainer.optim.distillation import DistillationTeacher
from trainer.optim.ema import ModelEma
from trainer.optim.losses import class_weights, log_priors
from trainer.optim.optimizers import make_optimizer
from trainer.optim.schedule_free import make_average
from trainer.optim.schedules import LRSchedule
from trainer.runtime.distributed import World
from trainer.runtime.profiler import Profile, TimeProfile
from trainer.runtime.seeding import seed_weights

# torch 2.15 deprecates broadcast_buffers, torch 2.11 does not know forward_sync_buffers.
_DDP_ARGUMENTS = inspect.signature(DistributedDataParallel).parameters
_NO_BUFFER_SYNC: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in _DDP_ARGUMENTS else "broadcast_buffers": False
}
# Fields of TrainState that a checkpoint holds unchanged.
_PLAIN = ("epoch", "step", "updates", "rank_losses", "class_counts", "history", "best", "best_epoch", "lr")


@dataclass
class Totals:
    """Sums over the training steps of one epoch or all: loss (over samples), samples, seconds, seconds of data wait."""

    loss: float = 0.0
    samples: int = 0
    seconds: float = 0.0
    wait_seconds: float = 0.0

    def __add__(self, other: Totals) -> Totals:
        return Totals(*map(operator.add, astuple(self), astuple(other)))

    @property
    def images_per_second(self) -> float:
        return self.samples / self.seconds if self.seconds else 0.0

    @property
    def wait_fraction(self) -> float:
        return self.wait_seconds / self.seconds if self.seconds else 0.0


@dataclass
class TrainState:
    """The contents of a checkpoint: weights, optimizer, schedule, moving average, loss scale and position."""

    model: nn.Module
    """The network itself, without wrappers."""
    optimizer: torch.optim.Optimizer
    learning_rate: LRSchedule
    ema: ModelEma | None
    scaler: torch.amp.GradScaler
    class_counts: torch.Tensor
    """Sum of `Training.class_counts` over the ranks, on the CPU: the current epoch up to the last checkpoint."""
    epoch: int = 0
    step: int = 0
    """Steps of epoch `epoch` that are done; both count from 0."""
    updates: int = 0
    """Optimizer steps that are done."""
    epoch_totals: Totals = field(default_factory=Totals)
    """Of the current epoch, up to the last checkpoint."""
    rank_losses: list[float] = field(default_factory=list)
    """The sum of losses of each rank, so that a resumed epoch continues it bit for bit."""
    total: Totals = field(default_factory=Totals)
    """Of the completed epochs; its loss is not used."""
    history: list[dict[str, Any]] = field(default_factory=list)
    best: float = -math.inf
    """Best validation metric so far; a loss is negated, so that higher is better."""
    best_epoch: int = 0
    """The epoch (from 1) of `best`."""
    lr: float = 0.0
    """Learning rate of the last update."""
    earlier_seconds: float = 0.0
    """Seconds of the earlier processes of the run."""
    started: float = field(default_factory=time.perf_counter)

    @property
    def elapsed(self) -> float:
        """Seconds of the run, over all its processes."""
        return self.earlier_seconds + time.perf_counter() - self.started

    @property
    def eval_model(self) -> nn.Module:
        """The model that is evaluated and saved as the best: the moving average if there is one."""
        return self.ema.module if self.ema is not None else self.model

    @property
    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema is not None else None,
            "optimizer": self.optimizer.state_dict(),
            "learning_rate": self.learning_rate.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch_totals": vars(self.epoch_totals).copy(),
            "total": vars(self.total).copy(),
            "elapsed": self.elapsed,
            **{name: getattr(self, name) for name in _PLAIN},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the values of `state_dict`."""
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"] or state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.learning_rate.load_state_dict(state["learning_rate"])
        if scaler := state.get("scaler"):  # empty in other precisions than fp16
            self.scaler.load_state_dict(scaler)
        self.epoch_totals, self.total = Totals(**state["epoch_totals"]), Totals(**state["total"])
        for name in _PLAIN:
            setattr(self, name, state[name])
        self.earlier_seconds, self.started = state["elapsed"], time.perf_counter()


@dataclass
class Training:
    """A training state with the objects that change it: data, process group, loss, profiler."""

    state: TrainState
    config: Config
    world: World
    data: TrainingData
    forward: nn.Module
    """The network that training calls: compiled, and wrapped in DistributedDataParallel with several ranks."""
    class_weights: torch.Tensor
    """float32 [C]."""
    logit_adjustment: torch.Tensor
    """float32 [C], added to the logits in training (`loss.logit_adjustment`)."""
    decision_offsets: torch.Tensor = field(init=False)
    """`offsets` on the device, subtracted from the logits to count predictions."""
    log_class_weights: NDArray[np.float32]
    """[C], log of the class weights that `posthoc.tau` undoes."""
    logit_bias: NDArray[np.float32]
    """[C], log of the weights that sampling and loss give the classes."""
    teacher: DistillationTeacher | None
    class_counts: torch.Tensor
    """int64 [3, C], counts of this rank's predictions for images that are not mixed, of the current epoch."""
    profile: Profile
    posthoc: PosthocCalibration | None = None
    """Fitted to the best weights before the test; None without a validation split."""
    stopped_by: str | None = None
    """The setting of `trainer` that ended the training: epochs, minutes or patience; None before its end."""

    def __post_init__(self) -> None:
        self.decision_offsets = torch.from_numpy(self.offsets).to(self.world.device)

    def metrics(self) -> list[float]:
        """Return `trainer.monitor` of the validated epochs; a loss is negated, so that higher is better."""
        name = self.config.trainer.monitor
        values = [record["validation"][name] for record in self.state.history if "validation" in record]
        if name == "loss":
            return [-math.inf if math.isnan(value) else -value for value in values]
        return values

    def last_metric(self) -> float:
        """Return the metric of the last epoch; its number without a validation split, so that the last is the best."""
        return self.metrics()[-1] if "validation" in self.state.history[-1] else float(len(self.state.history))

    def find_end(self) -> bool:
        """Determine `stopped_by`, the same on all ranks; returns whether the training has ended."""
        state, settings, metrics = self.state, self.config.trainer, self.metrics()
        if state.step:  # an epoch that the clock ended is not yet validated
            return False
        if settings.minutes is None and state.epoch >= settings.epochs:
            self.stopped_by = "epochs"
        elif settings.patience and metrics and len(metrics) > metrics.index(max(metrics)) + settings.patience:
            self.stopped_by = "patience"
        elif (
            settings.minutes and state.epoch and self.time_fraction(self.world.broadcast_object(self.milliseconds)) >= 1
        ):
            self.stopped_by = "minutes"
        return self.stopped_by is not None

    @property
    def milliseconds(self) -> int:
        """Duration of the run on rank 0, whose clock counts; 0 on other ranks and without `trainer.minutes`."""
        has_clock = self.config.trainer.minutes is not None and self.world.is_main_process
        return int(self.state.elapsed * 1000) if has_clock else 0

    def time_fraction(self, milliseconds: int) -> float:
        """Return a time as a fraction of `trainer.minutes`; 0 if it is not set."""
        minutes = self.config.trainer.minutes
        return 0.0 if minutes is None else milliseconds / (minutes * 60_000)

    @property
    def tau(self) -> float:
        """The tau of validation; `auto` is tuned after the last epoch, and 0 before."""
        return 0.0 if self.config.posthoc.tau == "auto" else self.config.posthoc.tau

    @property
    def offsets(self) -> NDArray[np.float32]:
        """[C], subtracted from the logits in validation."""
        return np.float32(self.tau) * self.log_class_weights

    def checkpoint(self) -> dict[str, Any]:
        """Return the contents of `last.pt`."""
        train = self.data.train
        return {
            **self.compatibility_fields(),
            "window": train.window,
            "window_of_shards": train.window_of_shards,
            "steps": train.steps(self.state.epoch),
            "sampler_version": SAMPLER_VERSION,
            "threads": torch.get_num_threads(),
            **self.state.state_dict(),
        }

    def trained_model(self) -> TrainedModel:
        """Return the contents of `best.pt`."""
        spec = self.data.spec
        return TrainedModel(
            weights=self.state.eval_model.state_dict(),
            config=self.config,
            classes=self.data.classes,
            data_identity=self.data.identity,
            image_shape=spec.image_shape,
            mean=spec.mean,
            std=spec.std,
            adapter_state=self.data.adapter.state_dict(),
            epoch=self.state.epoch,
            tau=self.tau,
            offsets=self.offsets,
            logit_bias=self.logit_bias,
        )

    def compatibility_fields(self) -> dict[str, Any]:
        """Return what a checkpoint and the run that resumes it must agree on."""
        return {
            "classes": list(self.data.classes),
            "data": self.data.identity,
            "recipe": self.config.recipe(),
        }


def make_training(config: Config, data: TrainingData, world: World, resuming: bool = False) -> Training:
    """Build model, optimizer, schedule and loss. The initial weights depend on the seed only.

    Args:
        config: The settings.
        data: The data of the run.
        world: The process group.
        resuming: Whether a checkpoint will be loaded; pretrained weights are then not loaded.

    Raises:
        UserError: The settings do not fit each other or the data.
    """
    seed_weights(config.seed)
    settings = config.model.without_weights() if resuming else config.model
    channels = data.spec.image_shape[2]
    model = make_model(settings, channels, len(data.classes), data.classes, data.spec.resolution)
    if not resuming:
        check_initial_weights(config, data.identity, data.has_val_split)
    check_resolutions(model, settings.name, channels, dict(config.data.resolution_by_epoch()).values())
    model = apply_training_options(model, settings, world.device, world.size)
    model.to(world.device).to(memory_format=memory_format(config.trainer))
    forward = compile_model(model, config.trainer, world.device, len(data.train.stages))
    if world.size > 1:
        gpu = [world.device.index] if world.device.type == "cuda" else None
        forward = DistributedDataParallel(
            forward,
            device_ids=gpu,
            # A static graph must reduce gradients in its first backward pass, which accumulation skips.
            static_graph=config.optim.grad_accumulation == 1,
            gradient_as_bucket_view=True,
            # Without `model.sync_batchnorm`, batch norm uses the batch of its rank. Rank 0's running statistics are
            # broadcast at the end of an epoch.
            **_NO_BUFFER_SYNC,
        )
    optimizer = make_optimizer(model, config.optim)
    updates = [-(-data.train.steps(epoch) // config.optim.grad_accumulation) for epoch in range(config.trainer.epochs)]
    logit_bias = training_logit_bias(data.counts, config.loss, data.drawn)
    profile = Profile()
    if config.trainer.profile:
        profile = TimeProfile(world.device)
        data.train.timed = profile.timed
    state = TrainState(
        model=model,
        optimizer=optimizer,
        learning_rate=LRSchedule(optimizer, config, updates),
        ema=make_average(model, optimizer, config.trainer.ema_decay),
        scaler=make_grad_scaler(config.trainer, world.device),
        class_counts=torch.zeros(3, len(data.classes), dtype=torch.int64),
    )
    return Training(
        state=state,
        config=config,
        world=world,
        data=data,
        forward=forward,
        class_weights=class_weights(data.drawn, config.loss).to(world.device),
        logit_adjustment=(config.loss.logit_adjustment * log_priors(data.drawn)).to(world.device),
        log_class_weights=log_class_weights(data.counts, config.loss, data.drawn),
        logit_bias=logit_bias,
        teacher=DistillationTeacher(config, data.classes, data.statistics, logit_bias, world.device)
        if config.distillation.teacher
        else None,
        class_counts=state.class_counts.to(world.device, copy=True),
        profile=profile,
    )
