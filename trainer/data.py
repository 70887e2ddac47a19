"""The packed set as training sees it: a train, a validation and a test loader over one graph."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.backend import choose_backend, make_graph
from pipeline.graph import Graph, GraphSpec
from pipeline.loader import Loader
from pipeline.order import EvaluationOrder, TrainingOrder
from pipeline.partition import stratified
from pipeline.statistics import cached
from shards import Manifest, Store, UserError, open_part
from shards.verify import check_hashes
from trainer.distributed import World
from trainer.settings import Config

log = logging.getLogger(__name__)

_MOST_IN_EVALUATION = 512  # images of an evaluation batch


@dataclass(frozen=True)
class TrainingData:
    """What a run learns from and is judged by.

    train: loader over what remains of the train part; validation: over the part set aside, None if there is none;
    test: over the test part. counts: int64 [C], training samples of each class. digest: stands for both parts.
    """

    manifest: Manifest
    digest: str
    spec: GraphSpec
    backend: str
    backend_reason: str
    counts: NDArray[np.int64]
    train: Loader
    validation: Loader | None
    test: Loader
    test_store: Store

    @property
    def classes(self) -> tuple[str, ...]:
        return self.manifest.classes


def open_data(config: Config, world: World) -> TrainingData:
    """Open a packed set, check it, carve the validation part and measure the statistics of the model input."""
    directory = config.data.shards
    train_store, test_store = open_part(directory, "train"), open_part(directory, "test")
    _check_parts_agree(train_store.manifest, test_store.manifest, directory)
    if config.data.verify:
        world.on_first(lambda: _check_hashes(directory, train_store, test_store))

    train, validation = carve(train_store.labels, config.data.validation, config.data.subset, config.seed)
    if min(len(train), config.loader.batch_size) < 2 * world.size:
        raise UserError(
            found=f"{len(train)} training samples in batches of {config.loader.batch_size} for {world.size} ranks",
            expected="at least two samples of every batch for each rank, which batch normalisation needs",
            hint="raise loader.batch_size or data.subset, or start fewer ranks",
        )
    if config.data.validation > 0 and not len(validation):
        raise UserError(
            found=f"data.validation={config.data.validation} of {len(train_store)} samples, which is none",
            expected="a part that holds at least one sample",
            hint="raise it, or data.validation=0 to train without",
        )
    backend, reason = choose_backend(config.loader.backend, world.device)
    spec = GraphSpec.of(train_store.manifest, config.data.resolution, config.data.interpolation)
    statistics = world.on_first(lambda: cached(train_store, directory / "train", spec, backend, world.device))
    spec = spec.normalised(statistics.mean, statistics.std)
    graph = make_graph(spec, backend, world.device, config.loader.batch_size)

    ranks = {"rank": world.rank, "world_size": world.size}
    train_order = TrainingOrder(train, config.loader.batch_size, config.seed)
    return TrainingData(
        manifest=train_store.manifest,
        digest=train_store.manifest.digest() + test_store.manifest.digest(),
        spec=spec,
        backend=backend,
        backend_reason=reason,
        counts=np.bincount(train_store.labels[train], minlength=len(train_store.manifest.classes)),
        train=Loader(train_store, train_order, graph, world.device, **ranks),
        validation=evaluation_loader(train_store, validation, graph, config, world) if len(validation) else None,
        test=evaluation_loader(test_store, np.arange(len(test_store)), graph, config, world),
        test_store=test_store,
    )


def carve(
    labels: NDArray[np.int64], validation: float, subset: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions to train on and positions to validate on, each by class and by the seed; they share none.

    validation: share of all samples. subset: share of the others that is trained on, so that a smaller subset is
    judged by the same validation part.
    """
    aside = stratified(labels, validation, seed)
    rest = np.flatnonzero(~aside)
    return rest[stratified(labels[rest], subset, seed)], np.flatnonzero(aside)


def evaluation_loader(store: Store, samples: NDArray[np.int64], graph: Graph, config: Config, world: World) -> Loader:
    """A loader that gives every sample once, dealt to the ranks.

    The size of its batches follows from the settings, not from the number of ranks, so that predictions are the same
    to the last bit on any number.
    """
    order = EvaluationOrder(samples, min(config.loader.batch_size, _MOST_IN_EVALUATION))
    return Loader(store, order, graph, world.device, rank=world.rank, world_size=world.size)


def _check_parts_agree(train: Manifest, test: Manifest, directory: Path) -> None:
    for what, in_train, in_test in (
        ("classes", train.classes, test.classes),
        ("image shape", train.image_shape, test.image_shape),
        ("orientation", train.transposed, test.transposed),
    ):
        if in_train != in_test:
            raise UserError(
                found=f"{directory}: {what} {in_train} in train, {in_test} in test",
                expected="two parts of one data set",
                hint="pack the set again: python -m pipeline.shard SOURCE --out DIR --force",
            )


def _check_hashes(directory: Path, *stores: Store) -> None:
    faults = [fault for store in stores for fault in check_hashes(directory / store.manifest.part, store.manifest)]
    if faults:
        raise UserError(
            found="; ".join(faults),
            expected="shards as they were packed",
            hint=f"python -m shards.verify {directory} names the block; then pack again with --force",
        )
