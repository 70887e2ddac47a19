"""LitData: chunks of serialized samples, read by `StreamingDataset` and `StreamingDataLoader`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import litdata
import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.loaders.baselines.base import Batch, Epochs, Source, Task, Variant
from benchmarks.loaders.baselines.transforms import (
    BatchTransform,
    apply_transform,
    from_bytes,
    loader_options,
    move_to_device,
    pil_transform,
    to_bytes,
    to_pil,
)


def pil_sample(index: int, pixels: NDArray[np.uint8]) -> dict:
    """Make a sample as in the documentation, a PIL image and its class."""
    return {"image": to_pil(pixels[index]), "class": index}


def bytes_sample(index: int, pixels: NDArray[np.uint8]) -> bytes:
    """Make the smallest sample."""
    return to_bytes(index, pixels[index])


class PilDataset(litdata.StreamingDataset):
    """Samples with a PIL image, through a transform."""

    def __init__(self, *arguments: object, transform: Callable, **options: object) -> None:
        super().__init__(*arguments, **options)
        self._transform_image = transform

    def __getitem__(self, index: object) -> tuple[torch.Tensor, int]:
        sample = super().__getitem__(index)
        return self._transform_image(sample["image"]), sample["class"]


class LitData:
    """`StreamingDataset` with shuffle=True."""

    variants = (
        Variant(
            "documented",
            "png",
            "PIL samples, chunks of 64 MB, shuffle=True, torchvision transforms image by image",
            tolerance_levels=1.5,
            uses_workers=True,
        ),
        Variant(
            "best",
            "bytes",
            "byte samples, decoded and shuffled by complete chunks, F.interpolate on the batch",
            uses_workers=True,
        ),
    )

    def pack(self, source: Source, file_format: str, directory: Path, batch_size: int) -> Path:
        sample = pil_sample if file_format == "png" else bytes_sample
        litdata.optimize(
            partial(sample, pixels=source.upright),
            inputs=list(range(len(source))),
            output_dir=str(directory / "chunks"),
            chunk_bytes="64MB",
            num_workers=1,
            start_method="fork",
            verbose=False,
        )
        return directory / "chunks"

    def open(self, directory: Path, variant: str, task: Task) -> Epochs:
        chunks = str(directory / "chunks")
        options = {"shuffle": True, "drop_last": False, "seed": task.seed}
        if variant == "documented":
            dataset: litdata.StreamingDataset = PilDataset(chunks, transform=pil_transform(task), **options)
        else:
            dataset = litdata.StreamingDataset(chunks, item_shuffle_window=0, batch_decode="all", **options)
        loader = litdata.StreamingDataLoader(
            dataset,
            collate_fn=None if variant == "documented" else partial(from_bytes, shape=task.image_shape),
            **loader_options(task),
        )
        transform = BatchTransform(task)

        def epoch(number: int) -> Iterator[Batch]:
            return move_to_device(loader, task) if variant == "documented" else apply_transform(loader, transform)

        return epoch


LOADERS = {"litdata": LitData()}
