"""What a loader has to do to be measured, and what it is given."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

Rows = torch.Tensor | NDArray[np.int64]
Batch = tuple[torch.Tensor, Rows]
"""Images float32 [B, C, R, R], upright, resized, (x / 255 - mean) / std, on the task's device; and their source rows
int64 [B]. A batch need only stay as it is until the next one is asked for."""

Epochs = Callable[[int], Iterator[Batch]]
"""The batches of an epoch, by its number; incomplete ones are left out. Closing the iterator ends its workers."""


class Source:
    """The images that every loader packs, in the order of the raw files, in a directory of NumPy arrays.

    pixels: uint8 [N, H, W, C], mapped, not read, and as they lie at rest. labels: int64 [N].
    transposed: rows and columns are exchanged in the pixels. classes: how many there are.
    """

    def __init__(self, directory: Path) -> None:
        self.pixels: NDArray[np.uint8] = np.load(directory / "pixels.npy", mmap_mode="r")
        self.labels: NDArray[np.int64] = np.load(directory / "labels.npy")
        facts = json.loads((directory / "facts.json").read_text())
        self.transposed: bool = facts["transposed"]
        self.classes: int = facts["classes"]

    @classmethod
    def write(
        cls, directory: Path, pixels: NDArray[np.uint8], labels: NDArray[np.int64], transposed: bool, classes: int
    ) -> Source:
        directory.mkdir(parents=True)
        np.save(directory / "pixels.npy", pixels)
        np.save(directory / "labels.npy", labels)
        (directory / "facts.json").write_text(json.dumps({"transposed": transposed, "classes": classes}))
        return cls(directory)

    def __len__(self) -> int:
        return len(self.labels)

    def upright_rows(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Some of the images as people see them, uint8 [n, H, W, C]."""
        pixels = self.pixels[rows]
        return np.ascontiguousarray(pixels.swapaxes(1, 2)) if self.transposed else pixels

    @cached_property
    def upright(self) -> NDArray[np.uint8]:
        """All images as people see them, uint8 [N, H, W, C], in memory.

        This is what the other loaders pack: turning the images is work that they do not have, ours does it each time.
        """
        return self.upright_rows(np.arange(len(self)))


@dataclass(frozen=True)
class Task:
    """What is asked of every loader alike.

    image_shape: (H, W, C) of the upright images. samples: N. resolution: side of the output in pixels.
    mean, std: for each channel, with pixels scaled to 0 .. 1. seed: of the shuffling.
    workers: processes beside the main one, for loaders that have such; what they have of threads is their own affair.
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
    """A way to use a loader.

    name: `documented` (as its documentation shows it), `best` (the fastest form found) or a word of its own.
    form: which packed form of the images it reads. note: what it does, for the report.
    levels: how far its output may be off, in levels of grey of 256: above 0 where a library rounds to whole levels
    between resizing and normalising. processes: whether it has worker processes, whose best number is tried out.
    raw: it gives raw uint8 [B, H, W, C] as at rest, which is reading alone.
    """

    name: str
    form: str
    note: str
    levels: float = 0.0
    processes: bool = False
    raw: bool = False


class Peer(Protocol):
    """A loader, ours or another one."""

    variants: tuple[Variant, ...]

    def pack(self, source: Source, form: str, directory: Path, batch_size: int) -> Path:
        """Write the images in this loader's own form into a new, empty directory; returns what of it lies at rest.

        batch_size: the one they will be asked for in, for forms that are made of whole batches.
        """
        ...

    def open(self, directory: Path, variant: str, task: Task) -> Epochs:
        """Open what `pack` wrote, shuffled as well as this loader does it."""
        ...
