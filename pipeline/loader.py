"""Batches on a device: the order says which samples, the store gives their bytes, the graph the model input."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from pipeline.graph import Graph
from pipeline.order import Order, Step
from shards.store import Store

T = TypeVar("T")

_AHEAD = 2  # batches prepared before they are asked for


@dataclass(frozen=True)
class Batch:
    """One rank's share of a global batch, on the device.

    images: float32 [n, C, R, R], normalised. labels: int64 [n]. rows: int64 [n], rows in the raw source.
    step: number of the global batch within the epoch. global_size: samples of it over all ranks.
    """

    images: torch.Tensor
    labels: torch.Tensor
    rows: torch.Tensor
    step: int
    global_size: int


class Loader:
    """Iterates over the batches of an epoch, prepared ahead by one thread.

    It keeps no state: `batches(epoch, first_step)` is a pure function of its arguments and the order's seed.
    rank, world_size: this process among those that share the work.
    """

    def __init__(
        self,
        store: Store,
        order: Order,
        graph: Graph,
        device: torch.device,
        *,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._store = store
        self._graph = graph
        self._device = device
        self._rank = rank
        self._world_size = world_size
        self.order = order

    def batches(self, epoch: int = 0, first_step: int = 0) -> Iterator[Batch]:
        """This rank's batches of an epoch, from global step `first_step` on."""
        steps = self.order.steps(epoch, self._rank, self._world_size, first_step)
        return run_ahead(self._prepare(steps), _AHEAD)

    def _prepare(self, steps: Iterator[Step]) -> Iterator[Batch]:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # the current device is a property of the thread
        for step in steps:
            yield self._load(step)

    def _load(self, step: Step) -> Batch:
        images = np.empty((len(step.samples), *self._store.manifest.image_shape), np.uint8)
        self._store.gather(step.samples, images)
        return Batch(
            images=self._graph(images),
            labels=torch.from_numpy(self._store.labels[step.samples]).to(self._device, non_blocking=True),
            rows=torch.from_numpy(self._store.rows[step.samples]).to(self._device, non_blocking=True),
            step=step.number,
            global_size=step.global_size,
        )


def run_ahead(items: Iterable[T], depth: int) -> Iterator[T]:
    """Iterate in a thread of its own, up to `depth` items ahead.

    An exception there is raised here. The thread ends when the iteration ends or the iterator is closed.
    """
    ready: queue.Queue = queue.Queue(maxsize=depth)
    closed = threading.Event()

    def put(message: tuple[str, object]) -> bool:
        while not closed.is_set():
            try:
                ready.put(message, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not put(("item", item)):
                    return
            put(("end", None))
        except BaseException as error:
            put(("error", error))

    thread = threading.Thread(target=work, name="loader", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        closed.set()
        thread.join()
