"""The largest batch that fits, and how fast each size is.

    python -m trainer.loop.find_batch_size configs/byclass.yaml [key=value ...]

takes training steps of a recipe with made-up images of its size, with more and more of them: twice as many each time
until the memory is not enough, then in between. Nothing is written but the input statistics beside the set, where there
are none yet.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.loader import Batch
from shards.cli import program_name, run_command
from shards.errors import UserError
from shards.remote.sets import resolve_dataset
from trainer.config import load as config
from trainer.data.training_data import open_data
from trainer.loop import engine
from trainer.loop.state import Training, make_training
from trainer.models.auto import resolve_auto
from trainer.runtime.distributed import init_distributed
from trainer.runtime.memory import available_memory, peak_memory

_FIRST = 16
_FINEST = 8  # images; and a sixteenth of the size
_WARM_UP = 2  # steps, the first of which also compiles
_SECONDS = 0.5  # of a trial, at least
_AHEAD = 3  # batches that the loader holds beside the one that is learnt from
_SPARED = 0.9  # of the free memory of a CPU, which other processes share


@dataclass(frozen=True)
class BatchSizeResult:
    """A batch size that fits. memory: bytes at the peak."""

    batch_size: int
    images_per_second: float
    memory: int


def search_batch_sizes(attempt: Callable[[int], BatchSizeResult | None], most: int) -> list[BatchSizeResult]:
    """The trials that fit, smallest first: doubled up to `most` images, then bisected to a sixteenth.

    attempt: tries a batch size; None if it does not fit.
    """
    trials: list[BatchSizeResult] = []
    size, too_large = min(_FIRST, most), None
    while too_large is None and (not trials or size > trials[-1].batch_size):
        found = attempt(size)
        if found is None:
            too_large = size
        else:
            trials.append(found)
            size = min(2 * size, most)
    fits = trials[-1].batch_size if trials else 0
    while too_large is not None and too_large - fits > max(_FINEST, fits // 16):
        middle = (fits + too_large) // 2 // _FINEST * _FINEST
        if middle <= fits:
            break
        found = attempt(middle)
        if found is None:
            too_large = middle
        else:
            fits = middle
            trials.append(found)
    return trials


class BatchSizeRunner:
    """Training steps with made-up batches of any size."""

    def __init__(self, training: Training) -> None:
        self._training = training
        self._device = training.world.device
        self._free = _SPARED * available_memory()
        self._before = peak_memory()
        self._per_image = 0.0

    def __call__(self, batch_size: int) -> BatchSizeResult | None:
        """The speed and memory of a batch size; None if the device's memory is not enough for it.

        A GPU says so. A system kills the process instead, so on a CPU the memory is estimated from the sizes before.
        """
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)
            try:
                speed = self._speed(batch_size)
                return BatchSizeResult(batch_size, speed, torch.cuda.max_memory_reserved(self._device))
            except torch.cuda.OutOfMemoryError:
                return None
            finally:
                self._training.state.optimizer.zero_grad(set_to_none=True)
                gc.collect()
        if self._per_image * batch_size > self._free:
            return None
        speed = self._speed(batch_size)
        self._per_image = (peak_memory() - self._before) / batch_size
        return BatchSizeResult(batch_size, speed, peak_memory())

    def _speed(self, batch_size: int) -> float:
        """Images a second of whole steps, the optimiser's update included."""
        spec = self._training.data.spec
        shape = (batch_size, spec.image_shape[2], spec.resolution, spec.resolution)
        images = torch.rand(shape, device=self._device)
        held = [images.clone() for _ in range(_AHEAD)]
        labels = torch.arange(batch_size, device=self._device) % len(self._training.data.classes)
        batch = Batch(images, labels, labels, 0, batch_size)
        self._training.forward.train()
        steps, start = -_WARM_UP, 0.0
        while steps <= 0 or time.perf_counter() - start < _SECONDS:
            if steps == 0:
                self._wait()
                start = time.perf_counter()
            engine.train_step(self._training, batch, 1, True)
            steps += 1
            if steps > 0:
                self._wait()
        seconds = time.perf_counter() - start
        del held
        return steps * batch_size / seconds

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog=program_name("trainer.loop.find_batch_size"),
        description="The largest batch that fits, and how fast each size is.",
    )
    parser.add_argument("config", type=Path, metavar="CONFIG", help="YAML file, or the name of a recipe in configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the file's")
    arguments = parser.parse_intermixed_args()
    settings = config.load(arguments.config, arguments.overrides)
    resolve_dataset(settings.data.shards)
    with init_distributed(settings.device) as world:
        if world.size > 1:
            raise UserError(
                found=f"{world.size} ranks",
                expected="one process: what fits on a rank does not depend on the others",
                hint=f"python -m trainer.loop.find_batch_size {arguments.config}",
            )
        settings = resolve_auto(settings, world.device)
        data = open_data(settings, world)
        training = make_training(settings, data, world)
        attempts = BatchSizeRunner(training)
        print(f"{settings.model.name} at {data.spec.resolution}x{data.spec.resolution} on {world.device}")

        def attempt(size: int) -> BatchSizeResult | None:
            found = attempts(size)
            told = (
                f"{found.images_per_second:>10,.0f} images/s  {found.memory / 1e9:6.1f} GB" if found else "does not fit"
            )
            print(f"{size:>8,} images  {told}", flush=True)
            return found

        trials = search_batch_sizes(attempt, most=len(data.train.samples))
        if not trials:
            raise UserError(
                found=f"not even {_FIRST} images that fit", expected="some", hint="a smaller model or data.resolution"
            )
    largest = max(trials, key=lambda trial: trial.batch_size)
    fastest = max(trials, key=lambda trial: trial.images_per_second)
    print(
        f"largest  loader.batch_size={largest.batch_size} for each rank, {largest.images_per_second:,.0f} images/s\n"
        f"fastest  loader.batch_size={fastest.batch_size} for each rank, {fastest.images_per_second:,.0f} images/s"
    )
    return 0


if __name__ == "__main__":
    run_command(main)
