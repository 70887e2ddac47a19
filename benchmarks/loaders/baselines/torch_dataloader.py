"""torch's `DataLoader` over an array in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from benchmarks.loaders.baselines.base import Batch, Epochs, Source, Task, Variant
from benchmarks.loaders.baselines.transforms import (
    BatchTransform,
    apply_transform,
    loader_options,
    move_to_device,
    pil_transform,
    tensor_transform,
)

T = TypeVar("T")


class PilDataset(Dataset):
    """PIL images through a transform, like torchvision's MNIST."""

    def __init__(self, pixels: NDArray[np.uint8], transform: Callable) -> None:
        self._pixels = pixels.squeeze(3) if pixels.shape[3] == 1 else pixels
        self._transform = transform

    def __len__(self) -> int:
        return len(self._pixels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self._transform(Image.fromarray(self._pixels[index])), index


class TensorDataset(Dataset):
    """Tensors uint8 [C, H, W] through a transform."""

    def __init__(self, pixels: NDArray[np.uint8], transform: Callable) -> None:
        self._pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
        self._transform = transform

    def __len__(self) -> int:
        return len(self._pixels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self._transform(self._pixels[index]), index


class BatchDataset(Dataset):
    """Complete batches through `__getitems__`, which `DataLoader` calls if it exists."""

    def __init__(self, pixels: NDArray[np.uint8]) -> None:
        self._pixels = torch.from_numpy(pixels)

    def __len__(self) -> int:
        return len(self._pixels)

    def __getitems__(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = torch.tensor(indices)
        return self._pixels[chosen], chosen


def keep_batch(batch: T) -> T:
    """Collate function of complete batches."""
    return batch


class TorchDataLoader:
    """`DataLoader` with shuffle=True."""

    variants = (
        Variant(
            "documented",
            "array",
            "single PIL images, torchvision transforms",
            tolerance_levels=1.5,
            uses_workers=True,
        ),
        Variant("best", "array", "single tensors, torchvision v2 transforms", uses_workers=True),
        Variant("batched", "array", "__getitems__ and F.interpolate on the batch", uses_workers=True),
    )

    def pack(self, source: Source, file_format: str, directory: Path, batch_size: int) -> Path:
        np.save(directory / "pixels.npy", source.upright)
        np.save(directory / "labels.npy", source.labels)
        return directory

    def open(self, directory: Path, variant: str, task: Task) -> Epochs:
        pixels = np.load(directory / "pixels.npy")
        if variant == "documented":
            dataset: Dataset = PilDataset(pixels, pil_transform(task))
        elif variant == "best":
            dataset = TensorDataset(pixels, tensor_transform(task))
        else:
            dataset = BatchDataset(pixels)
        random = torch.Generator()
        loader = DataLoader(
            dataset,
            shuffle=True,
            collate_fn=keep_batch if variant == "batched" else None,
            generator=random,
            **loader_options(task),
        )
        transform = BatchTransform(task)

        def epoch(number: int) -> Iterator[Batch]:
            random.manual_seed(task.seed + number)
            return apply_transform(loader, transform) if variant == "batched" else move_to_device(loader, task)

        return epoch


LOADERS = {"torch-dataloader": TorchDataLoader()}
