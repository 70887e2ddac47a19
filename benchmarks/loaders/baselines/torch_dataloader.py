"""torch's DataLoader over an array in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from benchmarks.loaders.baselines.peer import Batch, Epochs, Source, Task, Variant
from benchmarks.loaders.baselines.transforms import (
    BatchTransform,
    on_device,
    picture_transform,
    tensor_transform,
    transformed,
)


class Pictures(Dataset):
    """An array as torchvision's own MNIST serves it: a PIL image at a time, through a transform."""

    def __init__(self, pixels: NDArray[np.uint8], transform: Callable) -> None:
        self._pixels = pixels.squeeze(3) if pixels.shape[3] == 1 else pixels
        self._transform = transform

    def __len__(self) -> int:
        return len(self._pixels)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        return self._transform(Image.fromarray(self._pixels[row])), row


class Tensors(Dataset):
    """A tensor at a time, uint8 [C, H, W], through a transform."""

    def __init__(self, pixels: NDArray[np.uint8], transform: Callable) -> None:
        self._pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
        self._transform = transform

    def __len__(self) -> int:
        return len(self._pixels)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        return self._transform(self._pixels[row]), row


class Batches(Dataset):
    """Whole batches, through `__getitems__`, which DataLoader calls where a data set has it."""

    def __init__(self, pixels: NDArray[np.uint8]) -> None:
        self._pixels = torch.from_numpy(pixels)

    def __len__(self) -> int:
        return len(self._pixels)

    def __getitems__(self, rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = torch.tensor(rows)
        return self._pixels[chosen], chosen


def as_it_is(batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The collate function of whole batches."""
    return batch


class TorchDataLoader:
    variants = (
        Variant("documented", "array", "PIL image by image, torchvision transforms", levels=1.5, processes=True),
        Variant("best", "array", "tensor by tensor, torchvision v2 transforms", processes=True),
        Variant("batched", "array", "__getitems__ and F.interpolate on the batch", processes=True),
    )

    def pack(self, source: Source, form: str, directory: Path, batch_size: int) -> Path:
        np.save(directory / "pixels.npy", source.upright)
        np.save(directory / "labels.npy", source.labels)
        return directory

    def open(self, directory: Path, variant: str, task: Task) -> Epochs:
        pixels = np.load(directory / "pixels.npy")
        if variant == "documented":
            dataset: Dataset = Pictures(pixels, picture_transform(task))
        elif variant == "best":
            dataset = Tensors(pixels, tensor_transform(task))
        else:
            dataset = Batches(pixels)
        random = torch.Generator()
        loader = DataLoader(
            dataset,
            task.batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=task.workers,
            persistent_workers=task.workers > 0,
            pin_memory=task.device.type == "cuda",
            collate_fn=as_it_is if variant == "batched" else None,
            generator=random,
        )
        transform = BatchTransform(task)

        def epoch(number: int) -> Iterator[Batch]:
            random.manual_seed(task.seed + number)
            return transformed(loader, transform) if variant == "batched" else on_device(loader, task)

        return epoch


PEERS = {"torch-dataloader": TorchDataLoader()}
