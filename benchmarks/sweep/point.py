"""One point of the resolution study: everything about a resolution that costs or counts, in a process of its own.

Two trainings make a point. The first takes the recipe's epochs. The second takes the same seconds at every resolution:
from the first one's throughput (images/s, median over its epochs but the first) follows how many updates fit, and
that many are planned before it begins, so that its learning-rate schedule ends at its trough. Epochs then are no
longer passes over the data but as many periods of equal length as the recipe has epochs; every period goes on where
the one before stopped in the endless sequence of passes, so that warm-up, restarts and validation come at the same
shares of the training. Only training counts as time: not building, compiling, validation and test. The seconds that it
took in the end are kept beside those that were planned.

Each training chooses its best epoch on the validation part and looks at the test part once, at its end.
"""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.harness import Spread, in_process
from benchmarks.sweep.plan import Point, Study
from pipeline.loader import Batch
from shards import UserError, open_split
from shards.errors import first_line
from trainer.checkpoint.run_dir import RunDirectory
from trainer.config.schema import Config
from trainer.data.resolution_schedule import TrainingLoader
from trainer.data.training_data import TrainingData, open_data
from trainer.loop import engine
from trainer.loop.state import Training, make_training
from trainer.models.compile import compile_mode
from trainer.models.precision import resolve_precision
from trainer.runtime.distributed import World, init_distributed
from trainer.runtime.env_info import collect_env_info

LOADER_RUNS = 5
LOADER_IMAGES = 32_768  # of one run, in as many passes over the training part as that takes
SMALLEST_BATCH = 8
_MEMORY_WORDS = ("out of memory", "can't allocate memory", "failed to allocate", "allocation failed")


class Stretched:
    """Stands in for a `TrainingLoader`: epochs of so many steps, each going on in the passes where the last stopped."""

    def __init__(self, loader: TrainingLoader, steps: int) -> None:
        self._loader = loader
        self._steps = steps
        self.stages, self.stage_at = loader.stages, loader.stage_at
        self.window, self.samples = loader.window, loader.samples

    def steps(self, epoch: int) -> int:
        return self._steps

    def steps_ahead(self, epoch: int, epochs: int) -> float:
        return float(self._steps * (epochs - epoch - 1))

    def batches(self, epoch: int = 0, first_step: int = 0) -> Iterator[Batch]:
        in_pass = self._loader.steps(0)
        step = first_step
        while step < self._steps:
            number, first = divmod(epoch * self._steps + step, in_pass)
            last = min(self._steps, step + in_pass - first)
            with contextlib.closing(self._loader.batches(number, first)) as batches:
                # By map, which holds no batch while the next one is made.
                yield from map(_renumbered, batches, range(step, last))
            step = last


def _renumbered(batch: Batch, step: int) -> Batch:
    return replace(batch, step=step)


def measure_point(
    study: Study, point: Point, work: Callable[..., dict[str, Any]] | None = None
) -> Iterator[str | dict[str, Any]]:
    """Measure a point: yields words about every attempt that ran out of memory, and the record at the end.

    After such an attempt the batch is halved, with twice as many to an update where that is possible, so that the
    updates stay what they were. A point that cannot be measured has `failed` in its record. work: what is done in the
    process, `measure` by default.
    """
    settings = study.settings
    batch_size, accumulation = settings.loader.batch_size, settings.optim.grad_accumulation
    # These use the memory of gradients again in every step.
    adds_up = settings.trainer.compile not in ("reduce-overhead", "max-autotune")
    attempts: list[dict[str, Any]] = []
    start = time.perf_counter()
    while True:
        head = {"batch_size": batch_size, "accumulation": accumulation, "out_of_memory": attempts}
        try:
            found = in_process(_within_memory, work or measure, study, point, batch_size, accumulation)
        except UserError:
            raise
        except Exception as error:  # of this point alone: a model that does not take images so small, for instance
            found = {"failed": first_line(error)}
            break
        short = found.get("out_of_memory") or found.get("failed")
        if not short:
            break
        attempts.append({"batch_size": batch_size, "reason": short})
        if batch_size // 2 < SMALLEST_BATCH:
            found = {"failed": f"out of memory with {batch_size} images a batch: {short}"}
            break
        batch_size //= 2
        accumulation *= 2 if adds_up else 1
        yield f"out of memory ({short}); again with {batch_size} images a batch"
    yield {**size_of(study, point), **head, **found, "point_seconds": time.perf_counter() - start}


def size_of(study: Study, point: Point) -> dict[str, Any]:
    """The set, its stored size, and the bytes of its images at rest and as they would be if resized beforehand."""
    manifests = [open_split(study.shards, part).manifest for part in ("train", "test")]
    values = sum(manifest.samples for manifest in manifests) * point.resolution**2 * manifests[0].image_shape[2]
    return {
        "dataset": study.dataset,
        "image_shape": list(manifests[0].image_shape),
        "bytes_at_rest": sum(manifest.packed_bytes for manifest in manifests),
        "bytes_pre_resized_uint8": values,
        "bytes_pre_resized_float32": 4 * values,
    }


def _within_memory(work: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What the work returns, or `out_of_memory` with the reason; called in a process of its own."""
    try:
        return work(*arguments)
    except (MemoryError, RuntimeError) as error:  # torch's and DALI's are RuntimeErrors
        if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError) or _speaks_of_memory(error):
            return {"out_of_memory": first_line(error)}
        raise


def _speaks_of_memory(error: RuntimeError) -> bool:
    return any(words in str(error).lower() for words in _MEMORY_WORDS)


def measure(study: Study, point: Point, batch_size: int, accumulation: int) -> dict[str, Any]:
    """The figures of a point, with such a batch and so many of them to an update."""
    settings = study.config(point, batch_size, accumulation)
    with init_distributed(settings.device) as world:
        settings = resolve_precision(settings, world.device)
        data = open_data(settings, world)
        data.test.sampler = replace(data.test.sampler, samples=data.test.sampler.samples[: study.test_images])
        loader = _loader_figures(data, world)
        by_epochs, history, training = _train(settings, data, world)
        rates = [record["images_per_second"] for record in history]
        # The first epoch warms up; of a single one there is nothing else.
        rate = Spread.of(rates[1:] or rates)
        by_time = None
        if study.is_timed(point):
            steps = _steps_in(study.seconds, rate.median, data.train, settings)
            if steps:
                timed = replace(data, train=Stretched(data.train, steps))
                by_time, _, _ = _train(settings, timed, world)
            else:
                by_time = {"failed": f"{study.seconds:g} s are too short for {settings.trainer.epochs} updates"}
        on_gpu = world.device.type == "cuda"
        return {
            **loader,
            "loader_backend": data.backend,
            "training_images": len(data.train.samples),
            "epochs": settings.trainer.epochs,
            "seconds": study.seconds if study.is_timed(point) else None,
            "training_images_per_second": rate.to_json(),
            "data_wait_share": training.state.total.wait_fraction,
            "parameters": sum(parameter.numel() for parameter in training.state.model.parameters()),
            "by_epochs": by_epochs,
            "by_time": by_time,
            "peak_device_memory_bytes": torch.cuda.max_memory_allocated(world.device) if on_gpu else None,
            "precision": settings.trainer.precision,
            "environment": collect_env_info(world.device),
        }


def _loader_figures(data: TrainingData, world: World) -> dict[str, Any]:
    """Images a second of the loader alone, and the processor's seconds, of all threads, for a thousand images."""
    passes = max(1, LOADER_IMAGES // len(data.train.samples))
    rates, costs = [], []
    for run in range(1 + LOADER_RUNS):
        start, cpu = time.perf_counter(), time.process_time()
        # By map, which holds no batch while the next one is made.
        images = sum(sum(map(_size, data.train.batches(number))) for number in range(passes))
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)
        if run:  # the first one warms up
            rates.append(images / (time.perf_counter() - start))
            costs.append(1000 * (time.process_time() - cpu) / images)
    return {
        "loader_images_per_second": Spread.of(rates).to_json(),
        "loader_cpu_seconds_per_thousand": Spread.of(costs).to_json(),
    }


def _size(batch: Batch) -> int:
    return len(batch.labels)


def _train(settings: Config, data: TrainingData, world: World) -> tuple[dict[str, Any], list[dict[str, Any]], Training]:
    """Train and test: the figures, the epochs' records and what was trained."""
    start = time.perf_counter()
    training = make_training(settings, data, world)
    _compile(training)
    with tempfile.TemporaryDirectory(prefix="inkstream-study-") as path:
        directory = RunDirectory(Path(path))
        with directory.lock(), contextlib.redirect_stdout(io.StringIO()):
            evaluation = engine.fit(training, directory, loggers=[])
    best = training.state.history[training.state.best_epoch - 1]
    return (
        {
            **evaluation.summary(),
            **evaluation.calibration(),
            "validation": best["validation"],
            "best_epoch": training.state.best_epoch,
            "updates": training.state.updates,
            "images": training.state.total.samples,
            "training_seconds": training.state.total.seconds,
            "wall_seconds": time.perf_counter() - start,
        },
        training.state.history,
        training,
    )


def _compile(training: Training) -> None:
    """Where the model is compiled, take two steps first and forget them: compiling does not count as training."""
    if compile_mode(training.config.trainer, training.world.device) == "off":
        return
    before = copy.deepcopy(training.checkpoint())
    training.forward.train()
    with contextlib.closing(training.data.train.batches()) as batches:
        for batch in itertools.islice(batches, 2):
            engine.train_step(training, batch, 1, True)
    training.restore(before)


def _steps_in(seconds: float, images_per_second: float, loader: TrainingLoader, settings: Config) -> int:
    """Steps of each of the recipe's epochs that fit into the time, whole updates; 0 if not even one does."""
    images_per_step = len(loader.samples) / loader.steps(0)
    steps = seconds * images_per_second / images_per_step / settings.trainer.epochs
    return int(steps) // settings.optim.grad_accumulation * settings.optim.grad_accumulation
