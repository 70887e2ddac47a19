"""A training on a simulated GPU whose loader yields empty batches, and checks each step."""

from __future__ import annotations

from collections.abc import Generator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from conftest import ROOT

from pipeline.loader import Batch
from pipeline.transforms.spec import TransformSpec
from support.simulated_gpu import GPU, SimulatedGpu
from trainer.config.load import load
from trainer.data.resolution_schedule import ResolutionStage, resolution_stages
from trainer.loop import engine
from trainer.loop.state import Training, make_training
from trainer.runtime.distributed import World
from trainer.runtime.loggers.base import MetricLogger

CLASSES = ("a", "b", "c")
STEPS = 3
BASE = (
    "model.name=three_block_cnn",
    "data.resolution=16",
    "mixup.prob=1",
    "loss.label_smoothing=0.1",
    "loss.class_weights=minmax",
    "loss.logit_adjustment=1",
    "optim.max_grad_norm=1",
    "trainer.ema_decay=0.9",
    "trainer.precision=bf16",
)


def training_on(gpu: SimulatedGpu, *overrides: str, channels: int = 1) -> Training:
    """A training on the simulated GPU, whose loader checks each of its steps."""
    config = load(ROOT / "configs" / "quickstart.yaml", [*BASE, *overrides, "device=cuda", "loader.batch_size=6"])
    stages, side = resolution_stages(config), config.data.final_resolution

    def stage_at(epoch: int) -> ResolutionStage:
        return [stage for stage in stages if stage.first <= epoch][-1]

    def batches(epoch: int = 0, first_step: int = 0) -> Generator[Batch, None, None]:
        side = stage_at(epoch).resolution
        for step in range(first_step, STEPS):
            images = torch.empty(6, channels, side, side, device=GPU)
            labels, rows = (torch.zeros(6, dtype=torch.int64, device=GPU) for _ in range(2))
            with gpu.step():
                yield Batch(images, labels, rows, step, 6)

    train = SimpleNamespace(
        stages=stages,
        steps=lambda epoch: STEPS,
        stage_at=stage_at,
        batches=batches,
        samples=np.arange(6 * STEPS),
        timed=None,
        window=None,
    )
    spec = TransformSpec((side, side, channels), False, side, mean=(0.5,) * channels, std=(0.5,) * channels)
    counts = np.array([5, 0, 3])
    statistics = {stage.input_size: (spec.mean, spec.std) for stage in stages}
    data = SimpleNamespace(
        train=train,
        spec=spec,
        statistics=statistics,
        counts=counts,
        drawn=counts,
        classes=CLASSES,
        identity="",
        has_val_split=False,
    )
    return make_training(config, data, World(0, 1, GPU))


def train_epoch(training: Training, *loggers: MetricLogger, checkpointer: Any = None) -> None:
    due = checkpointer or SimpleNamespace(is_due=lambda step: False)
    services = SimpleNamespace(checkpointer=due, signals_received=[], loggers=loggers, trace=None)
    engine.train_epoch(training, services)
