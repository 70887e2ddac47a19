"""Find the largest batch size that fits into memory, and the fastest.

    python -m trainer.loop.find_batch_size configs/byclass.yaml [key=value ...]

The command takes training steps of a recipe on synthetic images. It doubles the batch size until memory is not
sufficient, then bisects. No file is written, except the input statistics of the data set.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from pipeline.loader import Batch
from pipeline.transforms.preprocess import format_size
from shards.cli import command_parser, run_command
from shards.errors import UserError
from trainer.config import load as config
from trainer.config.base import add_recipe_arguments
from trainer.data.training_data import open_data
from trainer.loop import engine
from trainer.loop.state import Training, make_training
from trainer.loop.step_check import saved_tensor_bytes
from trainer.models.auto import resolve_auto
from trainer.models.precision import make_grad_scaler
from trainer.models.transfer import set_training_mode
from trainer.runtime.distributed import init_single_process
from trainer.runtime.memory import available_memory, peak_memory

_FIRST = {"cpu": 16, "cuda": 256}  # images
_FINEST = 8  # images; the search also ends at 1/16 of the size
_WARM_UP = 2  # steps, the first of which also compiles
_SECONDS = 0.5  # minimum duration of a measurement
_PREFETCHED = 3  # batches that the loader holds besides the current one
_USABLE = 0.9  # fraction of the available CPU memory, which other processes also use


@dataclass(frozen=True)
class BatchSizeResult:
    """A batch size that fits."""

    batch_size: int
    images_per_second: float
    memory: int
    """Peak memory in bytes."""

    def __str__(self) -> str:
        return f"{self.images_per_second:>10,.0f} images/s  {self.memory / 1e9:6.1f} GB"


def search_batch_sizes(
    attempt: Callable[[int], BatchSizeResult | None], first: int, most: int
) -> list[BatchSizeResult]:
    """Double the batch size up to a limit or to the first that does not fit, then bisect to a sixteenth.

    Args:
        attempt: Measures a batch size; returns None if it does not fit.
        first: The first batch size.
        most: The limit.

    Returns:
        The batch sizes that fit, in ascending order.
    """
    results: list[BatchSizeResult] = []
    size, fits, too_large = min(first, most), 0, None
    while size > fits:
        result = attempt(size)
        if result is None:
            too_large = size
        else:
            fits = size
            results.append(result)
        if too_large is None:
            size = min(2 * size, most)
        elif too_large - fits > max(_FINEST, fits // 16):
            size = (fits + too_large) // 2 // _FINEST * _FINEST
        else:
            break
    return results


class BatchSizeRunner:
    """Takes training steps on synthetic batches of any size."""

    def __init__(self, training: Training) -> None:
        self._training = training
        # One compilation for all sizes. A run compiles its only size with static shapes, which can be faster.
        training.forward.register_forward_pre_hook(lambda _, inputs: torch._dynamo.maybe_mark_dynamic(inputs[0], 0))
        self._device = training.world.device
        self._available = _USABLE * available_memory()
        self._before = peak_memory()
        self._per_image = self._least_per_image()

    def __call__(self, batch_size: int) -> BatchSizeResult | None:
        """Measure speed and memory of a batch size; return None if it does not fit.

        A GPU raises an error when memory is exhausted. On a CPU the system kills the process instead, so the memory is
        estimated from the previous size.
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
                state, trainer = self._training.state, self._training.config.trainer
                state.optimizer.zero_grad(set_to_none=True)
                state.scaler = make_grad_scaler(trainer, self._device)  # the old one may be within a step
                gc.collect()
        if self._per_image * batch_size > self._available:
            return None
        speed = self._speed(batch_size)
        self._per_image = (peak_memory() - self._before) / batch_size
        return BatchSizeResult(batch_size, speed, peak_memory())

    def _least_per_image(self) -> float:
        """Return a lower bound of the bytes of an image, so that the first size does not exceed the memory either."""
        spec, count = self._training.data.spec, _FIRST["cpu"]
        shape = (count, spec.image_shape[2], *spec.input_size)
        return saved_tensor_bytes(self._training.state.model, shape) / count

    def _speed(self, batch_size: int) -> float:
        """Return the images/s of complete steps, optimizer included."""
        spec = self._training.data.spec
        shape = (batch_size, spec.image_shape[2], *spec.input_size)
        images = torch.rand(shape, device=self._device)
        prefetched = [images.clone() for _ in range(_PREFETCHED)]
        labels = torch.arange(batch_size, device=self._device) % len(self._training.data.classes)
        batch = Batch(images, labels, labels, 0, batch_size)
        set_training_mode(self._training.forward)
        self._steps(batch, _WARM_UP)
        steps = max(1, round(_SECONDS / self._steps(batch, 1)))
        speed = steps * batch_size / self._steps(batch, steps)
        del prefetched
        return speed

    def _steps(self, batch: Batch, count: int) -> float:
        """Return the seconds of training steps; synchronizes with the device once, after the last."""
        start = time.perf_counter()
        for _ in range(count):
            engine.train_step(self._training, batch, 1, True)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter() - start


def main() -> int:
    """Run the command; returns the exit status."""
    parser = command_parser("trainer.loop.find_batch_size", __doc__)
    add_recipe_arguments(parser)
    arguments = parser.parse_intermixed_args()
    settings = config.load(arguments.config, arguments.overrides)
    with init_single_process(settings.device, "the memory of a rank does not depend on the others") as world:
        settings = resolve_auto(settings, world.device)
        data = open_data(settings, world)
        run = BatchSizeRunner(make_training(settings, data, world))
        print(f"{settings.model.name} at {format_size(data.spec.resolution)} on {world.device}")

        def attempt(size: int) -> BatchSizeResult | None:
            result = run(size)
            print(f"{size:>8,} images  {result or 'does not fit'}", flush=True)
            return result

        most = len(data.train.samples)
        results = search_batch_sizes(attempt, _FIRST[world.device.type], most)
    if not results:
        raise UserError(
            found="a batch of 8 images that does not fit",
            expected="enough memory for one batch",
            hint="choose a smaller model.name or data.resolution",
        )
    limit = " (the training set is the limit, not memory)" if results[-1].batch_size == most else ""
    fastest = max(results, key=lambda result: result.images_per_second)
    for name, result in (("largest", results[-1]), ("fastest", fastest)):
        print(f"{name}  loader.batch_size={result.batch_size} for one rank  {str(result).lstrip()}{limit}")
        limit = ""
    print("loader.batch_size counts the images of all ranks: multiply by their number")
    return 0


if __name__ == "__main__":
    run_command(main)
