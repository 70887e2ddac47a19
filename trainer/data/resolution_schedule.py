"""Progressive resizing: which resolution and which batch an epoch has, and the batches of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.loader import Batch, Loader
from pipeline.sampler import ShuffledBatchSampler
from pipeline.transforms.spec import Transform
from shards.stores.base import Store
from trainer.config.schema import Config

_BATCH_MULTIPLE = 8  # of images: sizes that processors divide well


class Phase(NamedTuple):
    """Epochs alike. first: the first of them, from 0. resolution: in pixels. batch_size: images of a global batch."""

    first: int
    resolution: int
    batch_size: int


def phases(config: Config) -> tuple[Phase, ...]:
    """The phases of a run, one unless `data.resolution` is a schedule."""
    starts = config.data.resolution_by_epoch()
    largest = max(resolution for _, resolution in starts)
    size = config.loader.batch_size
    found = []
    for epoch, resolution in starts:
        scaled = int(size * (largest / resolution) ** 2) // _BATCH_MULTIPLE * _BATCH_MULTIPLE
        found.append(
            Phase(epoch - 1, resolution, max(size, scaled) if config.loader.scale_batch_with_resolution else size)
        )
    return tuple(found)


class TrainingLoader:
    """Batches for training, each epoch at its phase's resolution and batch size.

    samples: int64 [N], the positions in the store that an epoch consists of. window: see `ShuffledBatchSampler`.
    Like a `Loader` it keeps no state: which batch comes when follows from (epoch, step).
    """

    def __init__(
        self,
        store: Store,
        order: ShuffledBatchSampler,
        phases: tuple[Phase, ...],
        graph: Callable[[Phase], Transform],
        device: torch.device,
        *,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """order: its batch size is replaced by the phase's. graph: builds the graph of a phase, when it begins."""
        self.phases = phases
        self.window = order.shuffle_window_blocks
        self._store = store
        self._order = order
        self._graph = graph
        self._device = device
        self._ranks = {"rank": rank, "world_size": world_size}
        self.timed: Callable[[Transform], Transform] | None = None
        """Wraps graphs, to take their time."""
        self._open: tuple[Phase, Loader] | None = None

    @property
    def samples(self) -> NDArray[np.int64]:
        return self._order.samples

    def phase(self, epoch: int) -> Phase:
        return [phase for phase in self.phases if phase.first <= epoch][-1]

    def order(self, epoch: int) -> ShuffledBatchSampler:
        return replace(self._order, batch_size=self.phase(epoch).batch_size, shuffle_window_blocks=self.window)

    def steps(self, epoch: int) -> int:
        """Global batches of an epoch."""
        return self.order(epoch).steps_per_epoch

    def batches(self, epoch: int = 0, first_step: int = 0) -> Iterator[Batch]:
        """This rank's batches of an epoch, from global step `first_step` on."""
        phase = self.phase(epoch)
        if self._open is None or self._open[0] != phase:
            self._open = None  # the memory of the phase before
            graph = self._graph(phase)
            if self.timed is not None:
                graph = self.timed(graph)
            self._open = (phase, Loader(self._store, self.order(epoch), graph, self._device, **self._ranks))
        return self._open[1].batches(epoch, first_step)

    def steps_ahead(self, epoch: int, epochs: int) -> float:
        """How many steps of this epoch take as long as all later ones, going by their pixels."""
        now = self.phase(epoch).resolution ** 2
        return self.steps(epoch) * sum(self.phase(later).resolution ** 2 / now for later in range(epoch + 1, epochs))
