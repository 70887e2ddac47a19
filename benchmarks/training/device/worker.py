"""Measurements of the device check, in a worker process."""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch._dynamo
import yaml
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.loaders.baselines.base import Task
from benchmarks.loaders.verify import model_input
from benchmarks.training.device.cases import AUGMENTED, IMAGE_CHANNELS, RAW_SIDE, Scale, Settings
from benchmarks.training.loop import LoopCase, ResidentLoader, measure
from pipeline.loader import Batch
from pipeline.packing.pack import PackSettings, pack
from pipeline.readers.raw_split import RawSplit
from shards import open_split
from shards.stores.base import is_image_store
from trainer.config.load import replace_settings, validate
from trainer.config.schema import Config
from trainer.data.training_data import TrainingData, open_data
from trainer.loop import engine
from trainer.loop.state import Training, make_training
from trainer.loop.train import train
from trainer.models.auto import resolve_auto
from trainer.models.compile import compile_mode
from trainer.runtime.distributed import World, init_distributed
from trainer.runtime.env_info import find_c_compiler, missing_for_compilation

Record = dict[str, Any]

_CLASSES = 62
_CHECKED_BATCHES = 4
_KERNELS = 12  # the longest ones of a step
_PROFILED_STEPS = 3
# Largest errors of pixels in 0 .. 1. A rotated image is sampled at positions that float32 rounds.
_TOLERANCE = 2e-5
_AUGMENTED_TOLERANCE = 1e-3


def pack_synthetic_set(out: Path, images: int) -> Path:
    """Pack noise with a bright square whose place is the class: as many classes and pixels as EMNIST ByClass."""
    random = np.random.default_rng(0)
    squares = np.zeros((_CLASSES, RAW_SIDE, RAW_SIDE, 1), np.uint8)
    for label in range(_CLASSES):
        row, column = 3 * (label // 8), 3 * (label % 8)
        squares[label, row : row + 6, column : column + 6] = 255

    def make_split(name: str, count: int) -> RawSplit:
        labels = np.arange(count) % _CLASSES
        pixels = np.maximum(random.integers(0, 128, (count, RAW_SIDE, RAW_SIDE, 1), dtype=np.uint8), squares[labels])
        return RawSplit.from_arrays(name, pixels, labels, tuple(map(str, range(_CLASSES))), transposed=True)

    pack(
        lambda: (make_split("train", images), make_split("test", images // 20 + _CLASSES)),
        out,
        PackSettings("synthetic"),
    )
    return out


class DeviceWorker:
    """Measures the cases of `benchmarks.training.device.cases`, a method for each section.

    Args:
        shards: Packed data set.
        device: Setting `device`.
        scale: Size of the check.
        directory: Existing directory for runs.
    """

    def __init__(self, shards: Path, device: str, scale: Scale, directory: Path) -> None:
        self._shards = shards
        self._scale = scale
        self._directory = directory
        self._stack = ExitStack()
        self._world = self._stack.enter_context(init_distributed(device))
        self._on_gpu = self._world.device.type == "cuda"

    def close(self) -> None:
        """Leave the process group."""
        self._stack.close()

    def device(self, settings: Settings) -> list[Record]:
        """Measure the bandwidth of the device's memory, of copies to it, and the time of a launch."""
        size = 1 << (30 if self._on_gpu else 22)
        target = torch.empty(size, dtype=torch.uint8, device=self._world.device)
        source = torch.empty_like(target)
        small = torch.zeros(1, device=self._world.device)

        def fastest(work: Callable[[], object]) -> float:
            return min(self._time(work)[0] for _ in range(4))

        record: Record = {"copy_gb_per_second": 2e-9 * size / fastest(lambda: target.copy_(source))}
        if self._on_gpu:
            pageable = torch.ones(size // 8, dtype=torch.uint8)
            copy = partial(target[: size // 8].copy_, non_blocking=True)
            for name, host in (("pinned", pageable.pin_memory()), ("pageable", pageable)):
                record[f"{name}_to_device_gb_per_second"] = 1e-9 * (size // 8) / fastest(partial(copy, host))
        record["launch_microseconds"] = 1e4 * fastest(lambda: [small.add_(1) for _ in range(100)])
        missing = missing_for_compilation(torch.cuda.get_device_capability() if self._on_gpu else None)
        record |= {"c_compiler": find_c_compiler(), "missing_for_compilation": missing and missing[0]}
        record["threads"] = torch.get_num_threads()
        record |= {"cudnn": torch.backends.cudnn.version(), "tf32_matmul": torch.backends.cuda.matmul.allow_tf32}
        return [record]

    def correctness(self, settings: Settings) -> list[Record]:
        """Compare batches with a float64 reference, or augmented ones with those of the torch backend on the CPU.

        The batches are computed while the device is busy and compared after the last one, so that memory that is reused
        too early is noticed. A second pass keeps no batch.
        """
        data = self._open(settings)
        busy = torch.zeros(4096, 4096, device=self._world.device) if self._on_gpu else None

        def batches() -> Iterator[Batch]:
            with contextlib.closing(data.train.batches()) as iterator:
                for batch in itertools.islice(iterator, _CHECKED_BATCHES):
                    if busy is not None:
                        for _ in range(10):
                            torch.mm(busy, busy)
                    yield batch

        kept = list(batches())
        sums = [batch.images.double().sum() for batch in kept]
        sums_again = []
        for batch in batches():
            sums_again.append(batch.images.double().sum())
            del batch
        expected = self._expected_batches(settings, data, kept)
        std = np.reshape(data.spec.std, (-1, 1, 1))
        error = max(
            float(np.abs((batch.images.cpu().double().numpy() - images) * std).max())
            for batch, images in zip(kept, expected, strict=True)
        )
        tolerance = _AUGMENTED_TOLERANCE if set(AUGMENTED) & set(settings) else _TOLERANCE
        repeated = [float(one) for one in sums] == [float(one) for one in sums_again]
        return [
            {
                "backend": data.backend,
                "worst_error": error,
                "tolerance": tolerance,
                "ok": error <= tolerance and repeated,
            }
        ]

    def _expected_batches(self, settings: Settings, data: TrainingData, batches: list[Batch]) -> Iterator[np.ndarray]:
        """Yield the expected images of each batch, float64 [n, C, R, R]; check its labels."""
        store = open_split(self._shards, "train")
        assert is_image_store(store)
        order = np.argsort(store.rows)
        task = Task((0, 0, 0), 0, data.spec.input_size[0], 0, data.spec.mean, data.spec.std, 0, self._world.device)
        world = World(rank=0, size=1, device=torch.device("cpu"))
        with contextlib.ExitStack() as stack:
            augmented = None
            if set(AUGMENTED) & set(settings):
                config = replace_settings(self._config(settings), {"loader.backend": "torch"}, "the reference")
                augmented = stack.enter_context(contextlib.closing(open_data(config, world).train.batches()))
            for batch in batches:
                samples = order[np.searchsorted(store.rows[order], batch.source_index.cpu().numpy())]
                if not np.array_equal(store.labels[samples], batch.labels.cpu().numpy()):
                    raise ValueError("labels differ from those of the data set")
                if augmented is not None:
                    yield next(augmented).images.double().numpy()
                else:
                    pixels = store.read(samples)
                    yield model_input(pixels.swapaxes(1, 2) if store.manifest.transposed else pixels, task)

    def loader(self, settings: Settings) -> list[Record]:
        """Measure the loader alone."""
        data = self._open(settings)
        rates, processor = [], 0.0
        for run in range(1 + self._scale.runs):  # the first one is a warm-up
            self._synchronize()
            start, cpu, images, steps = time.perf_counter(), time.process_time(), 0, 0
            while time.perf_counter() - start < self._scale.seconds:
                with contextlib.closing(data.train.batches(run)) as batches:
                    for batch in batches:
                        images, steps = images + len(batch.labels), steps + 1
                        del batch
                        if time.perf_counter() - start >= self._scale.seconds:
                            break
            self._synchronize()
            rates.append(images / (time.perf_counter() - start))
            processor = (time.process_time() - cpu) / steps
        return [
            {
                "images_per_second": statistics.median(rates[1:]),
                "slowest": min(rates[1:]),
                "fastest": max(rates[1:]),
                "cpu_milliseconds_per_batch": 1000 * processor,
                "backend": data.backend,
                "backend_reason": data.backend_reason,
            }
        ]

    def step(self, settings: Settings) -> list[Record]:
        """Measure the training step on batches that stay on the device, and its longest kernels."""
        training = self._make_training(settings)
        resident = ResidentLoader(training.data.train)
        batches = list(itertools.islice(resident.batches(), 4))

        def steps(count: int) -> None:
            for number in range(count):
                engine.train_step(training, batches[number % len(batches)], 1, True)

        first, _ = self._time(lambda: steps(3))  # compiles, and records CUDA graphs in the second step
        once, _ = self._time(lambda: steps(3))
        count = max(3, round(3 * self._scale.seconds / once))
        seconds = statistics.median(self._time(lambda: steps(count))[0] / count for _ in range(self._scale.runs))
        # From an idle device: otherwise the host waits for a place in its queue.
        host = statistics.median(self._time(lambda: steps(1))[1] for _ in range(3))
        kernels = self._kernels(lambda: steps(_PROFILED_STEPS))
        record = {
            "images_per_second": len(batches[0].labels) / seconds,
            "step_milliseconds": 1000 * seconds,
            "host_milliseconds": 1000 * host,
            "kernel_milliseconds": sum(kernel["milliseconds_per_step"] for kernel in kernels),
            "first_steps_seconds": first,
            "peak_memory_gb": 1e-9 * torch.cuda.max_memory_allocated() if self._on_gpu else None,
            "precision": training.config.trainer.precision,
            "compile": compile_mode(training.config.trainer, self._world.device),
        }
        return [record, *sorted(kernels, key=lambda kernel: -kernel["milliseconds_per_step"])[:_KERNELS]]

    def _kernels(self, work: Callable[[], None]) -> list[Record]:
        """Profile `_PROFILED_STEPS` steps; return a record for each kernel, or on a CPU for each operator."""
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_gpu else [])]
        with profile(activities=activities) as profiler:
            self._time(work)
        kind = DeviceType.CUDA if self._on_gpu else DeviceType.CPU
        attribute = "self_device_time_total" if self._on_gpu else "self_cpu_time_total"  # microseconds
        return [
            {
                "section": "kernels",
                "kernel": event.key[:80],
                "milliseconds_per_step": 1e-3 * getattr(event, attribute) / _PROFILED_STEPS,
                "calls_per_step": event.count / _PROFILED_STEPS,
            }
            for event in profiler.key_averages()
            # Annotations span kernels that are counted on their own.
            if event.device_type == kind and not getattr(event, "is_user_annotation", False)
        ]

    def loop(self, settings: Settings) -> list[Record]:
        """Compare the complete loop with the same loop over batches that stay on the device."""
        case = LoopCase(
            settings["data.resolution"],
            settings["model.name"],
            settings["loader.batch_size"],
            "auto",
            settings["trainer.compile"],
        )
        scale = self._scale
        result = measure(self._shards, case, self._world.device.type, 1.0, scale.runs, 2 * scale.seconds)
        assert result is not None
        names = ("whole_images_per_second", "synthetic_images_per_second", "whole_of_synthetic", "data_wait_share")
        return [{name: result[name]["median"] for name in names} | {"backend": result["loader_backend"]}]

    def run(self, settings: Settings) -> list[Record]:
        """Train for a few epochs as `inkstream train` does, with validation, checkpoints and report."""
        defaults = {"data.verify": "start", "data.normalize": "dataset"}
        recipe = self._directory / f"{settings['trainer.compile']}.yaml"
        run_dir = recipe.with_suffix("")
        config = self._config(defaults | settings | {"run.dir": str(run_dir), "device": self._world.device.type})
        recipe.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True)))
        start = time.perf_counter()
        status = train(recipe, [], False)
        summary = json.loads((run_dir / "summary.json").read_text())
        last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
        return [
            {
                "exit_status": status,
                "seconds": time.perf_counter() - start,
                "last_epoch_images_per_second": last["images_per_second"],
                "last_epoch_data_wait": last["data_wait_share"],
                "accuracy": summary["accuracy"],
            }
        ]

    def _config(self, settings: Settings) -> Config:
        content = {"data": {"shards": str(self._shards), "val_fraction": 0, "normalize": "half", "verify": False}}
        settings = {name: value for name, value in settings.items() if name != IMAGE_CHANNELS}
        return replace_settings(validate(content, "the device check"), settings, "the device check")

    def _open(self, settings: Settings) -> TrainingData:
        gc.collect()
        if self._on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        with contextlib.ExitStack() as stack:
            if IMAGE_CHANNELS in settings:
                from benchmarks.training.device.image_channels import (
                    ImageChannelsTransform,
                )  # DALI may not be installed

                variant = mock.patch("pipeline.transforms.dali_backend.DaliTransform", ImageChannelsTransform)
                stack.enter_context(variant)
            return open_data(self._config(settings), self._world)

    def _make_training(self, settings: Settings) -> Training:
        torch.compiler.reset()
        data = self._open(settings)
        training = make_training(resolve_auto(self._config(settings), self._world.device), data, self._world)
        training.forward.train()
        return training

    def _synchronize(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()

    def _time(self, work: Callable[[], object]) -> tuple[float, float]:
        """Return the seconds until the device has done the work, and until the host has launched it."""
        self._synchronize()
        start = time.perf_counter()
        work()
        host = time.perf_counter() - start
        self._synchronize()
        return time.perf_counter() - start, host
