"""Inkstream's loader and its store alone, through their public interfaces."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.loaders.baselines.base import Batch, Epochs, Source, Task, Variant
from pipeline.loader import Loader
from pipeline.packing.pack import PackSettings, pack
from pipeline.readers.raw_split import RawSplit
from pipeline.sampler import ShuffledBatchSampler
from pipeline.transforms.build import build_transform
from pipeline.transforms.spec import TransformSpec
from shards import open_split
from shards.stores.base import is_image_store


def pack_as_stored(source: Source, store: str, out: Path) -> Path:
    """Pack the images as stored, with the defaults of the packer, and return the training split."""
    return _pack_arrays(source.pixels, source.labels, source.classes, source.transposed, out, store=store)


def pack_upright_blocks(source: Source, out: Path, block_size: int) -> Path:
    """Pack upright images into complete blocks, for the readers of other libraries, and return the training split."""
    count = len(source) // block_size * block_size
    labels = source.labels[:count]
    return _pack_arrays(source.upright[:count], labels, source.classes, False, out, block_size=block_size)


def _pack_arrays(
    pixels: NDArray[np.uint8], labels: NDArray[np.int64], classes: int, transposed: bool, out: Path, **options: Any
) -> Path:
    names = tuple(f"class {number}" for number in range(classes))

    def make_split(name: str, samples: slice) -> RawSplit:
        return RawSplit.from_arrays(name, pixels[samples], labels[samples], names, transposed=transposed)

    # A packed data set needs a test split; one image is enough.
    pack(
        lambda: (make_split("train", slice(None)), make_split("test", slice(1))),
        out,
        PackSettings("benchmark", **options),
    )
    return out / "train"


class Inkstream:
    """`Loader` with the default settings of store, sampler and transform."""

    def __init__(self, store: str, backend: str) -> None:
        self.variants = (Variant("default", store, f"{store} store, {backend} backend"),)
        self._backend = backend

    def pack(self, source: Source, file_format: str, directory: Path, batch_size: int) -> Path:
        return pack_as_stored(source, file_format, directory / "set")

    def open(self, directory: Path, variant: str, task: Task) -> Epochs:
        store = open_split(directory / "set", "train")
        spec = TransformSpec.of(store.manifest, task.resolution).with_normalization(task.mean, task.std)
        transform = build_transform(spec, self._backend, task.device, task.batch_size)
        sampler = ShuffledBatchSampler(np.arange(len(store)), task.batch_size, task.seed)
        loader = Loader(store, sampler, transform, task.device)

        def epoch(number: int) -> Iterator[Batch]:
            with contextlib.closing(loader.batches(number)) as batches:
                yield from map(attrgetter("images", "source_index"), batches)  # keeps no reference to a batch

        return epoch


class Gather:
    """Reading alone: shuffled batches of raw images in one reused buffer."""

    def __init__(self, store: str) -> None:
        self.variants = (Variant("reading", store, f"{store} store: gather alone, no resize", is_raw=True),)

    def pack(self, source: Source, file_format: str, directory: Path, batch_size: int) -> Path:
        return pack_as_stored(source, file_format, directory / "set")

    def open(self, directory: Path, variant: str, task: Task) -> Epochs:
        store = open_split(directory / "set", "train")
        sampler = ShuffledBatchSampler(np.arange(len(store)), task.batch_size, task.seed)
        assert is_image_store(store)
        buffer = np.empty((task.batch_size, *store.manifest.pixel_shape), np.uint8)

        def epoch(number: int) -> Iterator[Batch]:
            for step in sampler.steps(number, rank=0, world_size=1):
                images = buffer[: len(step.samples)]
                store.gather(step.samples, images)
                yield torch.from_numpy(images), store.rows[step.samples].astype(np.int64)

        return epoch


LOADERS = {
    "inkstream-tar-torch": Inkstream("tar", "torch"),
    "inkstream-tar-dali": Inkstream("tar", "dali"),
    "inkstream-zarr-torch": Inkstream("zarr", "torch"),
    "inkstream-tar-gather": Gather("tar"),
    "inkstream-zarr-gather": Gather("zarr"),
}
