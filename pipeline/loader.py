"""The data loader: the sampler selects samples, the store reads them, the transform computes the model input."""

from __future__ import annotations

import itertools
import warnings
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.common.buffer_pool import BufferPool
from pipeline.sampler import BatchIndices, BatchSampler
from pipeline.transforms.augmentation import AugmentationParams
from pipeline.transforms.spec import Transform, UndecodableImage
from shards.errors import UserError
from shards.stores.base import EncodedStore, Images, Store, is_image_store

T = TypeVar("T")

_PREFETCH_BATCHES = 2  # batches prepared ahead for a GPU


@dataclass(frozen=True)
class Batch:
    """The samples of a global batch that belong to one rank, on the device.

    Attributes:
        images: float32 [n, C, R, R], normalized.
        labels: int64 [n].
        source_index: int64 [n], numbers of the samples in the raw source.
        step: Number of the global batch within the epoch.
        global_size: Samples of the global batch over all ranks.
    """

    images: torch.Tensor
    labels: torch.Tensor
    source_index: torch.Tensor
    step: int
    global_size: int


class Loader:
    """Iterates over the batches of an epoch on one rank.

    On a GPU, a thread prefetches batches. On a CPU, model and loader compete for the same cores, so a batch is prepared
    when it is requested. Small training batches are computed several at a time, which takes about as long as one.

    The loader has no state: `batches(epoch, first_step)` is a pure function of its arguments and the sampler's seed.

    Args:
        store: Open split of a packed data set.
        sampler: Selects the samples of each batch.
        transform: Computes the model input.
        device: Device of the batches.
        rank: Rank of this process.
        world_size: Number of ranks that share each epoch.
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
        self._buffers = BufferPool(device)
        self._table: tuple[NDArray[np.uint8], torch.Tensor] | None = None
        self.sampler = sampler
        # Steps are fused in groups that depend on their numbers only, so a resumed epoch makes the same calls.
        fused_steps = max(1, transform.max_fused_batch * world_size // sampler.batch_size)
        self._fused_steps = fused_steps if sampler.can_fuse else 1

    def batches(self, epoch: int = 0, first_step: int = 0) -> Generator[Batch, None, None]:
        """Iterate over this rank's batches of an epoch, from global step `first_step` on."""
        steps = self.sampler.steps(epoch, self._rank, self._world_size, first_step - first_step % self._fused_steps)
        batches = self._prepare(steps, first_step)
        return prefetch(batches, _PREFETCH_BATCHES) if self._device.type == "cuda" else batches

    def _prepare(self, steps: Iterator[BatchIndices], first_step: int) -> Generator[Batch, None, None]:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # the current device is a property of the thread
        while group := list(itertools.islice(steps, self._fused_steps)):
            batches = self._load(group)[::-1]
            while batches:
                batch = batches.pop()
                if batch.step >= first_step:
                    yield batch
                del batch  # keep no reference, so that the consumer can free it

    def _load(self, steps: list[BatchIndices]) -> list[Batch]:
        """Compute the batches of several steps in one call of the transform."""
        samples = steps[0].samples if len(steps) == 1 else np.concatenate([step.samples for step in steps])
        images = self._read(samples)
        params = [step.params for step in steps if step.params is not None]
        try:
            model_input = self._transform(images, AugmentationParams.concatenate(params) if params else None)
        except UndecodableImage as error:
            raise undecodable_image_error(self._store, int(samples[error.position]), error.reason) from None
        sizes = [len(step.samples) for step in steps]
        return [
            Batch(images, labels, source_index, step.step, step.global_size)
            for step, images, labels, source_index in zip(
                steps,
                model_input.split(sizes),
                torch.from_numpy(self._store.labels.take(samples)).to(self._device, non_blocking=True).split(sizes),
                torch.from_numpy(self._store.rows.take(samples)).to(self._device, non_blocking=True).split(sizes),
                strict=True,
            )
        ]

    def _read(self, samples: NDArray[np.int64]) -> Images:
        store = self._store
        if not is_image_store(store):
            return store.read(samples)
        images = self._buffers.array((len(samples), *store.manifest.pixel_shape))
        located = store.locate(samples)
        if located is None:
            store.gather(samples, images)
        else:
            # index_select copies on all cores, and each core then has its images in its cache.
            table, rows = self._as_tensor(located.table), torch.from_numpy(located.rows)
            torch.index_select(table, 0, rows, out=torch.from_numpy(images).view(len(rows), -1))
        return images

    def _as_tensor(self, table: NDArray[np.uint8]) -> torch.Tensor:
        if self._table is None or self._table[0] is not table:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
                self._table = table, torch.from_numpy(table)
        return self._table[1]


def undecodable_image_error(store: Store, sample: int, reason: str) -> UserError:
    """Return the error for an image file of a store that cannot be decoded."""
    location = cast(EncodedStore, store).describe_sample(sample)
    return UserError(
        found=f"{location} (row {store.rows[sample]}): {reason}",
        expected="an image that can be decoded",
        hint="python -m shards.verify DIR lists all damaged images; pack or download the shards again",
    )


def prefetch(items: Iterable[T], depth: int) -> Generator[T, None, None]:
    """Iterate over items in a thread, up to `depth` items ahead of the consumer.

    An exception of the iteration is raised in the consumer. The thread ends when the iteration ends or the iterator is
    closed.
    """
    iterator, end = iter(items), object()
    pool = ThreadPoolExecutor(1, thread_name_prefix="loader")
    waiting = deque(pool.submit(next, iterator, end) for _ in range(depth + 1))
    try:
        while (item := waiting.popleft().result()) is not end:
            waiting.append(pool.submit(next, iterator, end))
            yield cast(T, item)
    finally:
        pool.shutdown(cancel_futures=True)
