"""Configuration of the loader benchmark: images, resolutions, runs and output files."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.common.arguments import parse_numbers
from benchmarks.common.default_set import choose_set
from benchmarks.loaders.baselines.base import Source, Task
from pipeline.common.device import choose_device
from shards import UserError, open_split
from shards.atomic import check_writable
from shards.stores.base import ImageStore, is_image_store

_SEED = 0


@dataclass(frozen=True)
class BenchmarkConfig:
    """What the loaders are measured on.

    Args:
        store: Packed training split.
        samples: int64 [N], positions in the store of the images that each loader packs.
        resolutions: Sides of the outputs in pixels.
        batch_size: Images per batch.
        runs: Measured runs of each loader.
        seconds: Minimum time of a run.
        device: Device of the batches.
        json: Additional file of JSON lines, or None.
        out: Output directory.
    """

    store: ImageStore
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

    def make_source(self, directory: Path) -> Source:
        """Write the images in the order of the raw files, with indices 0 .. N-1."""
        return write_source(self.store, self.samples, directory)

    def make_task(self, source: Source, resolution: int) -> Task:
        """Return the task of every loader at a resolution, with the mean and std of the raw pixels."""
        height, width, channels = source.pixels.shape[1:]
        counts = [np.bincount(source.pixels[..., channel].reshape(-1), minlength=256) for channel in range(channels)]
        levels = np.arange(256) / 255
        means = [float(np.average(levels, weights=count)) for count in counts]
        pairs = zip(counts, means, strict=True)
        stds = [float(np.average((levels - mean) ** 2, weights=count) ** 0.5) for count, mean in pairs]
        return Task(
            image_shape=(width, height, channels) if source.transposed else (height, width, channels),
            samples=len(source),
            resolution=resolution,
            batch_size=self.batch_size,
            mean=tuple(means),
            std=tuple(max(std, 1 / 255) for std in stds),
            seed=_SEED,
            device=self.device,
        )


def open_images(shards: str | None) -> ImageStore:
    """Open the training split of a data set (see `choose_set`) of one image size.

    Raises:
        UserError: It was packed as image files of different sizes.
    """
    store = open_split(choose_set(shards), "train")
    if not is_image_store(store):
        raise UserError(
            found=f"{store.manifest.name}, packed as image files of different sizes",
            expected="images of one size, which every loader supports",
            hint="pack it at one size: python -m pipeline.shard ... --size N",
        )
    return store


def write_source(store: ImageStore, samples: NDArray[np.int64], directory: Path) -> Source:
    """Write samples, int64 [N], of a store in the order of the raw files, with indices 0 .. N-1."""
    ordered = samples[np.argsort(store.rows[samples])]
    manifest, labels = store.manifest, store.labels[ordered].astype(np.int64)
    return Source.write(directory, store.read(ordered), labels, manifest.transposed, len(manifest.classes))


def make_config(arguments: argparse.Namespace) -> BenchmarkConfig:
    """Build the configuration of a command line.

    Raises:
        UserError: The arguments or the data set are not suitable.
    """
    store = open_images(arguments.shards)
    samples = np.arange(min(len(store), arguments.images or len(store)))  # packed order is random
    if arguments.json is not None:
        check_writable(arguments.json)
    if arguments.batch_size > len(samples):
        raise UserError(
            found=f"--batch-size {arguments.batch_size} with {len(samples)} images",
            expected="at least one complete batch per epoch",
            hint=f"--batch-size {min(64, len(samples))}",
        )
    # Below the size of the raw images, the libraries treat the borders differently.
    smallest = max(store.manifest.pixel_shape[:2])
    expected = f"comma-separated sides in pixels, none smaller than the images' {smallest}"
    example = f"{smallest},{2 * smallest}"
    resolutions = parse_numbers("--resolutions", arguments.resolutions, int, expected, example, lowest=smallest)
    return BenchmarkConfig(
        store=store,
        samples=samples,
        resolutions=tuple(resolutions),
        batch_size=arguments.batch_size,
        runs=arguments.runs,
        seconds=arguments.seconds,
        device=choose_device(arguments.device),
        json=arguments.json,
        out=arguments.out,
    )
