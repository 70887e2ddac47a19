"""Conversion of raw images to model input with torch and torchvision, and sample encodings of several loaders."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms import v2

from benchmarks.loaders.baselines.base import Batch, Indices, Task

_INDEX_BYTES = 8


class BatchTransform(torch.nn.Module):
    """Convert uint8 [B, H, W, C] to model input on the device of the task with `F.interpolate`.

    Normalization comes first: the result is the same, and there are fewer pixels before the resize.
    """

    def __init__(self, task: Task) -> None:
        super().__init__()
        self._device = task.device
        self._size = (task.resolution, task.resolution)
        self._offset = 255 * torch.tensor(task.mean, device=task.device).view(-1, 1, 1)
        self._scale = 1 / (255 * torch.tensor(task.std, device=task.device)).view(-1, 1, 1)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        planes = pixels.to(self._device, non_blocking=True).permute(0, 3, 1, 2)
        planes = planes.to(torch.float32, memory_format=torch.contiguous_format)
        planes.sub_(self._offset).mul_(self._scale)
        if planes.shape[2:] == self._size:
            return planes
        return F.interpolate(planes, size=self._size, mode="bilinear", align_corners=False)


def apply_transform(batches: Iterable[tuple[torch.Tensor, Indices]], transform: BatchTransform) -> Iterator[Batch]:
    """Convert the batches of a loader of raw images uint8 [B, H, W, C]."""
    for pixels, indices in batches:
        yield transform(pixels), indices


def move_to_device(batches: Iterable[tuple[torch.Tensor, Indices]], task: Task) -> Iterator[Batch]:
    """Move the batches of a loader that makes model input on the CPU to the device of the task."""
    for images, indices in batches:
        yield images.to(task.device, non_blocking=True), indices


def loader_options(task: Task) -> dict[str, Any]:
    """Return the options of all loaders that are torch's `DataLoader` or a subclass of it."""
    return {
        "batch_size": task.batch_size,
        "drop_last": True,
        "num_workers": task.workers,
        "persistent_workers": task.workers > 0,
        "pin_memory": task.device.type == "cuda",
    }


def pil_transform(task: Task) -> Callable:
    """Return the documented torchvision transform of a PIL image to [C, R, R]; it rounds to integer gray levels."""
    return v2.Compose(
        [
            v2.Resize((task.resolution, task.resolution)),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(task.mean, task.std),
        ]
    )


def tensor_transform(task: Task) -> Callable:
    """Return the faster torchvision transform of a tensor uint8 [C, H, W] to [C, R, R], without PIL."""
    return v2.Compose(
        [
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(task.mean, task.std),
            v2.Resize((task.resolution, task.resolution), antialias=False),
        ]
    )


def to_pil(pixels: NDArray[np.uint8]) -> Image.Image:
    """Convert an image uint8 [H, W, C] to PIL."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def to_bytes(index: int, pixels: NDArray[np.uint8]) -> bytes:
    """Encode an image and its source index as one byte string, the smallest sample."""
    return pixels.tobytes() + index.to_bytes(_INDEX_BYTES, "little")


def from_bytes(samples: Sequence[bytes], shape: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode samples of `to_bytes` to images uint8 [B, H, W, C] and source indices int64 [B]."""
    encoded = np.frombuffer(bytearray().join(samples), np.uint8).reshape(len(samples), -1)
    indices = np.ascontiguousarray(encoded[:, -_INDEX_BYTES:]).view("<i8")[:, 0]
    return torch.from_numpy(encoded[:, :-_INDEX_BYTES].reshape(-1, *shape)), torch.from_numpy(indices)
