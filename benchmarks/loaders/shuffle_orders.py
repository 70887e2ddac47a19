"""Orders of the shuffle benchmark: those of samplers, and those of libraries, which are run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import BatchSampler, RandomSampler, SequentialSampler

from benchmarks.common.processes import WorkerError, WorkerProcess
from benchmarks.loaders.baselines import IMPORT_ERRORS, REGISTRY, import_loader, missing_requirement
from benchmarks.loaders.baselines.base import Source, Task
from benchmarks.loaders.baselines.inkstream import pack_as_stored
from benchmarks.loaders.shuffle_measures import Epoch
from pipeline.sampler import ShuffledBatchSampler
from shards import open_split

_SIDE = 8  # pixels of the synthetic images; only their order matters
_WINDOW = 1 / 8  # fraction of the data set in the window of the sampler for large data sets


@dataclass(frozen=True)
class LoaderOrder:
    """Order of a loader: name, description, and the batches of each epoch."""

    name: str
    note: str
    epochs: list[Epoch]


@dataclass
class OrderResults:
    """Orders of all loaders.

    Args:
        labels: Class of each sample, int64 [N].
        orders: The orders.
        skipped: Reason of each skipped loader.
        failed: Reason of each failed loader and variant.
    """

    labels: NDArray[np.int64]
    orders: list[LoaderOrder] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def make_sorted_source(directory: Path, samples: int, classes: int) -> Source:
    """Write synthetic images sorted by class, like a folder that is read class by class."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (samples, _SIDE, _SIDE, 1), dtype=np.uint8)
    labels = np.sort(random.integers(0, classes, samples))
    return Source.write(directory, pixels, labels, transposed=False, classes=classes)


def sampler_orders(source: Source, scratch: Path, batch_size: int, epochs: int) -> Iterator[LoaderOrder]:
    """Yield the orders of Inkstream's and torch's samplers."""
    pack_as_stored(source, "tar", scratch / "set")
    store = open_split(scratch / "set", "train")
    samples = np.arange(len(store))

    def run(sampler: ShuffledBatchSampler) -> list[Epoch]:
        rows = store.rows.astype(np.int64)
        return [[rows[step.samples] for step in sampler.steps(number, 0, 1)] for number in range(epochs)]

    sampler = ShuffledBatchSampler(samples, batch_size, seed=0)
    yield LoaderOrder("inkstream", "uniform permutation of the packed samples", run(sampler))
    block = max(1, batch_size // 8)
    window = max(1, round(_WINDOW * len(source) / block))
    sampler = ShuffledBatchSampler(samples, batch_size, seed=0, block_size=block, shuffle_window_blocks=window)
    note = f"for data sets larger than memory: a sliding window of {window * block:,} packed samples"
    yield LoaderOrder("inkstream windowed", note, run(sampler))
    random = torch.Generator().manual_seed(0)
    for name, note, torch_sampler in (
        ("torch RandomSampler", "uniform permutation", RandomSampler(samples, generator=random)),
        ("sequential", "no shuffling", SequentialSampler(samples)),
    ):
        batches = BatchSampler(torch_sampler, batch_size, drop_last=True)
        yield LoaderOrder(name, note, [[np.array(indices) for indices in batches] for _ in range(epochs)])


class OrderWorker:
    """Runs the loader of a library for its order.

    Args:
        name: Name of the loader.
        variant: Name of its variant.
        source: Directory of the images.
        directory: Directory for the packed images.
        batch_size: Images per batch.
    """

    def __init__(self, name: str, variant: str, source: Path, directory: Path, batch_size: int) -> None:
        loader = import_loader(name)
        spec = next(one for one in loader.variants if one.name == variant)
        self._note = spec.note
        images = Source(source)
        directory.mkdir()
        loader.pack(images, spec.file_format, directory, batch_size)
        height, width, channels = images.upright.shape[1:]
        assert height == width
        task = Task(
            image_shape=(height, width, channels),
            samples=len(images),
            resolution=height,
            batch_size=batch_size,
            mean=(0.0,) * channels,
            std=(1.0,) * channels,
            seed=0,
            device=torch.device("cpu"),
        )
        self._epochs = loader.open(directory, variant, task)

    def note(self) -> str:
        return self._note

    def epoch(self, number: int) -> list[NDArray[np.int64]]:
        return [np.array(indices) for _, indices in self._epochs(number)]


def collect_orders(
    libraries: Sequence[tuple[str, str]], scratch: Path, samples: int, classes: int, batch_size: int, epochs: int
) -> OrderResults:
    """Collect the orders of the samplers and of the named loaders and variants."""
    source = make_sorted_source(scratch / "source", samples, classes)
    results = OrderResults(source.labels)
    for order in sampler_orders(source, scratch, batch_size, epochs):
        results.orders.append(order)
        print(order.name, flush=True)
    for name, variant in libraries:
        title = f"{name} {variant}"
        reason = missing_requirement(REGISTRY[name])
        if reason is not None:
            results.skipped[name] = reason
            continue
        arguments = (name, variant, scratch / "source", scratch / title.replace(" ", "-"), batch_size)
        with WorkerProcess(OrderWorker, *arguments, log=scratch / "log") as process:
            try:
                note = process.call("note")
                batches = [process.call("epoch", number) for number in range(epochs)]
                results.orders.append(LoaderOrder(title, note, batches))
                print(title, flush=True)
            except WorkerError as error:
                if error.kind in IMPORT_ERRORS:
                    results.skipped[name] = f"{error.reason} ({REGISTRY[name].install})"
                else:
                    results.failed[title] = error.reason
    for name, reason in (results.skipped | results.failed).items():
        print(f"{name}: {'skipped' if name in results.skipped else 'FAILED'}, {reason}", flush=True)
    return results
