"""Throughput of the training loop, and of the same loop over batches that are already on the device."""

from __future__ import annotations

import contextlib
import io
import tempfile
import time
from collections.abc import Generator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.harness import Spread
from benchmarks.common.training import FixedStepLoader
from pipeline.loader import Batch
from shards.errors import UserError
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.checkpoint.run_dir import RunDirectory
from trainer.config.load import validate
from trainer.config.schema import CheckpointConfig
from trainer.data.resolution_schedule import TrainingLoader
from trainer.data.training_data import TrainingData, open_data
from trainer.loop import engine
from trainer.loop.state import Totals, Training, make_training
from trainer.models.auto import resolve_auto
from trainer.models.compile import compile_mode
from trainer.runtime.distributed import World, init_distributed
from trainer.runtime.env_info import collect_env_info

_RESIDENT_BATCHES = 4  # batches of the synthetic loop
_WARM_UP_ROUNDS = 1
_MIN_STEPS = 6  # per run


@dataclass(frozen=True)
class LoopCase:
    """What is measured. `batch_size` is global: the sum over all ranks."""

    resolution: int
    model: str
    batch_size: int
    precision: str
    compile: str


class ResidentLoader(TrainingLoader):
    """A loader with the same numbers of steps and images, from a few batches that stay on the device.

    Args:
        loader: Source of the batches.
    """

    def __init__(self, loader: TrainingLoader) -> None:
        self._loader = loader
        self.stages, self.window, self.window_of_shards = loader.stages, loader.window, loader.window_of_shards
        self.timed, self.samples = loader.timed, loader.samples
        with contextlib.closing(loader.batches()) as batches:
            pairs = zip(range(_RESIDENT_BATCHES), batches, strict=False)
            self._batches = [replace(batch, images=batch.images.clone()) for _, batch in pairs]

    def steps(self, epoch: int) -> int:
        return self._loader.steps(epoch)

    def batches(self, epoch: int = 0, first_step: int = 0) -> Generator[Batch, None, None]:
        for step in range(first_step, self.steps(epoch)):
            yield replace(self._batches[step % len(self._batches)], step=step)


def make_recipe(shards: Path, case: LoopCase, fraction: float) -> dict[str, Any]:
    """Return the settings of a case, as nested values."""
    return {
        "data": {"shards": str(shards), "resolution": case.resolution, "train_fraction": fraction, "val_fraction": 0},
        "loader": {"batch_size": case.batch_size},
        "model": {"name": case.model},
        "optim": {"name": "lion", "lr": 1e-4, "max_grad_norm": 1.0},
        "schedule": {"name": "constant"},
        "trainer": {"epochs": 1, "precision": case.precision, "compile": case.compile, "ema_decay": 0.999},
    }


def measure(
    shards: Path, case: LoopCase, device: str, fraction: float, runs: int, seconds: float
) -> dict[str, Any] | None:
    """Measure both loops in turn.

    Args:
        shards: Packed data set.
        case: What to measure.
        device: Setting `device` of the training.
        fraction: Fraction of the training images, in (0, 1].
        runs: Measured runs of each loop.
        seconds: Minimum time of a run.

    Returns:
        The measurements on rank 0, None on other ranks.

    Raises:
        UserError: The training split has fewer than two batches.
    """
    with init_distributed(device) as world:
        return _measure(world, shards, case, fraction, runs, seconds)


def _measure(
    world: World, shards: Path, case: LoopCase, fraction: float, runs: int, seconds: float
) -> dict[str, Any] | None:
    settings = resolve_auto(validate(make_recipe(shards, case, fraction), "the benchmark"), world.device)
    data = open_data(settings, world)
    if data.train.steps(0) < 2:
        raise UserError(
            found=f"{len(data.train.samples)} training images at batch size {case.batch_size}",
            expected="at least two batches",
            hint="choose a smaller batch size, or --shards DIR with more images",
        )
    training = make_training(settings, data, world)

    def loaders(steps: int) -> dict[str, TrainingData]:
        # The samples, and so the size of a batch, stay the same: another size would be compiled again.
        whole = FixedStepLoader(data.train, steps)
        return {"whole": replace(data, train=whole), "synthetic": replace(data, train=ResidentLoader(whole))}

    start = time.perf_counter()
    _run_epoch(training, loaders(2)["synthetic"])  # includes compilation
    first_steps_seconds = time.perf_counter() - start
    trial = _run_epoch(training, loaders(_MIN_STEPS)["synthetic"])
    steps = max(_MIN_STEPS, round(seconds * trial.images_per_second / case.batch_size))  # about this time
    steps = world.broadcast_object(steps)
    loops: dict[str, list[Totals]] = {"whole": [], "synthetic": []}
    pair = list(loaders(steps).items())
    for round_number in range(_WARM_UP_ROUNDS + runs):
        # The order alternates, so that drift of the machine affects both alike.
        for name, source in pair[:: 1 if round_number % 2 else -1]:
            totals = _run_epoch(training, source)
            if round_number >= _WARM_UP_ROUNDS:
                loops[name].append(totals)
    if not world.is_main_process:
        return None
    ratios = [
        complete.images_per_second / synthetic.images_per_second
        for complete, synthetic in zip(loops["whole"], loops["synthetic"], strict=True)
    ]
    on_gpu = world.device.type == "cuda"
    return {
        **asdict(case),
        "precision": settings.trainer.precision,
        "compile": compile_mode(settings.trainer, world.device),
        "ranks": world.size,
        "whole_images_per_second": Spread.of([loop.images_per_second for loop in loops["whole"]]).to_json(),
        "synthetic_images_per_second": Spread.of([loop.images_per_second for loop in loops["synthetic"]]).to_json(),
        "whole_of_synthetic": Spread.of(ratios).to_json(),
        "data_wait_share": Spread.of([loop.wait_fraction for loop in loops["whole"]]).to_json(),
        "step_milliseconds": Spread.of([1000 * loop.seconds / steps for loop in loops["whole"]]).to_json(),
        "first_steps_seconds": first_steps_seconds,
        "steps_a_run": steps,
        "peak_device_memory_bytes": torch.cuda.max_memory_allocated(world.device) if on_gpu else None,
        "loader_backend": data.backend,
        "environment": collect_env_info(world.device),
    }


def _run_epoch(training: Training, data: TrainingData) -> Totals:
    """Run one epoch of the trainer's loop over the data."""
    training.data, state = data, training.state
    state.step, state.epoch_totals, state.rank_losses = 0, Totals(), []
    never = CheckpointConfig(every_minutes=None)
    with contextlib.ExitStack() as stack:
        directory = RunDirectory(Path(stack.enter_context(tempfile.TemporaryDirectory())))
        checkpointer = stack.enter_context(Checkpointer(directory, never, step=0, last_is_intact=False))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        engine.train_epoch(training, engine.RunServices(directory, checkpointer, [], []))
    return state.epoch_totals
