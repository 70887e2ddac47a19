"""The data loader: the sampler selects samples, the store reads them, the transform computes the model input."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar, cast

import numpy as np
import torch

from pipeline.common.batch_source import make_source
from pipeline.common.device import with_index
from pipeline.sampler import BatchIndices, BatchSampler
from pipeline.transforms.augmentation import AugmentationParams
from pipeline.transforms.spec import Transform, UndecodableImage
from shards.errors import UserError
from shards.stores.base import Store
from shards.stores.records import RecordStore

T = TypeVar("T")

_PREFETCH_BATCHES = 2  # batches prepared ahead for a GPU
_LOADING = threading.Lock()


@dataclass(frozen=True)
class Batch:
    """The samples of a global batch that belong to one rank, on the device.

    Attributes:
        images: float32 [n, C, R, S], the size of the model input, normalized.
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

    On a GPU, a thread prefetches batches, in a CUDA stream of its own. On a CPU, model and loader compete for the same
    cores, so a batch is prepared when it is requested. Several small training batches are computed in one call of the
    transform, which is faster than a call for each.

    The loader has no state: `batches(epoch, first_step)` is a pure function of its arguments and the sampler's seed.

    Args:
        store: Open split of a packed data set.
        sampler: Selects the samples of each batch.
        transform: Computes the model input.
        device: Device of the batches.
        rank: Rank of this process.
        world_size: Number of ranks that share each epoch.

    Attributes:
        classes: Number of classes of the data set.
        sampler: Selects the samples of each batch.
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
        self._device = device = with_index(device)
        self._rank = rank
        self._world_size = world_size
        self._source = make_source(store, device)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.sampler = sampler
        self.classes = len(store.manifest.classes)
        # Steps are fused in groups that depend on their numbers only, so a resumed epoch makes the same calls.
        fused_steps = max(1, transform.max_fused_batch * world_size // sampler.batch_size)
        self._fused_steps = fused_steps if sampler.can_fuse else 1

    def batches(self, epoch: int = 0, first_step: int = 0) -> Generator[Batch, None, None]:
        """Iterate over this rank's batches of an epoch, from global step `first_step` on."""
        steps = self.sampler.steps(epoch, self._rank, self._world_size, first_step - first_step % self._fused_steps)
        batches = self._prepare(steps, epoch, first_step)
        if self._stream is None:
            return batches
        # Constants of the transform and resident images may still be on their way.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        return self._receive(prefetch(map(self._mark_ready, batches), _PREFETCH_BATCHES))

    def _mark_ready(self, batch: Batch) -> tuple[Batch, torch.cuda.Event]:
        assert self._stream is not None
        return batch, self._stream.record_event()

    def _receive(
        self, prefetched: Generator[tuple[Batch, torch.cuda.Event], None, None]
    ) -> Generator[Batch, None, None]:
        """Hand batches over from the loader's stream to the stream of the caller."""
        with contextlib.closing(prefetched):
            for batch, ready in prefetched:
                stream = torch.cuda.current_stream(self._device)
                stream.wait_event(ready)
                for tensor in (batch.images, batch.labels, batch.source_index):
                    tensor.record_stream(stream)  # the loader's stream must not reuse memory that this one reads
                yield batch
                del batch, tensor

    def _prepare(self, steps: Iterator[BatchIndices], epoch: int, first_step: int) -> Generator[Batch, None, None]:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # the current device is a property of the thread
        plan = partial(self.sampler.shard_uses, epoch, self._rank, self._world_size, first_step)
        with self._store.prefetch(plan) as advance:
            while group := list(itertools.islice(steps, self._fused_steps)):
                advance(group[0].step)
                with contextlib.nullcontext() if self._stream is None else _alone_in_stream(self._stream):
                    batches = self._load(group)[::-1]
                while batches:
                    batch = batches.pop()
                    if batch.step >= first_step:
                        yield batch
                    del batch  # keep no reference, so that the consumer can free it

    def _load(self, steps: list[BatchIndices]) -> list[Batch]:
        """Compute the batches of several steps in one call of the transform."""
        store = self._store
        samples = steps[0].samples if len(steps) == 1 else np.concatenate([step.samples for step in steps])
        drawn = [step.params for step in steps if step.params is not None]
        params = AugmentationParams.concatenate(drawn) if drawn else None
        # Image files are cropped by their sizes, which the transform reads from them on the host.
        arrays = {} if store.manifest.encoded else self._transform.op_params(params)
        arrays |= {
            name: values.take(samples).astype(np.int64, copy=False)
            for name, values in (("labels", store.labels), ("source_index", store.rows))
        }
        images, on_device = self._source.load(samples, arrays)
        labels, source_index = on_device.pop("labels"), on_device.pop("source_index")
        try:
            model_input = self._transform(images, params if store.manifest.encoded else on_device)
        except UndecodableImage as error:
            raise undecodable_image_error(store, int(samples[error.position]), error.reason) from None
        sizes = [len(step.samples) for step in steps]
        return [
            Batch(images, labels, source_index, step.step, step.global_size)
            for step, images, labels, source_index in zip(
                steps, model_input.split(sizes), labels.split(sizes), source_index.split(sizes), strict=True
            )
        ]


@contextlib.contextmanager
def _alone_in_stream(stream: torch.cuda.Stream) -> Iterator[None]:
    """Enter a stream and hold the lock of the process: iterators in several threads may share a loader or transform."""
    with _LOADING, torch.cuda.stream(stream):
        yield


def undecodable_image_error(store: Store, sample: int, reason: str) -> UserError:
    """Return the error for an image file of a store that cannot be decoded."""
    location = cast(RecordStore, store).describe_sample(sample)
    return UserError(
        found=f"{location} (row {store.rows[sample]}): {reason}",
        expected="an image that can be decoded",
        hint="python -m shards.verify DIR lists all damaged images; pack or download the shards again",
    )


def prefetch(items: Iterable[T], depth: int) -> Generator[T, None, None]:
    """Iterate over items in a thread, up to `depth` items ahead of the consumer; the thread starts at once.

    An exception of the iteration is raised in the consumer. The thread ends when the iteration ends or the iterator is
    closed.
    """
    prefetched = _prefetch(iter(items), depth)
    next(prefetched)
    return prefetched


def _prefetch(iterator: Iterator[T], depth: int) -> Generator[T, None, None]:
    end, owner = object(), threading.get_ident()
    pool = ThreadPoolExecutor(1, thread_name_prefix="loader")
    waiting = deque(pool.submit(next, iterator, end) for _ in range(depth + 1))
    try:
        yield cast(T, None)  # the thread is at work
        while (item := waiting.popleft().result()) is not end:
            waiting.append(pool.submit(next, iterator, end))
            yield cast(T, item)
            del item  # before the next one is waited for
    finally:
        # The garbage collector may close this iterator in any thread. The lock may be held for that thread, so waiting
        # for the thread of this iterator could deadlock.
        pool.shutdown(wait=threading.get_ident() == owner, cancel_futures=True)
