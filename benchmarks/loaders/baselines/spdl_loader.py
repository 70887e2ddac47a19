"""SPDL: stages of a pipeline that run in threads, over an array in memory (it has no file format)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from spdl.dataloader import DataLoader
from spdl.source import DistributedRandomSampler
from torch.utils.data import BatchSampler, default_collate

from benchmarks.loaders.baselines.base import Batch, Epochs, Source, Task, Variant
from benchmarks.loaders.baselines.transforms import BatchTransform, pil_transform, to_pil


class Spdl:
    """`DataLoader` of SPDL; the number of workers is that of its threads."""

    variants = (
        Variant(
            "documented",
            "array",
            "single PIL images, torchvision transforms in threads",
            tolerance_levels=1.5,
            uses_workers=True,
        ),
        Variant("best", "array", "complete batches and F.interpolate in threads", uses_workers=True),
    )

    def pack(self, source: Source, file_format: str, directory: Path, batch_size: int) -> Path:
        np.save(directory / "pixels.npy", source.upright)
        return directory

    def open(self, directory: Path, variant: str, task: Task) -> Epochs:
        return open_array(np.load(directory / "pixels.npy"), variant, task)


def open_array(pixels: NDArray[np.uint8], variant: str, task: Task) -> Epochs:
    """Open an array uint8 [N, H, W, C], which may be memory-mapped."""
    sampler = DistributedRandomSampler(len(pixels), rank=0, world_size=1)
    transform, transform_one = BatchTransform(task), pil_transform(task)
    threads = max(1, task.workers)

    def load_image(index: int) -> tuple[torch.Tensor, int]:
        return transform_one(to_pil(pixels[index])), int(index)

    def load_batch(indices: list[int]) -> Batch:
        return transform(torch.from_numpy(pixels[indices])), np.asarray(indices)

    def epoch(number: int) -> Iterator[Batch]:
        sampler.shuffle(seed=task.seed + number)
        if variant == "documented":
            loader = DataLoader(
                sampler,
                preprocessor=load_image,
                batch_size=task.batch_size,
                drop_last=True,
                aggregator=default_collate,
                num_threads=threads,
            )
        else:
            batches = BatchSampler(sampler, task.batch_size, drop_last=True)
            loader = DataLoader(batches, preprocessor=load_batch, num_threads=threads)
        for images, indices in loader:
            yield images.to(task.device), indices

    return epoch


LOADERS = {"spdl": Spdl()}
