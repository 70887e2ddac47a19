"""Packing and measurement of one loader, called in its own process."""

from __future__ import annotations

import gc
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common.processes import cpu_seconds, reset_peak_memory
from benchmarks.loaders.baselines import import_loader
from benchmarks.loaders.baselines.base import Batch, Epochs, Indices, Source, Task
from benchmarks.loaders.verify import check_batch, check_no_repeats, reach, to_numpy

_MIN_BATCHES = 6  # per run


class Packer:
    """Packs the images in each file format of a loader.

    Args:
        name: Name of the loader.
        source: Directory of the images.
        directory: Output directory, with a subdirectory per file format.
        batch_size: Batch size of the benchmark.
    """

    def __init__(self, name: str, source: Path, directory: Path, batch_size: int) -> None:
        self._loader = import_loader(name)
        self._source = Source(source)
        self._directory = directory
        self._batch_size = batch_size

    def variants(self) -> tuple[Any, ...]:
        return self._loader.variants

    def pack(self, file_format: str) -> dict[str, Any]:
        """Pack the images and return the seconds and the bytes on disk."""
        _ = self._source.upright  # computed before the clock starts
        directory = self._directory / file_format
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        start = time.perf_counter()
        packed = self._loader.pack(self._source, file_format, directory, self._batch_size)
        seconds = time.perf_counter() - start
        files = [packed] if packed.is_file() else [path for path in packed.rglob("*") if path.is_file()]
        return {"seconds": seconds, "bytes": sum(path.stat().st_size for path in files)}


class LoaderWorker:
    """Measures a variant of a loader.

    Args:
        name: Name of the loader.
        variant: Name of its variant.
        source: Directory of the raw images, for verification.
        directory: Output directory of `Packer`.
        device: Device of the batches.
    """

    def __init__(self, name: str, variant: str, source: Path, directory: Path, device: torch.device) -> None:
        self._loader = import_loader(name)  # imports the library before any clock starts
        self._variant = next(one for one in self._loader.variants if one.name == variant)
        self._source = Source(source)
        self._directory = directory / self._variant.file_format
        self._epochs: Any = None
        torch.zeros(1, device=device)  # CUDA starts here, not in the first batch

    def ready(self) -> None:
        """Do nothing; the return tells the caller that the library is imported."""

    def start(self, task: Task) -> dict[str, Any]:
        """Open the loader and read the first batch; return the seconds, the reach and the error of the batch."""
        self._epochs = None
        gc.collect()  # frees the previous task and its workers
        reset_peak_memory()
        self._task = task
        start = time.perf_counter()
        self._epochs = self._loader.open(self._directory, self._variant.name, self._task)
        batches = self._epochs(0)
        images, indices = next(iter(batches))
        self._synchronize()
        seconds = time.perf_counter() - start
        error = check_batch(images, indices, self._variant, self._task, self._source)
        _close(batches)
        self._epoch = 1
        return {"first_batch_seconds": seconds, "reach": reach(indices, self._task.samples), "error": error}

    def run(self, seconds: float) -> dict[str, Any]:
        """Measure the throughput over at least `seconds`, after warm-up batches, and verify the last batch."""
        stream = BatchStream(self._epochs, self._epoch)
        try:
            for _ in range(2 + 2 * self._task.workers):
                next(stream)
            self._synchronize()
            images_done = batches = 0
            cpu = cpu_seconds(os.getpid())
            start = time.perf_counter()
            while True:
                images = indices = None  # free the batch before the loader allocates the next one
                images, indices = next(stream)
                images_done += len(indices)
                batches += 1
                if time.perf_counter() - start >= seconds and batches >= _MIN_BATCHES:
                    break
            self._synchronize()
            elapsed = time.perf_counter() - start
            cpu = cpu_seconds(os.getpid()) - cpu
            error = check_batch(images, indices, self._variant, self._task, self._source)
        finally:
            stream.close()
        self._epoch = stream.epoch + 1
        for epoch in stream.indices:
            check_no_repeats(np.concatenate([to_numpy(indices) for indices in epoch]))
        return {"images_per_second": images_done / elapsed, "cpu_seconds": cpu, "images": images_done, "error": error}

    def gpu_milliseconds(self, batches: int) -> float:
        """Return the GPU time per 1,000 images: the sum of all kernels and copies of the process, in ms."""
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile

        stream = BatchStream(self._epochs, self._epoch)
        try:
            next(stream)
            self._synchronize()
            with profile(activities=[ProfilerActivity.CUDA]) as profiler:
                images_done = sum(len(next(stream)[1]) for _ in range(batches))
                self._synchronize()
        finally:
            stream.close()
        self._epoch = stream.epoch + 1
        on_gpu = [event for event in profiler.key_averages() if event.device_type == DeviceType.CUDA]
        microseconds = sum(event.self_device_time_total for event in on_gpu if not event.is_user_annotation)
        return microseconds / images_done

    def _synchronize(self) -> None:
        if self._task.device.type == "cuda":
            torch.cuda.synchronize(self._task.device)


class BatchStream:
    """Batches of consecutive epochs, and the source indices of each.

    Args:
        epochs: Batches of an epoch by its number.
        first: Number of the first epoch.
    """

    def __init__(self, epochs: Epochs, first: int) -> None:
        self._epochs = epochs
        self.epoch = first
        """Number of the current epoch."""
        self.indices: list[list[Indices]] = []
        """Source indices by epoch and batch."""
        self._batches: Iterator[Batch] | None = None

    def __next__(self) -> Batch:
        while True:
            if self._batches is None:
                self._batches = iter(self._epochs(self.epoch))
                self.indices.append([])
            try:
                images, indices = next(self._batches)
            except StopIteration:
                if not self.indices[-1]:
                    raise RuntimeError("an epoch without a complete batch") from None
                self._batches = None
                self.epoch += 1
                continue
            # Copied, because a tensor of a worker keeps a file open, and one on the GPU the memory of its batch.
            if isinstance(indices, torch.Tensor) and indices.is_cuda:
                self.indices[-1].append(indices.clone())
            else:
                self.indices[-1].append(np.array(indices))
            return images, indices

    def close(self) -> None:
        _close(self._batches)
        self._batches = None


def _close(batches: Any) -> None:
    if hasattr(batches, "close"):
        batches.close()
