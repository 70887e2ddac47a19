"""Batches on a device: the order says which samples, the store gives their bytes, the transform the model input."""

from __future__ import annotations

import itertools
import queue
import threading
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.common.buffer_pool import Buffers
from pipeline.sampler import BatchIndices, BatchSampler
from pipeline.transforms.augmentation import AugmentationParams
from pipeline.transforms.spec import Transform, UndecodableImage
from shards.errors import UserError
from shards.stores.base import EncodedStore, Images, Store

T = TypeVar("T")

_AHEAD = 2  # batches prepared for a GPU before they are asked for


@dataclass(frozen=True)
class Batch:
    """One rank's share of a global batch, on the device.

    images: float32 [n, C, R, R], normalised. labels: int64 [n]. source_index: int64 [n], rows in the raw source.
    step: number of the global batch within the epoch. global_size: samples of it over all ranks.
    """

    images: torch.Tensor
    labels: torch.Tensor
    source_index: torch.Tensor
    step: int
    global_size: int


class Loader:
    """Iterates over the batches of an epoch.

    For a GPU they are prepared ahead by a thread. On a CPU model and loader share the cores, and a thread would only
    make them get in each other's way: there a batch is prepared when it is asked for. Small batches for training are
    prepared several at a time, which costs about as much as one of them.
    It keeps no state: `batches(epoch, first_step)` is a pure function of its arguments and the order's seed.
    rank, world_size: this process among those that share the work.
    """

    def __init__(
        self,
        store: Store,
        sampler: BatchSampler,
        transform: Transform,
        device: torch.device,
        *,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._store = store
        self._transform = transform
        self._device = device
        self._rank = rank
        self._world_size = world_size
        self._buffers = Buffers()
        self._table: tuple[NDArray[np.uint8], torch.Tensor] | None = None
        self.sampler = sampler
        # Which steps are prepared together follows from their numbers, so that a resumed epoch has the same calls.
        self._joined = max(1, transform.max_fused_batch * world_size // sampler.batch_size) if sampler.can_fuse else 1

    def batches(self, epoch: int = 0, first_step: int = 0) -> Iterator[Batch]:
        """This rank's batches of an epoch, from global step `first_step` on."""
        steps = self.sampler.steps(epoch, self._rank, self._world_size, first_step - first_step % self._joined)
        prepared = self._prepare(steps, first_step)
        return prefetch(prepared, _AHEAD) if self._device.type == "cuda" else prepared

    def _prepare(self, steps: Iterator[BatchIndices], first_step: int) -> Iterator[Batch]:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # the current device is a property of the thread
        while together := list(itertools.islice(steps, self._joined)):
            batches = self._load(together)[::-1]
            while batches:
                batch = batches.pop()
                if batch.step >= first_step:
                    yield batch
                del batch  # whoever took it holds it alone

    def _load(self, steps: list[BatchIndices]) -> list[Batch]:
        """The batches of some steps, out of one call of the transform."""
        samples = steps[0].samples if len(steps) == 1 else np.concatenate([step.samples for step in steps])
        images = self._read(samples)
        params = [step.params for step in steps if step.params is not None]
        try:
            model_input = self._transform(images, AugmentationParams.concatenate(params) if params else None)
        except UndecodableImage as error:
            raise undecodable_image_error(self._store, int(samples[error.position]), error.reason) from None
        sizes = [len(step.samples) for step in steps]
        return [
            Batch(images, labels, rows, step.step, step.global_size)
            for step, images, labels, rows in zip(
                steps,
                model_input.split(sizes),
                torch.from_numpy(self._store.labels.take(samples)).to(self._device, non_blocking=True).split(sizes),
                torch.from_numpy(self._store.rows.take(samples)).to(self._device, non_blocking=True).split(sizes),
                strict=True,
            )
        ]

    def _read(self, samples: NDArray[np.int64]) -> Images:
        if self._store.manifest.encoded:
            return self._store.read(samples)
        images = self._buffers.array((len(samples), *self._store.manifest.image_shape))
        located = self._store.locate(samples)
        if located is None:
            self._store.gather(samples, images)
        else:
            # The same on all cores, which also leaves each core the images that it goes on with.
            table, rows = self._as_tensor(located.table), torch.from_numpy(located.rows)
            torch.index_select(table, 0, rows, out=torch.from_numpy(images).view(len(rows), -1))
        return images

    def _as_tensor(self, table: NDArray[np.uint8]) -> torch.Tensor:
        if self._table is None or self._table[0] is not table:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
                self._table = table, torch.from_numpy(table)
        return self._table[1]


def undecodable_image_error(store: EncodedStore, sample: int, reason: str) -> UserError:
    """The message about a picture that was found damaged when it was to be used."""
    return UserError(
        found=f"{store.describe_sample(sample)} (row {store.rows[sample]}): {reason}",
        expected="a picture that can be decoded",
        hint="python -m shards.verify DIR names all that are damaged; then pack or fetch the shards again",
    )


def prefetch(items: Iterable[T], depth: int) -> Iterator[T]:
    """Iterate in a thread of its own, up to `depth` items ahead.

    An exception there is raised here. The thread ends when the iteration ends or the iterator is closed.
    """
    # SimpleQueue, whose hand-over costs a few microseconds, has no bound: a token stands for each item that may wait.
    ready: queue.SimpleQueue = queue.SimpleQueue()
    tokens: queue.SimpleQueue = queue.SimpleQueue()
    closed = threading.Event()
    for _ in range(depth):
        tokens.put(None)

    def work() -> None:
        try:
            for item in items:
                tokens.get()
                if closed.is_set():
                    return
                ready.put(("item", item))
                del item  # whoever takes it holds it alone, and may let go of it
            ready.put(("end", None))
        except BaseException as error:
            ready.put(("error", error))

    thread = threading.Thread(target=work, name="loader", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            tokens.put(None)
            yield value
    finally:
        closed.set()
        tokens.put(None)
        thread.join()
