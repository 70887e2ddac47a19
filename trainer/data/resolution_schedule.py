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


class ResolutionStage(NamedTuple):
    """Epochs alike. first: the first of them, from 0. resolution: in pixels. batch_size: images of a global batch."""

    first: int
    resolution: int
    batch_size: int


def resolution_stages(config: Config) -> tuple[ResolutionStage, ...]:
    """The stages of a run, one unless `data.resolution` is a schedule."""
    starts = config.data.resolution_by_epoch()
    largest = max(resolution for _, resolution in starts)
    size = config.loader.batch_size
    found = []
    for epoch, resolution in starts:
        scaled = int(size * (largest / resolution) ** 2) // _BATCH_MULTIPLE * _BATCH_MULTIPLE
        batch_size = max(size, scaled) if config.loader.scale_batch_with_resolution else size
        found.append(ResolutionStage(epoch - 1, resolution, batch_size))
    return tuple(found)


class TrainingLoader:
    """Batches for training, each epoch at its stage's resolution and batch size.

    samples: int64 [N], the positions in the store that an epoch consists of. window: see `ShuffledBatchSampler`.
    Like a `Loader` it keeps no state: which batch comes when follows from (epoch, step).
    """

    def __init__(
        self,
        store: Store,
        order: ShuffledBatchSampler,
        stages: tuple[ResolutionStage, ...],
        graph: Callable[[ResolutionStage], Transform],
        device: torch.device,
        *,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """order: its batch size is replaced by the stage's. graph: builds the graph of a stage, when it begins."""
        self.stages = stages
        self.window = order.shuffle_window_blocks
        self._store = store
        self._order = order
        self._graph = graph
        self._device = device
        self._ranks = {"rank": rank, "world_size": world_size}
        self.timed: Callable[[Transform], Transform] | None = None
        """Wraps graphs, to take their time."""
        self._open: tuple[ResolutionStage, Loader] | None = None

    @property
    def samples(self) -> NDArray[np.int64]:
        return self._order.samples

    def stage_at(self, epoch: int) -> ResolutionStage:
        return [stage for stage in self.stages if stage.first <= epoch][-1]

    def order(self, epoch: int) -> ShuffledBatchSampler:
        return replace(self._order, batch_size=self.stage_at(epoch).batch_size, shuffle_window_blocks=self.window)

    def steps(self, epoch: int) -> int:
        """Global batches of an epoch."""
        return self.order(epoch).steps_per_epoch

    def batches(self, epoch: int = 0, first_step: int = 0) -> Iterator[Batch]:
        """This rank's batches of an epoch, from global step `first_step` on."""
        stage = self.stage_at(epoch)
        if self._open is None or self._open[0] != stage:
            self._open = None  # the memory of the stage before
            graph = self._graph(stage)
            if self.timed is not None:
                graph = self.timed(graph)
            self._open = (stage, Loader(self._store, self.order(epoch), graph, self._device, **self._ranks))
        return self._open[1].batches(epoch, first_step)

    def steps_ahead(self, epoch: int, epochs: int) -> float:
        """How many steps of this epoch take as long as all later ones, going by their pixels."""
        now = self.stage_at(epoch).resolution ** 2
        return self.steps(epoch) * sum(self.stage_at(later).resolution ** 2 / now for later in range(epoch + 1, epochs))
