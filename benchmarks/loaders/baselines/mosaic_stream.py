"""MosaicML Streaming: MDS shards, read by StreamingDataset through torch's DataLoader."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from streaming import MDSWriter, StreamingDataset
from torch.utils.data import DataLoader

from benchmarks.loaders.baselines.peer import Epochs, Source, Task, Variant
from benchmarks.loaders.baselines.transforms import BatchTransform, on_device, picture_transform, transformed

_ROW_BYTES = 8
_COLUMNS = {"pictures": {"image": "png", "class": "int"}, "bytes": {"sample": "bytes"}}


class Pictures(StreamingDataset):
    """Samples with a picture, through a transform of pictures."""

    def __init__(self, *, picture: object, **settings: object) -> None:
        super().__init__(**settings)
        self._picture = picture

    def __getitem__(self, index: object) -> tuple[torch.Tensor, int]:
        sample = super().__getitem__(index)
        return self._picture(sample["image"]), sample["class"]


def joined(samples: Sequence[dict[str, bytes]], shape: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples of pixels and row in one string of bytes to tensors uint8 [B, H, W, C] and int64 [B]."""
    table = np.frombuffer(bytearray().join(sample["sample"] for sample in samples), np.uint8).reshape(len(samples), -1)
    rows = np.ascontiguousarray(table[:, -_ROW_BYTES:]).view("<i8")[:, 0]
    return torch.from_numpy(table[:, :-_ROW_BYTES].reshape(-1, *shape)), torch.from_numpy(rows)


class MosaicStreaming:
    variants = (
        Variant(
            "documented",
            "pictures",
            "PNG samples, shuffle=True (py1e), torchvision transforms image by image",
            levels=1.5,
            processes=True,
        ),
        Variant("best", "bytes", "samples of bytes, shuffle=True (py1e), F.interpolate on the batch", processes=True),
    )

    def pack(self, source: Source, form: str, directory: Path, batch_size: int) -> Path:
        with MDSWriter(out=str(directory / "mds"), columns=_COLUMNS[form]) as writer:
            for row, pixels in enumerate(source.upright):
                if form == "bytes":
                    writer.write({"sample": pixels.tobytes() + row.to_bytes(_ROW_BYTES, "little")})
                else:
                    picture = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
                    writer.write({"image": picture, "class": row})
        return directory / "mds"

    def open(self, directory: Path, variant: str, task: Task) -> Epochs:
        settings = {
            "local": str(directory / "mds"),
            "shuffle": True,
            "shuffle_seed": task.seed,
            "batch_size": task.batch_size,
        }
        documented = variant == "documented"
        dataset = Pictures(picture=picture_transform(task), **settings) if documented else StreamingDataset(**settings)
        loader = DataLoader(
            dataset,
            batch_size=task.batch_size,
            num_workers=task.workers,
            drop_last=True,
            persistent_workers=task.workers > 0,
            pin_memory=task.device.type == "cuda",
            collate_fn=None if documented else partial(joined, shape=task.image_shape),
        )
        transform = BatchTransform(task)

        def epoch(number: int):
            return on_device(loader, task) if documented else transformed(loader, transform)

        return epoch


PEERS = {"mosaicml-streaming": MosaicStreaming()}
