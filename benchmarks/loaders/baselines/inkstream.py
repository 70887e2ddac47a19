"""Ours: a packed set, an order, a transform and the loader over them, through their public interfaces."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.loaders.baselines.peer import Batch, Epochs, Source, Task, Variant
from pipeline.loader import Loader
from pipeline.packing.pack import pack
from pipeline.readers.raw_split import RawSplit
from pipeline.sampler import ShuffledBatchSampler
from pipeline.transforms.build import build_transform
from pipeline.transforms.spec import TransformSpec
from shards import open_split


def pack_as_stored(source: Source, store: str, out: Path) -> Path:
    """Pack the images as they lie at rest, with the packer's defaults; returns the train part."""
    return _pack_arrays(source.pixels, source.labels, source.classes, source.transposed, out, store=store)


def pack_upright_blocks(source: Source, out: Path, block_size: int) -> Path:
    """Pack upright images into whole blocks only, for the readers of other libraries; returns the train part."""
    whole = len(source) // block_size * block_size
    labels = source.labels[:whole]
    return _pack_arrays(source.upright[:whole], labels, source.classes, False, out, block_size=block_size)


def _pack_arrays(
    pixels: NDArray[np.uint8], labels: NDArray[np.int64], classes: int, transposed: bool, out: Path, **settings: Any
) -> Path:
    names = tuple(f"class {number}" for number in range(classes))

    def part(name: str, samples: slice) -> RawSplit:
        return RawSplit.from_arrays(name, pixels[samples], labels[samples], names, transposed=transposed)

    # A packed set has two parts: of the other one there is one image.
    pack(lambda: (part("train", slice(None)), part("test", slice(1))), out, dataset="benchmark", **settings)
    return out / "train"


class Inkstream:
    """Store, order, transform and loader with their default settings."""

    def __init__(self, form: str, backend: str) -> None:
        self.variants = (Variant("default", form, f"{form} store, {backend} backend"),)
        self._backend = backend

    def pack(self, source: Source, form: str, directory: Path, batch_size: int) -> Path:
        return pack_as_stored(source, form, directory / "set")

    def open(self, directory: Path, variant: str, task: Task) -> Epochs:
        store = open_split(directory / "set", "train")
        spec = TransformSpec.of(store.manifest, task.resolution).with_normalization(task.mean, task.std)
        graph = build_transform(spec, self._backend, task.device, task.batch_size)
        order = ShuffledBatchSampler(np.arange(len(store)), task.batch_size, task.seed)
        loader = Loader(store, order, graph, task.device)

        def epoch(number: int) -> Iterator[Batch]:
            with contextlib.closing(loader.batches(number)) as batches:
                yield from map(attrgetter("images", "source_index"), batches)  # which holds no batch

        return epoch


class Gather:
    """Reading alone: shuffled batches of raw images into a buffer that is used again and again."""

    def __init__(self, form: str) -> None:
        self.variants = (Variant("reading", form, f"{form} store: gather alone, no resize", raw=True),)

    def pack(self, source: Source, form: str, directory: Path, batch_size: int) -> Path:
        return pack_as_stored(source, form, directory / "set")

    def open(self, directory: Path, variant: str, task: Task) -> Epochs:
        store = open_split(directory / "set", "train")
        order = ShuffledBatchSampler(np.arange(len(store)), task.batch_size, task.seed)
        buffer = np.empty((task.batch_size, *store.manifest.image_shape), np.uint8)

        def epoch(number: int) -> Iterator[Batch]:
            for step in order.steps(number, rank=0, world_size=1):
                images = buffer[: len(step.samples)]
                store.gather(step.samples, images)
                yield torch.from_numpy(images), store.rows[step.samples]

        return epoch


PEERS = {
    "inkstream-tar-torch": Inkstream("tar", "torch"),
    "inkstream-tar-dali": Inkstream("tar", "dali"),
    "inkstream-zarr-torch": Inkstream("zarr", "torch"),
    "inkstream-tar-gather": Gather("tar"),
    "inkstream-zarr-gather": Gather("zarr"),
}
