"""LitData: chunks of serialised samples, read by StreamingDataset and StreamingDataLoader."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import litdata
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from benchmarks.loaders.baselines.peer import Epochs, Source, Task, Variant
from benchmarks.loaders.baselines.transforms import BatchTransform, on_device, picture_transform, transformed

_ROW_BYTES = 8


def picture_sample(row: int, pixels: NDArray[np.uint8]) -> dict:
    """A sample as the documentation shows it: a picture and its class."""
    image = pixels[row]
    return {"image": Image.fromarray(image[..., 0] if image.shape[2] == 1 else image), "class": row}


def bytes_sample(row: int, pixels: NDArray[np.uint8]) -> bytes:
    """The leanest sample: pixels and row in one string of bytes."""
    return pixels[row].tobytes() + row.to_bytes(_ROW_BYTES, "little")


class Pictures(litdata.StreamingDataset):
    """Samples with a picture, through a transform of pictures."""

    def __init__(self, *arguments: object, picture: object, **settings: object) -> None:
        super().__init__(*arguments, **settings)
        self._picture = picture

    def __getitem__(self, index: object) -> tuple[torch.Tensor, int]:
        sample = super().__getitem__(index)
        return self._picture(sample["image"]), sample["class"]


def joined(samples: Sequence[bytes], shape: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples of `bytes_sample` to tensors uint8 [B, H, W, C] and int64 [B]."""
    table = np.frombuffer(bytearray().join(samples), np.uint8).reshape(len(samples), -1)
    rows = np.ascontiguousarray(table[:, -_ROW_BYTES:]).view("<i8")[:, 0]
    return torch.from_numpy(table[:, :-_ROW_BYTES].reshape(-1, *shape)), torch.from_numpy(rows)


class LitData:
    variants = (
        Variant(
            "documented",
            "pictures",
            "PIL samples, chunks of 64 MB, shuffle=True, torchvision transforms image by image",
            levels=1.5,
            processes=True,
        ),
        Variant(
            "best",
            "bytes",
            "samples of bytes, decoded and shuffled a whole chunk at a time, F.interpolate on the batch",
            processes=True,
        ),
    )

    def pack(self, source: Source, form: str, directory: Path, batch_size: int) -> Path:
        sample = picture_sample if form == "pictures" else bytes_sample
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
        place = str(directory / "chunks")
        settings = {"shuffle": True, "drop_last": False, "seed": task.seed}
        if variant == "documented":
            dataset: litdata.StreamingDataset = Pictures(place, picture=picture_transform(task), **settings)
        else:
            dataset = litdata.StreamingDataset(place, item_shuffle_window=0, batch_decode="all", **settings)
        loader = litdata.StreamingDataLoader(
            dataset,
            batch_size=task.batch_size,
            num_workers=task.workers,
            drop_last=True,
            persistent_workers=task.workers > 0,
            pin_memory=task.device.type == "cuda",
            collate_fn=None if variant == "documented" else partial(joined, shape=task.image_shape),
        )
        transform = BatchTransform(task)

        def epoch(number: int):
            return on_device(loader, task) if variant == "documented" else transformed(loader, transform)

        return epoch


PEERS = {"litdata": LitData()}
