"""One loader, measured: it lives in a process of its own, which runs it when asked."""

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

from benchmarks.common.processes import cpu_seconds, forget_peak_memory
from benchmarks.loaders.baselines import load
from benchmarks.loaders.baselines.peer import Batch, Rows, Source, Task
from benchmarks.loaders.verify import check, check_no_repeats, reach

_LEAST_BATCHES = 6  # of a run, however slow the loader


class Packer:
    """Packs the images in every form that a loader reads. source, directory: of the images and for the forms."""

    def __init__(self, name: str, source: Path, directory: Path, batch_size: int) -> None:
        self._peer = load(name)
        self._source = Source(source)
        self._directory = directory
        self._batch_size = batch_size

    def variants(self) -> tuple[Any, ...]:
        return self._peer.variants

    def pack(self, form: str) -> dict[str, Any]:
        """Seconds that packing took and bytes that lie at rest. The upright images are made beforehand."""
        _ = self._source.upright
        place = self._directory / form
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        start = time.perf_counter()
        packed = self._peer.pack(self._source, form, place, self._batch_size)
        seconds = time.perf_counter() - start
        files = [packed] if packed.is_file() else [path for path in packed.rglob("*") if path.is_file()]
        return {"seconds": seconds, "bytes": sum(path.stat().st_size for path in files)}


class MeasuredLoader:
    """A loader's variant, for one task after another.

    directory: with the form that the variant reads, as `Packer` wrote it.
    """

    def __init__(self, name: str, variant: str, source: Path, directory: Path, device: torch.device) -> None:
        self._peer = load(name)  # imports the library, before any clock runs
        self._variant = next(known for known in self._peer.variants if known.name == variant)
        self._source = Source(source)
        self._directory = directory / self._variant.form
        self._epochs: Any = None
        torch.zeros(1, device=device)  # CUDA starts here, not in the first batch

    def ready(self) -> None:
        """Nothing: whoever asks knows by the answer that the process is there and has imported its library."""

    def start(self, task: Task) -> dict[str, Any]:
        """Open the store and take the first batch: how long that takes, and how far the batch reaches."""
        self._epochs = None
        gc.collect()  # what the task before has left, workers among it
        forget_peak_memory()
        self._task = task
        start = time.perf_counter()
        self._epochs = self._peer.open(self._directory, self._variant.name, self._task)
        batches = self._epochs(0)
        images, rows = next(iter(batches))
        self._synchronise()
        seconds = time.perf_counter() - start
        error = check(images, rows, self._variant, self._task, self._source)
        _close(batches)
        self._epoch = 1
        return {"first_batch_seconds": seconds, "reach": reach(rows, self._task.samples), "error": error}

    def run(self, seconds: float) -> dict[str, Any]:
        """Throughput over at least so many seconds, after batches that warm it up; the last batch is checked."""
        stream = Stream(self._epochs, self._epoch)
        try:
            for _ in range(2 + 2 * self._task.workers):
                next(stream)
            self._synchronise()
            images_done = batches = 0
            cpu = cpu_seconds(os.getpid())
            start = time.perf_counter()
            while True:
                images = rows = None  # let go of first, so that its memory may be the next one's
                images, rows = next(stream)
                images_done += len(rows)
                batches += 1
                if time.perf_counter() - start >= seconds and batches >= _LEAST_BATCHES:
                    break
            self._synchronise()
            elapsed = time.perf_counter() - start
            cpu = cpu_seconds(os.getpid()) - cpu
            error = check(images, rows, self._variant, self._task, self._source)
        finally:
            stream.close()
        self._epoch = stream.epoch + 1
        for rows_of_epoch in stream.rows:
            check_no_repeats(np.concatenate([_to_numpy(rows) for rows in rows_of_epoch]))
        return {"images_per_second": images_done / elapsed, "cpu_seconds": cpu, "images": images_done, "error": error}

    def gpu_milliseconds(self, batches: int) -> float:
        """Time on the GPU for a thousand images: kernels and copies of the whole process, added up."""
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile

        stream = Stream(self._epochs, self._epoch)
        try:
            next(stream)
            self._synchronise()
            with profile(activities=[ProfilerActivity.CUDA]) as profiler:
                images_done = sum(len(next(stream)[1]) for _ in range(batches))
                self._synchronise()
        finally:
            stream.close()
        self._epoch = stream.epoch + 1
        on_gpu = [event for event in profiler.key_averages() if event.device_type == DeviceType.CUDA]
        microseconds = sum(event.self_device_time_total for event in on_gpu if not event.is_user_annotation)
        return microseconds / images_done

    def _synchronise(self) -> None:
        if self._task.device.type == "cuda":
            torch.cuda.synchronize(self._task.device)


class Stream:
    """Batches of one epoch after another, and the rows that each of them gave.

    epoch: the number of the present one. rows: for each epoch so far a list with the rows of each batch.
    """

    def __init__(self, epochs: Any, first: int) -> None:
        self._epochs = epochs
        self.epoch = first
        self.rows: list[list[Rows]] = []
        self._batches: Iterator[Batch] | None = None

    def __next__(self) -> Batch:
        while True:
            if self._batches is None:
                self._batches = iter(self._epochs(self.epoch))
                self.rows.append([])
            try:
                images, rows = next(self._batches)
            except StopIteration:
                if not self.rows[-1]:
                    raise RuntimeError("an epoch without a whole batch") from None
                self._batches = None
                self.epoch += 1
                continue
            # Copied, as a tensor out of a worker holds a file open until it is gone.
            self.rows[-1].append(rows if isinstance(rows, torch.Tensor) and rows.is_cuda else np.array(rows))
            return images, rows

    def close(self) -> None:
        _close(self._batches)
        self._batches = None


def _close(batches: Any) -> None:
    if hasattr(batches, "close"):
        batches.close()


def _to_numpy(rows: Rows) -> np.ndarray:
    return np.asarray(rows.cpu() if isinstance(rows, torch.Tensor) else rows)
