"""The packed set as training sees it: a train, a validation and a test loader over one graph."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.common.stratified import stratified_mask
from pipeline.ink.adapter import InputAdapter
from pipeline.loader import Loader
from pipeline.normalization import load_or_compute_stats
from pipeline.sampler import SequentialBatchSampler, ShuffledBatchSampler, max_shuffle_window
from pipeline.transforms.build import build_transform, choose_backend
from pipeline.transforms.spec import Transform, TransformSpec
from shards import Manifest, UserError, open_split
from shards.manifest import VALIDATION, has_split
from shards.remote.sets import resolve_dataset
from shards.stores.base import Store
from shards.verify.check import check_hashes
from trainer.config.schema import Config
from trainer.data.resolution_schedule import ResolutionStage, TrainingLoader, resolution_stages
from trainer.runtime.distributed import World
from trainer.runtime.memory import memory_limit

log = logging.getLogger(__name__)

_MOST_IN_EVALUATION = 512  # images of an evaluation batch
_TRAIN_SHARE = 0.75  # of the memory for images, the rest is for the other parts


@dataclass(frozen=True)
class TrainingData:
    """What a run learns from and is judged by.

    spec: of the model input that is evaluated. adapter: how other pictures are brought to the set's images.
    train: over what remains of the train part; validation: over the part set aside or packed so, None if there
    is none;
    test: over the test part. counts: int64 [C], training samples of each class. digest: stands for both parts.
    """

    manifest: Manifest
    digest: str
    spec: TransformSpec
    adapter: InputAdapter
    backend: str
    backend_reason: str
    counts: NDArray[np.int64]
    train: TrainingLoader
    validation: Loader | None
    test: Loader
    test_store: Store

    @property
    def classes(self) -> tuple[str, ...]:
        return self.manifest.classes


def open_data(config: Config, world: World) -> TrainingData:
    """Open a packed set, check it, take or carve the validation part and measure the statistics of the model input."""
    directory = resolve_dataset(config.data.shards)
    memory = _memory(config.loader.cache_gb)
    train_store = open_split(directory, "train", int(memory * _TRAIN_SHARE))
    # Evaluation goes through a part in order, and gains nothing from holding more of it.
    others = {"memory": int(memory * (1 - _TRAIN_SHARE) / 2)}
    test_store = open_split(directory, "test", **others)
    stores = [train_store, test_store]
    own_validation = has_split(directory, VALIDATION)
    if own_validation:
        stores.append(open_split(directory, VALIDATION, **others))
    for store in stores[1:]:
        _check_parts_agree(train_store.manifest, store.manifest, directory)
    if config.data.verify:
        world.run_on_main(lambda: _check_hashes(directory, *stores))

    aside = 0 if own_validation else config.data.val_fraction
    train, validation = split_train_val(train_store.labels, aside, config.data.train_fraction, config.seed)
    validation_store = stores[2] if own_validation else train_store
    if own_validation:
        validation = np.arange(len(validation_store))
    if min(len(train), config.loader.batch_size) < 2 * world.size:
        raise UserError(
            found=f"{len(train)} training samples in batches of {config.loader.batch_size} for {world.size} ranks",
            expected="at least two samples of every batch for each rank, which batch normalisation needs",
            hint="raise loader.batch_size or data.train_fraction, or start fewer ranks",
        )
    if aside > 0 and not len(validation):
        raise UserError(
            found=f"data.val_fraction={config.data.val_fraction} of {len(train_store)} samples, which is none",
            expected="a part that holds at least one sample",
            hint="raise it, or data.val_fraction=0 to train without",
        )
    manifest = train_store.manifest
    parts = resolution_stages(config)
    spec = TransformSpec.of(manifest, parts[-1].resolution, config.data.interpolation, config.data.preprocessing())
    augmentation = config.augment.augmentation()
    if manifest.image_shape[2] == 1 and (augmentation.saturation or augmentation.hue):
        log.warning("augment.saturation and augment.hue have no effect on images without colour")
    backend, reason = choose_backend(config.loader.backend, world.device, spec)
    specs = {
        resolution: _normalised(replace(spec, resolution=resolution), config, train_store, directory, backend, world)
        for resolution in sorted({stage.resolution for stage in parts})
    }
    spec = specs[parts[-1].resolution]
    largest_batch = max(stage.batch_size for stage in parts)
    graph = build_transform(spec, backend, world.device, parts[-1].batch_size)

    def graph_of(stage: ResolutionStage) -> Transform:
        if stage[1:] == parts[-1][1:] and not augmentation:
            return graph
        return build_transform(specs[stage.resolution], backend, world.device, stage.batch_size, augmentation)

    ranks = {"rank": world.rank, "world_size": world.size}
    window = world.broadcast_object(max_shuffle_window(manifest, int(memory * _TRAIN_SHARE), largest_batch))
    order = ShuffledBatchSampler(
        train, config.loader.batch_size, config.seed, manifest.block_size, window, augmentation
    )
    return TrainingData(
        manifest=manifest,
        digest="".join(store.manifest.digest() for store in stores),
        spec=spec,
        adapter=InputAdapter.of(train_store),
        backend=backend,
        backend_reason=reason,
        counts=np.bincount(train_store.labels[train], minlength=len(manifest.classes)),
        train=TrainingLoader(train_store, order, parts, graph_of, world.device, **ranks),
        validation=evaluation_loader(validation_store, validation, graph, config, world) if len(validation) else None,
        test=evaluation_loader(test_store, np.arange(len(test_store)), graph, config, world),
        test_store=test_store,
    )


def _normalised(
    spec: TransformSpec, config: Config, store: Store, directory: Path, backend: str, world: World
) -> TransformSpec:
    """A spec with the mean and deviation of the train part at its resolution, or that brings pixels to -1 .. 1."""
    if config.data.normalize == "half":
        half = (0.5,) * spec.image_shape[2]
        return spec.with_normalization(half, half)
    statistics = world.run_on_main(
        lambda: load_or_compute_stats(store, directory / "train", spec, backend, world.device)
    )
    return spec.with_normalization(statistics.mean, statistics.std)


def _memory(setting: float | Literal["auto"]) -> int:
    """Bytes of images that this process may hold."""
    if setting != "auto":
        return int(setting * 1e9)
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return memory_limit() // 2 // local_ranks


def split_train_val(
    labels: NDArray[np.int64], validation: float, subset: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions to train on and positions to validate on, each by class and by the seed; they share none.

    validation: share of all samples. subset: share of the others that is trained on, so that a smaller subset is
    judged by the same validation part.
    """
    aside = stratified_mask(labels, validation, seed)
    rest = np.flatnonzero(~aside)
    return rest[stratified_mask(labels[rest], subset, seed)], np.flatnonzero(aside)


def evaluation_loader(
    store: Store, samples: NDArray[np.int64], graph: Transform, config: Config, world: World
) -> Loader:
    """A loader that gives every sample once, dealt to the ranks.

    The size of its batches follows from the settings, not from the number of ranks, so that predictions are the same
    to the last bit on any number.
    """
    order = SequentialBatchSampler(samples, min(config.loader.batch_size, _MOST_IN_EVALUATION))
    return Loader(store, order, graph, world.device, rank=world.rank, world_size=world.size)


def _check_parts_agree(train: Manifest, test: Manifest, directory: Path) -> None:
    for what, in_train, in_test in (
        ("classes", train.classes, test.classes),
        ("image shape", train.image_shape, test.image_shape),
        ("orientation", train.transposed, test.transposed),
    ):
        if in_train != in_test:
            raise UserError(
                found=f"{directory}: {what} {in_train} in {train.split}, {in_test} in {test.split}",
                expected="parts of one data set",
                hint="pack the set again: python -m pipeline.shard SOURCE --out DIR --force",
            )


def _check_hashes(directory: Path, *stores: Store) -> None:
    faults = [fault for store in stores for fault in check_hashes(directory / store.manifest.split, store.manifest)]
    if faults:
        raise UserError(
            found="; ".join(faults),
            expected="shards as they were packed",
            hint=f"python -m shards.verify {directory} names the block; then pack again with --force",
        )
