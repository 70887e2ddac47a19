"""What a comparison of loaders is made on: images, resolutions, runs and places, checked before anything starts."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.common.default_set import choose_set
from benchmarks.common.harness import DEFAULT_OUT
from benchmarks.loaders.baselines.peer import Source, Task
from pipeline.common.device import choose_device
from shards import UserError, open_split
from shards.atomic import check_writable
from shards.stores.base import Store

_SEED = 0


@dataclass(frozen=True)
class Setting:
    """The store and the samples of it that are packed anew by every loader, and how they are measured.

    samples: int64 [N], positions in the store. seconds: of a run, at least. json: a further file for the lines.
    """

    store: Store
    samples: NDArray[np.int64]
    resolutions: tuple[int, ...]
    batch_size: int
    runs: int
    seconds: float
    device: torch.device
    json: Path | None
    out: Path

    @property
    def dataset(self) -> str:
        return self.store.manifest.name

    def source(self, directory: Path) -> Source:
        """Write the images in the order of the raw files, rows 0 .. N-1, for the loaders to pack."""
        manifest = self.store.manifest
        ordered = self.samples[np.argsort(self.store.rows[self.samples])]
        pixels = np.empty((len(ordered), *manifest.image_shape), np.uint8)
        self.store.gather(ordered, pixels)
        return Source.write(directory, pixels, self.store.labels[ordered], manifest.transposed, len(manifest.classes))

    def task(self, source: Source, resolution: int) -> Task:
        """What is asked of every loader at a resolution; mean and deviation are those of the raw pixels."""
        height, width, channels = source.pixels.shape[1:]
        counts = [np.bincount(source.pixels[..., channel].reshape(-1), minlength=256) for channel in range(channels)]
        levels = np.arange(256) / 255
        means = [float(np.average(levels, weights=count)) for count in counts]
        pairs = zip(counts, means, strict=True)
        deviations = [float(np.average((levels - mean) ** 2, weights=count) ** 0.5) for count, mean in pairs]
        return Task(
            image_shape=(width, height, channels) if source.transposed else (height, width, channels),
            samples=len(source),
            resolution=resolution,
            batch_size=self.batch_size,
            mean=tuple(means),
            std=tuple(max(deviation, 1 / 255) for deviation in deviations),
            seed=_SEED,
            device=self.device,
        )


def choose(arguments: argparse.Namespace) -> Setting:
    """The setting that a command line asks for. Raises `UserError`."""
    store = open_split(choose_set(arguments.shards), "train")
    samples = np.arange(min(len(store), arguments.images or len(store)))  # a prefix of a pack is a fair sample
    height, width, _ = store.manifest.image_shape
    if height is None or width is None:
        raise UserError(
            found=f"{store.manifest.name}, packed as picture files of differing sizes",
            expected="images of one size, which every loader can be given alike",
            hint="pack it at one size: python -m pipeline.shard ... --size N",
        )
    if arguments.json is not None:
        check_writable(arguments.json)
    if arguments.batch_size > len(samples):
        raise UserError(
            found=f"--batch-size {arguments.batch_size} of {len(samples)} images",
            expected="an epoch of at least one whole batch",
            hint=f"--batch-size {min(64, len(samples))}",
        )
    return Setting(
        store=store,
        samples=samples,
        resolutions=_resolutions(arguments.resolutions, max(height, width)),
        batch_size=arguments.batch_size,
        runs=arguments.runs,
        seconds=arguments.seconds,
        device=choose_device(arguments.device),
        json=arguments.json,
        out=arguments.out or DEFAULT_OUT,
    )


def _resolutions(text: str, least: int) -> tuple[int, ...]:
    """Sides in pixels. At smaller ones than the raw images' the libraries differ in what they do at the borders."""
    try:
        resolutions = tuple(int(word) for word in text.split(","))
        if min(resolutions) < least:
            raise ValueError
    except ValueError:
        raise UserError(
            found=f"--resolutions {text}",
            expected=f"sides in pixels with commas, none smaller than the images' {least}",
            hint=f"--resolutions {least},{2 * least}",
        ) from None
    return resolutions
