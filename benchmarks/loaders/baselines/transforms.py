"""Raw images to model input as a user of torch and torchvision writes it, a batch at a time or an image at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torchvision.transforms import v2

from benchmarks.loaders.baselines.peer import Batch, Rows, Task


class BatchTransform(torch.nn.Module):
    """uint8 [B, H, W, C] to model input on the task's device, with torch's own resize.

    Normalised first, which gives the same numbers with fewer pixels to touch.
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


def transformed(batches: Iterable[tuple[torch.Tensor, Rows]], transform: BatchTransform) -> Iterator[Batch]:
    """Model input from a loader of raw batches uint8 [B, H, W, C]."""
    for pixels, rows in batches:
        yield transform(pixels), rows


def on_device(batches: Iterable[tuple[torch.Tensor, Rows]], task: Task) -> Iterator[Batch]:
    """Batches of a loader that makes model input on the CPU, moved to the task's device."""
    for images, rows in batches:
        yield images.to(task.device, non_blocking=True), rows


def picture_transform(task: Task) -> Callable:
    """A PIL image to model input [C, R, R], as the documentation of torchvision shows it; rounds to levels of grey."""
    return v2.Compose(
        [
            v2.Resize((task.resolution, task.resolution)),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(task.mean, task.std),
        ]
    )


def tensor_transform(task: Task) -> Callable:
    """A tensor uint8 [C, H, W] to model input [C, R, R]: torchvision's faster form, without PIL."""
    return v2.Compose(
        [
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(task.mean, task.std),
            v2.Resize((task.resolution, task.resolution), antialias=False),
        ]
    )
