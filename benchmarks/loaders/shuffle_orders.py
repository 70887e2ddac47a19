"""The orders that are compared: those that are rules, and those that only running the library tells."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import BatchSampler, RandomSampler, SequentialSampler

from benchmarks.common.processes import KeptProcess, ProcessFailed
from benchmarks.loaders.baselines import IMPORT_FAILURES, LISTINGS, absent, load
from benchmarks.loaders.baselines.inkstream import pack_as_stored
from benchmarks.loaders.baselines.peer import Source, Task
from benchmarks.loaders.shuffle_measures import Epoch
from pipeline.sampler import ShuffledBatchSampler
from shards import open_split

_SIDE = 8  # of the made-up images, in pixels: only their order matters
_WINDOW = 1 / 8  # of the set, for the order that is made for sets larger than memory


def sorted_source(directory: Path, samples: int, classes: int) -> Source:
    """Made-up images, sorted by class: what a shuffle has to cope with in a folder that was read class by class."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (samples, _SIDE, _SIDE, 1), dtype=np.uint8)
    labels = np.sort(random.integers(0, classes, samples))
    return Source.write(directory, pixels, labels, transposed=False, classes=classes)


def rules(source: Source, scratch: Path, batch_size: int, epochs: int) -> Iterator[Given]:
    """The orders that are a rule: ours and torch's samplers."""
    pack_as_stored(source, "tar", scratch / "set")
    store = open_split(scratch / "set", "train")
    samples = np.arange(len(store))

    def ours(order: Any) -> list[Epoch]:
        return [[store.rows[step.samples] for step in order.steps(number, 0, 1)] for number in range(epochs)]

    order = ShuffledBatchSampler(samples, batch_size, seed=0)
    yield Given("inkstream", "a uniform permutation of the packed samples", ours(order))
    block = max(1, batch_size // 8)
    window = max(1, round(_WINDOW * len(source) / block))
    order = ShuffledBatchSampler(samples, batch_size, seed=0, block_size=block, shuffle_window_blocks=window)
    note = f"for sets larger than memory: a sliding window of {window * block:,} of them"
    yield Given("inkstream windowed", note, ours(order))
    torch_random = torch.Generator().manual_seed(0)
    for name, note, sampler in (
        ("torch RandomSampler", "a uniform permutation", RandomSampler(samples, generator=torch_random)),
        ("sequential", "no shuffling at all", SequentialSampler(samples)),
    ):
        batches = BatchSampler(sampler, batch_size, drop_last=True)
        epochs_given = [[np.array(rows) for rows in batches] for _ in range(epochs)]
        yield Given(name, note, epochs_given)


class OrderOf:
    """A library's loader, run for its order alone."""

    def __init__(self, name: str, variant: str, source: Path, directory: Path, batch_size: int) -> None:
        peer = load(name)
        known = next(known for known in peer.variants if known.name == variant)
        self._note = known.note
        images = Source(source)
        directory.mkdir()
        peer.pack(images, known.form, directory, batch_size)
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
        self._epochs = peer.open(directory, variant, task)

    def note(self) -> str:
        return self._note

    def epoch(self, number: int) -> list[NDArray[np.int64]]:
        return [np.array(rows) for _, rows in self._epochs(number)]


@dataclass(frozen=True)
class Given:
    """An order as it was given. note: what it is. epochs: of each the batches, of each the rows."""

    name: str
    note: str
    epochs: list[Epoch]


@dataclass
class Found:
    """labels: int64 [N], the class of each row. skipped, failed: why, by name."""

    labels: NDArray[np.int64]
    orders: list[Given] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def gather_orders(
    libraries: Sequence[tuple[str, str]], scratch: Path, samples: int, classes: int, batch_size: int, epochs: int
) -> Found:
    """The orders of the rules and of the libraries named, by loader and variant."""
    source = sorted_source(scratch / "source", samples, classes)
    found = Found(source.labels)
    for given in rules(source, scratch, batch_size, epochs):
        found.orders.append(given)
        print(given.name, flush=True)
    for name, variant in libraries:
        title = f"{name} {variant}"
        reason = absent(LISTINGS[name])
        if reason is not None:
            found.skipped[name] = reason
            continue
        arguments = (name, variant, scratch / "source", scratch / title.replace(" ", "-"), batch_size)
        with KeptProcess(OrderOf, *arguments, log=scratch / "log") as process:
            try:
                note = process.call("note")
                found.orders.append(Given(title, note, [process.call("epoch", number) for number in range(epochs)]))
                print(title, flush=True)
            except ProcessFailed as error:
                if error.kind in IMPORT_FAILURES:
                    found.skipped[name] = f"{error.reason} ({LISTINGS[name].install})"
                else:
                    found.failed[title] = error.reason
    for name, reason in (found.skipped | found.failed).items():
        print(f"{name}: {'skipped' if name in found.skipped else 'FAILED'}, {reason}", flush=True)
    return found
