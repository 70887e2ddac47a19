"""The whole training loop, and the same loop over batches that lie on the device already."""

from __future__ import annotations

import contextlib
import io
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.harness import Spread
from pipeline.loader import Batch
from shards.errors import UserError
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.checkpoint.run_dir import RunDirectory
from trainer.config.load import validate
from trainer.config.schema import CheckpointConfig
from trainer.data.resolution_schedule import TrainingLoader
from trainer.data.training_data import open_data
from trainer.loop import engine
from trainer.loop.state import Totals, Training, make_training
from trainer.models.compile import compile_mode
from trainer.models.precision import resolve_precision
from trainer.runtime.distributed import World, init_distributed
from trainer.runtime.env_info import collect_env_info

_RESIDENT = 4  # batches that the synthetic loop goes round
_WARM_UP = 1  # rounds that are not counted
_FEWEST_STEPS = 6  # of a run


@dataclass(frozen=True)
class Setting:
    """What is measured. batch_size: of all ranks together."""

    resolution: int
    model: str
    batch_size: int
    precision: str
    compile: str


class ResidentLoader:
    """Stands in for a `TrainingLoader`: as many steps of as many images, out of a few batches kept on the device.

    steps: at most so many.
    """

    def __init__(self, loader: TrainingLoader, steps: int | None = None) -> None:
        self._loader = loader
        self._most = steps
        self.stages = loader.stages
        with contextlib.closing(loader.batches()) as batches:
            pairs = zip(range(_RESIDENT), batches, strict=False)
            self._kept = [replace(batch, images=batch.images.clone()) for _, batch in pairs]

    def steps(self, epoch: int) -> int:
        steps = self._loader.steps(epoch)
        return steps if self._most is None else min(steps, self._most)

    def steps_ahead(self, epoch: int, epochs: int) -> float:
        return self._loader.steps_ahead(epoch, epochs)

    def batches(self, epoch: int = 0, first_step: int = 0) -> Iterator[Batch]:
        for step in range(first_step, self.steps(epoch)):
            yield replace(self._kept[step % len(self._kept)], step=step)


def recipe(shards: Path, setting: Setting, subset: float) -> dict[str, Any]:
    return {
        "data": {"shards": str(shards), "resolution": setting.resolution, "train_fraction": subset, "val_fraction": 0},
        "loader": {"batch_size": setting.batch_size},
        "model": {"name": setting.model},
        "optim": {"name": "lion", "lr": 1e-4, "max_grad_norm": 1.0},
        "schedule": {"name": "constant"},
        "trainer": {"epochs": 1, "precision": setting.precision, "compile": setting.compile, "ema_decay": 0.999},
    }


def measure(
    shards: Path, setting: Setting, device: str, subset: float, runs: int, seconds: float
) -> dict[str, Any] | None:
    """Both loops in turn, `runs` times each, for at least `seconds` a time; the result on rank 0, None elsewhere."""
    with init_distributed(device) as world:
        return measure_in(world, shards, setting, subset, runs, seconds)


def measure_in(
    world: World, shards: Path, setting: Setting, subset: float, runs: int, seconds: float
) -> dict[str, Any] | None:
    settings = resolve_precision(validate(recipe(shards, setting, subset), "the benchmark"), world.device)
    data = open_data(settings, world)
    if data.train.steps(0) < 2:
        raise UserError(
            found=f"{len(data.train.samples)} training images in batches of {setting.batch_size}",
            expected="at least two batches",
            hint="a smaller batch, or --shards DIR with more images",
        )
    training = make_training(settings, data, world)
    start = time.perf_counter()
    _epoch(training, replace(data, train=ResidentLoader(data.train, steps=2)))  # compiles, if that is asked for
    first = time.perf_counter() - start
    trial = _epoch(training, replace(data, train=ResidentLoader(data.train, steps=_FEWEST_STEPS)))
    # As many images as take the time asked for, of a large set only a part.
    images = max(seconds * trial.images_per_second, _FEWEST_STEPS * setting.batch_size)
    share = world.broadcast_object(min(1.0, images / len(data.train.samples)))
    passes = world.broadcast_object(max(1, round(images / len(data.train.samples))))
    section = settings.data.model_copy(update={"train_fraction": subset * share})
    data = open_data(settings.model_copy(update={"data": section}), world)
    resident = replace(data, train=ResidentLoader(data.train))
    loops: dict[str, list[Totals]] = {"whole": [], "synthetic": []}
    pair = [("whole", data), ("synthetic", resident)]
    for number in range(_WARM_UP + runs):
        # In turn first and second, so that a machine that speeds up or slows down favours neither.
        for name, source in pair[:: 1 if number % 2 else -1]:
            together = Totals()
            for _ in range(passes):
                together = together.plus(_epoch(training, source))
            if number >= _WARM_UP:
                loops[name].append(together)
    if not world.is_main_process:
        return None
    steps = passes * data.train.steps(0)
    ratios = [
        whole.images_per_second / synthetic.images_per_second
        for whole, synthetic in zip(loops["whole"], loops["synthetic"], strict=True)
    ]
    on_gpu = world.device.type == "cuda"
    return {
        **asdict(setting),
        "precision": settings.trainer.precision,
        "compile": compile_mode(settings.trainer, world.device),
        "ranks": world.size,
        "whole_images_per_second": Spread.of([loop.images_per_second for loop in loops["whole"]]).to_json(),
        "synthetic_images_per_second": Spread.of([loop.images_per_second for loop in loops["synthetic"]]).to_json(),
        "whole_of_synthetic": Spread.of(ratios).to_json(),
        "data_wait_share": Spread.of([loop.wait_fraction for loop in loops["whole"]]).to_json(),
        "step_milliseconds": Spread.of([1000 * loop.seconds / steps for loop in loops["whole"]]).to_json(),
        "first_steps_seconds": first,
        "steps_a_run": steps,
        "peak_device_memory_bytes": torch.cuda.max_memory_allocated(world.device) if on_gpu else None,
        "loader_backend": data.backend,
        "environment": collect_env_info(world.device),
    }


def _epoch(training: Training, data: Any) -> Totals:
    """One pass of the trainer's own loop over the data."""
    training.data, state = data, training.state
    state.step, state.epoch_totals, state.rank_losses = 0, Totals(), []
    never = CheckpointConfig(every_minutes=None)
    with contextlib.ExitStack() as stack:
        directory = RunDirectory(Path(stack.enter_context(tempfile.TemporaryDirectory())))
        checkpointer = stack.enter_context(Checkpointer(directory, never, step=0, keeps_last=False))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        engine.train_epoch(training, engine.Services(directory, checkpointer, [], []))
    return state.epoch_totals
