"""Interface of a compared loader, and its input."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

Indices = torch.Tensor | NDArray[np.int64]
Batch = tuple[torch.Tensor, Indices]
"""Model input float32 [B, C, R, R] (upright, resized, (x / 255 - mean) / std) on the device of the task, and the source
indices int64 [B]. A batch is valid until the next one is requested."""

Epochs = Callable[[int], Iterable[Batch]]
"""Batches of an epoch by its number, without incomplete ones. Closing the iterator ends its workers."""


class Source:
    """Images that every loader packs, in the order of the raw files, as NumPy arrays in a directory.

    Attributes:
        pixels: uint8 [N, H, W, C] as stored, memory-mapped.
        labels: int64 [N].
        transposed: Whether rows and columns of the pixels are exchanged.
        classes: Number of classes.
    """

    def __init__(self, directory: Path) -> None:
        self.pixels: NDArray[np.uint8] = np.load(directory / "pixels.npy", mmap_mode="r")
        self.labels: NDArray[np.int64] = np.load(directory / "labels.npy")
        metadata = json.loads((directory / "metadata.json").read_text())
        self.transposed: bool = metadata["transposed"]
        self.classes: int = metadata["classes"]

    @classmethod
    def write(
        cls, directory: Path, pixels: NDArray[np.uint8], labels: NDArray[np.int64], transposed: bool, classes: int
    ) -> Source:
        """Write the arrays to a new directory."""
        directory.mkdir(parents=True)
        np.save(directory / "pixels.npy", pixels)
        np.save(directory / "labels.npy", labels)
        (directory / "metadata.json").write_text(json.dumps({"transposed": transposed, "classes": classes}))
        return cls(directory)

    def __len__(self) -> int:
        return len(self.labels)

    def upright_images(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return images in reading orientation, uint8 [n, H, W, C]."""
        pixels = self.pixels[indices]
        return np.ascontiguousarray(pixels.swapaxes(1, 2)) if self.transposed else pixels

    @cached_property
    def upright(self) -> NDArray[np.uint8]:
        """All images in reading orientation, uint8 [N, H, W, C], in memory.

        The other loaders pack these, so that only Inkstream pays for the transposition in every epoch.
        """
        return self.upright_images(np.arange(len(self)))


@dataclass(frozen=True)
class Task:
    """Output that every loader must produce.

    Args:
        image_shape: (H, W, C) of the upright images.
        samples: Number of images N.
        resolution: Side of the output in pixels.
        batch_size: Images per batch.
        mean, std: Per channel, of pixels scaled to 0 .. 1.
        seed: Seed of the shuffling.
        device: Device of the batches.
        workers: Worker processes, for loaders that have them. Threads are up to the loader.
    """

    image_shape: tuple[int, int, int]
    samples: int
    resolution: int
    batch_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    seed: int
    device: torch.device
    workers: int = 0


@dataclass(frozen=True)
class Variant:
    """Way to use a loader.

    Args:
        name: `documented` (as in its documentation), `best` (the fastest form) or another name.
        file_format: Packed form of the images that it reads.
        note: Description for the report.
        tolerance_levels: Tolerated error in gray levels of 256; above 0 if a library rounds to integers between resize
            and normalization.
        uses_workers: Whether it has worker processes, whose best number is searched.
        is_raw: Whether it returns the stored uint8 [B, H, W, C] without transform, to measure reading alone.
    """

    name: str
    file_format: str
    note: str
    tolerance_levels: float = 0.0
    uses_workers: bool = False
    is_raw: bool = False


class BaselineLoader(Protocol):
    """A loader of Inkstream or of another library."""

    variants: tuple[Variant, ...]

    def pack(self, source: Source, file_format: str, directory: Path, batch_size: int) -> Path:
        """Write the images to a new, empty directory.

        Args:
            source: The images.
            file_format: One of the formats of the variants.
            directory: Output directory.
            batch_size: Batch size of the benchmark, for formats that consist of complete batches.

        Returns:
            The file or directory whose size counts as the packed size.
        """
        ...

    def open(self, directory: Path, variant: str, task: Task) -> Epochs:
        """Open the output of `pack`, with the best shuffling of the loader."""
        ...
