"""References without a loader: all images are one array in memory, and each batch is made on request.

`floor` is the minimal work for the model input: two small matrix products, A X A^T, with the normalization folded into
A. `plain-torch` is straightforward torch code. Both use all cores, and no data passes between processes or threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.loaders.baselines.base import Batch, Epochs, Source, Task, Variant
from benchmarks.loaders.baselines.transforms import BatchTransform
from pipeline.transforms.ops.resize import resize_weights


class InMemory:
    """Batches of a random permutation of an array in main memory, or in GPU memory if the task runs there."""

    def __init__(self, variants: dict[Variant, Callable[[Task], Callable[[torch.Tensor], torch.Tensor]]]) -> None:
        self.variants = tuple(variants)
        self._make = {variant.name: make for variant, make in variants.items()}

    def pack(self, source: Source, file_format: str, directory: Path, batch_size: int) -> Path:
        np.save(directory / "pixels.npy", source.upright)
        np.save(directory / "labels.npy", source.labels)
        return directory

    def open(self, directory: Path, variant: str, task: Task) -> Epochs:
        pixels = torch.from_numpy(np.load(directory / "pixels.npy")).to(task.device)
        make = self._make[variant](task)

        def epoch(number: int) -> Iterator[Batch]:
            random = torch.Generator().manual_seed(task.seed + number)
            order = torch.randperm(task.samples, generator=random)
            buffer = pixels.new_empty((task.batch_size, *task.image_shape))
            for start in range(0, task.samples - task.batch_size + 1, task.batch_size):
                indices = order[start : start + task.batch_size]
                torch.index_select(pixels, 0, indices.to(task.device), out=buffer)
                yield make(buffer), indices

        return epoch


class MatrixResize:
    """Convert uint8 [B, H, W, C] to model input: (A / (255 std)) (X - 255 mean) A^T.

    Args:
        task: Shapes, mean and std.
        reuse: Whether to write every batch to the same memory, which is impossible if batches outlive the next one.
    """

    def __init__(self, task: Task, reuse: bool) -> None:
        height, width, channels = task.image_shape
        side = task.resolution
        scale = 1 / (255 * torch.tensor(task.std, dtype=torch.float64))
        vertical = torch.from_numpy(resize_weights(height, side, "linear"))
        horizontal = torch.from_numpy(resize_weights(width, side, "linear"))
        self._vertical = (scale[:, None, None] * vertical).float().to(task.device)  # [C, R, H]
        self._horizontal = horizontal.T.contiguous().float().to(task.device)  # [W, R]
        self._offset = 255 * torch.tensor(task.mean, device=task.device).view(-1, 1, 1)
        self._scale = scale.float().view(-1, 1, 1).to(task.device)
        self._resizes = not height == width == side
        self._reuse = reuse

        def empty(*shape: int) -> torch.Tensor:
            return torch.empty((task.batch_size, channels, *shape), device=task.device)

        self._pixels, self._wide, self._images = empty(height, width), empty(height, side), empty(side, side)

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        planes = pixels.permute(0, 3, 1, 2)
        if self._reuse:
            planes = self._pixels.copy_(planes)
        else:
            planes = planes.to(torch.float32, memory_format=torch.contiguous_format)
        planes.sub_(self._offset)
        if not self._resizes:
            return planes.mul_(self._scale)
        # X A^T is one large product over all images; the product with A is batched.
        wide = torch.matmul(planes, self._horizontal, out=self._wide if self._reuse else None)
        return torch.matmul(self._vertical, wide, out=self._images if self._reuse else None)


class ReusedBatchTransform(torch.nn.Module):
    """`BatchTransform` that reuses the memory of the float pixels; `F.interpolate` has no output argument."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        height, width, channels = task.image_shape
        self._pixels = torch.empty((task.batch_size, channels, height, width), device=task.device)
        self._offset = 255 * torch.tensor(task.mean, device=task.device).view(-1, 1, 1)
        self._scale = 1 / (255 * torch.tensor(task.std, device=task.device)).view(-1, 1, 1)
        self._size = (task.resolution, task.resolution)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        planes = self._pixels.copy_(pixels.permute(0, 3, 1, 2)).sub_(self._offset).mul_(self._scale)
        if planes.shape[2:] == self._size:
            return planes
        return F.interpolate(planes, size=self._size, mode="bilinear", align_corners=False)


LOADERS = {
    "plain-torch": InMemory(
        {
            Variant("documented", "array", "index, float, normalize, F.interpolate on the batch"): BatchTransform,
            Variant("best", "array", "the same, reusing the memory of the small batch"): ReusedBatchTransform,
        }
    ),
    "floor": InMemory(
        {
            Variant("best", "array", "A X A^T, every batch in the same memory"): lambda task: MatrixResize(task, True),
            Variant("fresh", "array", "A X A^T, new memory for every batch"): lambda task: MatrixResize(task, False),
        }
    ),
}
