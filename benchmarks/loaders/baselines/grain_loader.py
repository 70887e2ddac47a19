"""Grain: ArrayRecord files, read by a `MapDataset` that is shuffled by a keyed permutation of the indices."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grain
import numpy as np
import torch
from array_record.python.array_record_module import ArrayRecordWriter
from numpy.typing import NDArray

from benchmarks.loaders.baselines.base import Batch, Epochs, Source, Task, Variant
from benchmarks.loaders.baselines.transforms import BatchTransform, from_bytes, pil_transform, to_bytes, to_pil


class DecodeImage(grain.transforms.Map):
    """Decode one record to model input and source index."""

    def __init__(self, task: Task) -> None:
        self._shape = task.image_shape
        self._transform = pil_transform(task)

    def map(self, record: bytes) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Convert a record of `to_bytes`."""
        pixels, index = from_bytes([record], self._shape)
        return self._transform(to_pil(pixels[0].numpy())).numpy(), index[0].numpy()


class Grain:
    """`MapDataset` with `shuffle`, `map` and `batch`, read by threads, or by processes if there are workers."""

    variants = (
        Variant(
            "documented",
            "array_record",
            "single records, torchvision transforms, batch, mp_prefetch",
            tolerance_levels=1.5,
            uses_workers=True,
        ),
        Variant(
            "best", "array_record", "batches of indices, __getitems__, F.interpolate on the batch", uses_workers=True
        ),
    )

    def pack(self, source: Source, file_format: str, directory: Path, batch_size: int) -> Path:
        # One record per group: the documentation recommends it for random access.
        writer = ArrayRecordWriter(str(directory / "images.array_record"), "group_size:1")
        for index, pixels in enumerate(source.upright):
            writer.write(to_bytes(index, pixels))
        writer.close()
        return directory

    def open(self, directory: Path, variant: str, task: Task) -> Epochs:
        return open_files([str(directory / "images.array_record")], variant, task)


def open_files(paths: list[str], variant: str, task: Task) -> Epochs:
    """Open ArrayRecord files; a path may be repeated."""
    source = grain.sources.ArrayRecordDataSource(paths)
    transform = BatchTransform(task)

    def read_batch(indices: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        pixels, source_indices = from_bytes(source.__getitems__(indices.tolist()), task.image_shape)
        return pixels.numpy(), source_indices.numpy()

    def stream(seed: int) -> Iterator[Any]:
        """Iterate over the batches of all epochs. Each epoch is shuffled anew."""
        if variant == "documented":
            batches = grain.MapDataset.source(source).shuffle(seed=seed).map(DecodeImage(task))
            batches = batches.batch(task.batch_size, drop_remainder=True)
            # The documentation recommends no threads for data in memory.
            options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        else:
            batches = grain.MapDataset.range(len(source)).shuffle(seed=seed)
            batches = batches.batch(task.batch_size, drop_remainder=True).map(read_batch)
            # By default it reads hundreds of batches ahead.
            options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
        loaded = batches.repeat().to_iter_dataset(options)
        if task.workers:
            loaded = loaded.mp_prefetch(grain.multiprocessing.MultiprocessingOptions(num_workers=task.workers))
        return iter(loaded)

    # Processes take seconds to start, so they continue between epochs, as with `persistent_workers` of torch.
    kept = enumerate(stream(task.seed), start=1) if task.workers else None
    batches_per_epoch = len(source) // task.batch_size

    def epoch(number: int) -> Iterator[Batch]:
        for count, (images, indices) in kept or enumerate(stream(task.seed + number), start=1):
            pixels = torch.from_numpy(images)
            yield pixels.to(task.device) if variant == "documented" else transform(pixels), indices
            if count % batches_per_epoch == 0:
                return

    return epoch


LOADERS = {"grain": Grain()}
