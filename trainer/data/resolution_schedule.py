"""Progressive resizing: resolution and batch size of each epoch, and a loader that follows them."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import replace
from typing import NamedTuple

from pipeline.loader import Batch, Loader
from pipeline.sampler import ShuffledBatchSampler
from pipeline.transforms.preprocess import Resolution, input_size
from pipeline.transforms.spec import Transform
from shards.stores.base import Store
from trainer.config.schema import Config
from trainer.runtime.distributed import World

_BATCH_MULTIPLE = 8  # images; matrix units prefer such sizes


class ResolutionStage(NamedTuple):
    """Consecutive epochs with the same resolution and batch size."""

    first: int
    """First epoch, from 0."""
    resolution: Resolution
    """Side of a square model input in pixels, or `HEIGHTxWIDTH`."""
    batch_size: int
    """Images of a global batch."""

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width of the model input in pixels."""
        return input_size(self.resolution)


def resolution_stages(config: Config) -> tuple[ResolutionStage, ...]:
    """Return the stages of a run; one, unless `data.resolution` is a schedule."""
    starts = config.data.resolution_by_epoch()
    largest = max(math.prod(input_size(resolution)) for _, resolution in starts)
    size = config.loader.batch_size
    stages = []
    for epoch, resolution in starts:
        scaled = size * largest // math.prod(input_size(resolution)) // _BATCH_MULTIPLE * _BATCH_MULTIPLE
        batch_size = max(size, scaled) if config.loader.scale_batch_with_resolution else size
        stages.append(ResolutionStage(epoch - 1, resolution, batch_size))
    return tuple(stages)


class TrainingLoader:
    """Training batches, each epoch at the resolution and batch size of its stage.

    Like `Loader` it has no state: a batch is a function of (epoch, step).

    Args:
        store: The training images.
        sampler: Its batch size is replaced by that of the stage.
        stages: The stages of the run.
        make_transform: Builds the transform of a stage when it starts.
        world: Rank and device of this process.

    Attributes:
        stages: The stages of the run.
        window: See `ShuffledBatchSampler.shuffle_window_blocks`.
        window_of_shards: Whether the units of the shuffle window are shards.
        timed: Wraps transforms to measure their time; without a profiler it returns them as they are.
        samples: Positions in the store of the samples of an epoch.
    """

    def __init__(
        self,
        store: Store,
        sampler: ShuffledBatchSampler,
        stages: tuple[ResolutionStage, ...],
        make_transform: Callable[[ResolutionStage], Transform],
        world: World,
    ) -> None:
        self.stages = stages
        self.window = sampler.shuffle_window_blocks
        self.window_of_shards = sampler.unit_bounds is not None
        self.timed: Callable[[Transform], Transform] = lambda transform: transform
        self.samples = sampler.samples
        self._store = store
        self._sampler = sampler
        self._make_transform = make_transform
        self._world = world
        self._open: tuple[ResolutionStage, Loader] | None = None

    def stage_at(self, epoch: int) -> ResolutionStage:
        """Return the stage of an epoch, from 0."""
        return [stage for stage in self.stages if stage.first <= epoch][-1]

    def sampler_at(self, epoch: int) -> ShuffledBatchSampler:
        """Return the sampler of an epoch; each stage leaves out the samples that follow those of the stage before."""
        sampler, offset = self._sampler, 0
        for stage in self.stages:
            if stage.first <= epoch:
                before, sampler = sampler.left_out, replace(sampler, batch_size=stage.batch_size)
                offset += stage.first * (before - sampler.left_out)
        units = self._store.shard_bounds if self.window_of_shards else None
        return replace(sampler, left_out_offset=offset, shuffle_window_blocks=self.window, unit_bounds=units)

    def steps(self, epoch: int) -> int:
        """Return the number of global batches of an epoch."""
        return self.sampler_at(epoch).steps_per_epoch

    def batches(self, epoch: int = 0, first_step: int = 0) -> Generator[Batch, None, None]:
        """Yield this rank's batches of an epoch, from global step `first_step`."""
        stage = self.stage_at(epoch)
        if self._open is None or self._open[0] != stage:
            self._open = None  # free the memory of the previous stage
            transform = self.timed(self._make_transform(stage))
            sampler, world = self.sampler_at(epoch), self._world
            loader = Loader(self._store, sampler, transform, world.device, rank=world.rank, world_size=world.size)
            self._open = (stage, loader)
        return self._open[1].batches(epoch, first_step)
