"""MosaicML Streaming: MDS shards, read by `StreamingDataset` through torch's `DataLoader`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from streaming import MDSWriter, StreamingDataset
from torch.utils.data import DataLoader

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

_COLUMNS = {"png": {"image": "png", "class": "int"}, "bytes": {"sample": "bytes"}}


class PilDataset(StreamingDataset):
    """Samples with a PIL image, through a transform."""

    def __init__(self, *, transform: Callable, **options: object) -> None:
        super().__init__(**options)
        self._transform_image = transform

    def __getitem__(self, index: object) -> tuple[torch.Tensor, int]:
        sample = super().__getitem__(index)
        return self._transform_image(sample["image"]), sample["class"]


def collate_bytes(
    samples: Sequence[dict[str, bytes]], shape: tuple[int, int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode samples of bytes to images uint8 [B, H, W, C] and source indices int64 [B]."""
    return from_bytes([sample["sample"] for sample in samples], shape)


class MosaicStreaming:
    """`StreamingDataset` with shuffle=True."""

    variants = (
        Variant(
            "documented",
            "png",
            "PNG samples, shuffle=True (py1e), torchvision transforms image by image",
            tolerance_levels=1.5,
            uses_workers=True,
        ),
        Variant("best", "bytes", "byte samples, shuffle=True (py1e), F.interpolate on the batch", uses_workers=True),
    )

    def pack(self, source: Source, file_format: str, directory: Path, batch_size: int) -> Path:
        with MDSWriter(out=str(directory / "mds"), columns=_COLUMNS[file_format]) as writer:
            for index, pixels in enumerate(source.upright):
                if file_format == "bytes":
                    writer.write({"sample": to_bytes(index, pixels)})
                else:
                    writer.write({"image": to_pil(pixels), "class": index})
        return directory / "mds"

    def open(self, directory: Path, variant: str, task: Task) -> Epochs:
        options = {
            "local": str(directory / "mds"),
            "shuffle": True,
            "shuffle_seed": task.seed,
            "batch_size": task.batch_size,
        }
        documented = variant == "documented"
        dataset = PilDataset(transform=pil_transform(task), **options) if documented else StreamingDataset(**options)
        loader = DataLoader(
            dataset,
            collate_fn=None if documented else partial(collate_bytes, shape=task.image_shape),
            **loader_options(task),
        )
        transform = BatchTransform(task)

        def epoch(number: int) -> Iterator[Batch]:
            return move_to_device(loader, task) if documented else apply_transform(loader, transform)

        return epoch


LOADERS = {"mosaicml-streaming": MosaicStreaming()}
