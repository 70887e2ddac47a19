"""Measurement of one point of the resolution sweep, in its own process.

A point is trained twice. The first training has the recipe's epochs. The second has the same training time at every
resolution: the throughput of the first training (median images/s, without its first epoch) determines the number of
updates. That number is fixed in advance so that the learning-rate schedule completes. An epoch of the second training
is one of N equal-length periods, not a pass over the data; each period continues in the sequence of passes where the
previous one ended, so warm-up, restarts and validation fall on the same fractions of the training. Training time
excludes building, compiling, validation and test. The actual seconds are recorded as well.

Each training selects its best epoch on the validation split and evaluates the test split once, at its end.
"""

from __future__ import annotations

import itertools
import operator
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.harness import Spread, in_process
from benchmarks.common.training import FixedStepLoader, fit_and_test
from benchmarks.sweep.plan import Point, SweepConfig
from pipeline.sampler import SequentialBatchSampler
from shards import UserError, open_split
from shards.errors import first_line
from trainer.checkpoint.run_dir import RunDirectory
from trainer.config.schema import Config
from trainer.data.resolution_schedule import TrainingLoader
from trainer.data.training_data import TrainingData, open_data
from trainer.loop.state import Training, make_training
from trainer.loop.warm_up import warm_up
from trainer.models.auto import resolve_auto
from trainer.runtime.distributed import World, init_distributed
from trainer.runtime.env_info import collect_env_info

LOADER_RUNS = 5
LOADER_IMAGES = 32_768  # per run, in one or more passes over the training split
SMALLEST_BATCH = 8
_MEMORY_WORDS = ("out of memory", "can't allocate memory", "failed to allocate", "allocation failed")


def measure_point(
    config: SweepConfig, point: Point, work: Callable[..., dict[str, Any]] | None = None
) -> Iterator[str | dict[str, Any]]:
    """Measure a point in a fresh process.

    After an attempt that runs out of memory the batch size is halved and gradient accumulation doubled, where the
    compile mode allows it, so that the updates stay the same.

    Args:
        config: The sweep.
        point: What to measure.
        work: Function to call in the process, `measure` by default.

    Yields:
        A message per attempt that ran out of memory, then the record. The record of a point that cannot be measured
        has the reason in `failed`.
    """
    settings = config.settings
    batch_size, accumulation = settings.loader.batch_size, settings.optim.grad_accumulation
    # CUDA graphs reuse the memory of the gradients in every step.
    can_accumulate = settings.trainer.compile not in ("reduce-overhead", "max-autotune")
    attempts: list[dict[str, Any]] = []
    start = time.perf_counter()
    while True:
        head = {"batch_size": batch_size, "accumulation": accumulation, "out_of_memory": attempts}
        try:
            result = in_process(_catch_out_of_memory, work or measure, config, point, batch_size, accumulation)
        except UserError:
            raise
        except Exception as error:  # only this point fails: a model may not accept such small images
            result = {"failed": first_line(error)}
            break
        reason = result.get("out_of_memory") or result.get("failed")
        if not reason:
            break
        attempts.append({"batch_size": batch_size, "reason": reason})
        if batch_size // 2 < SMALLEST_BATCH:
            result = {"failed": f"out of memory at batch size {batch_size}: {reason}"}
            break
        batch_size //= 2
        accumulation *= 2 if can_accumulate else 1
        yield f"out of memory ({reason}); retrying with batch size {batch_size}"
    yield {**dataset_sizes(config, point), **head, **result, "point_seconds": time.perf_counter() - start}


def dataset_sizes(config: SweepConfig, point: Point) -> dict[str, Any]:
    """Return the size of the data set in bytes: as packed, and if its images were resized in advance."""
    manifests = [open_split(config.shards, split).manifest for split in ("train", "test")]
    values = sum(manifest.samples for manifest in manifests) * point.resolution**2 * manifests[0].image_shape[2]
    return {
        "dataset": config.dataset,
        "image_shape": list(manifests[0].image_shape),
        "bytes_at_rest": sum(manifest.packed_bytes for manifest in manifests),
        "bytes_pre_resized_uint8": values,
        "bytes_pre_resized_float32": 4 * values,
    }


def _catch_out_of_memory(work: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Return the result of the work, or the reason in `out_of_memory`."""
    try:
        return work(*arguments)
    except (MemoryError, RuntimeError) as error:  # torch and DALI raise RuntimeError
        if isinstance(error, MemoryError) or any(words in str(error).lower() for words in _MEMORY_WORDS):
            return {"out_of_memory": first_line(error)}
        raise


def measure(config: SweepConfig, point: Point, batch_size: int, accumulation: int) -> dict[str, Any]:
    """Measure a point at a batch size and a number of batches per update."""
    settings = config.point_config(point, batch_size, accumulation)
    with init_distributed(settings.device) as world:
        settings = resolve_auto(settings, world.device)
        data = open_data(settings, world)
        test_samples = data.test.sampler.samples[: config.test_images]
        data.test.sampler = SequentialBatchSampler(test_samples, data.test.sampler.batch_size)
        loader = _measure_loader(data, world)
        by_epochs, history, training = _train(settings, data, world)
        rates = [record["images_per_second"] for record in history]
        rate = Spread.of(rates[1:] or rates)  # the first epoch warms up
        by_time = None
        if config.is_timed(point):
            steps = _steps_per_period(config.seconds, rate.median, data.train, settings)
            if steps:
                by_time, _, _ = _train(settings, replace(data, train=FixedStepLoader(data.train, steps)), world)
            else:
                by_time = {"failed": f"{config.seconds:g} s are too short for {settings.trainer.epochs} updates"}
        on_gpu = world.device.type == "cuda"
        return {
            **loader,
            "loader_backend": data.backend,
            "training_images": len(data.train.samples),
            "epochs": settings.trainer.epochs,
            "seconds": config.seconds if config.is_timed(point) else None,
            "training_images_per_second": rate.to_json(),
            "data_wait_share": training.state.total.wait_fraction,
            "parameters": sum(parameter.numel() for parameter in training.state.model.parameters()),
            "by_epochs": by_epochs,
            "by_time": by_time,
            "peak_device_memory_bytes": torch.cuda.max_memory_allocated(world.device) if on_gpu else None,
            "precision": settings.trainer.precision,
            "environment": collect_env_info(world.device),
        }


def _measure_loader(data: TrainingData, world: World) -> dict[str, Any]:
    """Measure images/s of the loader alone, and the CPU seconds of all threads per 1,000 images."""
    passes = max(1, LOADER_IMAGES // len(data.train.samples))
    rates, costs = [], []
    for run in range(1 + LOADER_RUNS):
        start, cpu = time.perf_counter(), time.process_time()
        # `map` keeps no reference to a batch while the next one is made.
        batches = itertools.chain.from_iterable(map(data.train.batches, range(passes)))
        images = sum(map(len, map(operator.attrgetter("labels"), batches)))
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)
        if run:  # the first run warms up
            rates.append(images / (time.perf_counter() - start))
            costs.append(1000 * (time.process_time() - cpu) / images)
    return {
        "loader_images_per_second": Spread.of(rates).to_json(),
        "loader_cpu_seconds_per_thousand": Spread.of(costs).to_json(),
    }


def _train(settings: Config, data: TrainingData, world: World) -> tuple[dict[str, Any], list[dict[str, Any]], Training]:
    """Train and test; return the metrics, the records of the epochs and the training."""
    start = time.perf_counter()
    training = make_training(settings, data, world)
    warm_up(training)
    with tempfile.TemporaryDirectory(prefix="inkstream-sweep-") as path:
        evaluation = fit_and_test(training, RunDirectory(Path(path)))
    state = training.state
    metrics = {
        **evaluation.summary(),
        **evaluation.calibration(),
        "validation": state.history[state.best_epoch - 1]["validation"],
        "best_epoch": state.best_epoch,
        "updates": state.updates,
        "images": state.total.samples,
        "training_seconds": state.total.seconds,
        "wall_seconds": time.perf_counter() - start,
    }
    return metrics, state.history, training


def _steps_per_period(seconds: float, images_per_second: float, loader: TrainingLoader, settings: Config) -> int:
    """Return how many steps fit in each of the recipe's epochs, a multiple of the steps per update; 0 if none fits."""
    images_per_step = len(loader.samples) / loader.steps(0)
    steps = seconds * images_per_second / images_per_step / settings.trainer.epochs
    return int(steps) // settings.optim.grad_accumulation * settings.optim.grad_accumulation
