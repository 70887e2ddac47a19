"""The packed data set of a run: loaders of the training, validation and test split, and the input statistics."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.common.batch_source import ResidentStore, keep_on_device
from pipeline.common.index_ranges import IndexRanges, Positions
from pipeline.common.labelled_samples import LabelledSamples, SamplesByClass
from pipeline.ink.adapter import InputAdapter
from pipeline.loader import Loader
from pipeline.normalization import load_or_compute_stats
from pipeline.sampler import SequentialBatchSampler, ShuffledBatchSampler, max_shuffle_window, shard_window
from pipeline.transforms.build import build_transform, choose_backend
from pipeline.transforms.preprocess import Resolution
from pipeline.transforms.spec import Transform, TransformSpec
from shards import Manifest, UserError, open_split
from shards.atomic import detect_replacement, replaced_error
from shards.cli import plural
from shards.errors import quote
from shards.manifest import VALIDATION, VERSION, check_several_classes, has_split, manifest_paths
from shards.remote.datasets import resolve_dataset
from shards.stores.base import Store
from shards.verify.check import check_hashes
from trainer.config.schema import Config
from trainer.data.resolution_schedule import ResolutionStage, TrainingLoader, resolution_stages
from trainer.runtime.distributed import World
from trainer.runtime.memory import memory_limit

log = logging.getLogger(__name__)

_MAX_EVALUATION_BATCH = 512  # images
_TRAIN_MEMORY = 0.75  # fraction of the memory for images; the other splits share the rest


@dataclass(frozen=True)
class TrainingData:
    """The data of a run."""

    manifest: Manifest
    """Of the training split."""
    identity: str
    """Manifest identities of all splits, which do not change when the format is upgraded."""
    spec: TransformSpec
    """The transform of evaluation."""
    statistics: dict[tuple[int, int], tuple[tuple[float, ...], tuple[float, ...]]]
    """Mean and std that normalize the model input of each stage, by its height and width."""
    adapter: InputAdapter
    """Converts other pictures to the format of the data set."""
    backend: str
    backend_reason: str
    counts: NDArray[np.int64]
    """[C], training samples of each class."""
    drawn: NDArray[np.int64]
    """[C], samples of each class in an epoch; other numbers with class-balanced sampling (`data.class_balance`)."""
    train: TrainingLoader
    validation: Loader | None
    has_val_split: bool
    """Whether the validation images are a split of the data set; otherwise they are part of the training split."""
    test: Loader
    test_store: Store

    @property
    def classes(self) -> tuple[str, ...]:
        return self.manifest.classes


def open_data(config: Config, world: World) -> TrainingData:
    """Open and check a packed data set, split off validation samples, and compute the input statistics.

    Raises:
        UserError: The data set is missing or damaged, its splits disagree, or a split is too small.
    """
    directory = resolve_dataset(config.data.shards)
    memory = _image_memory(config)
    train_memory = int(memory * _TRAIN_MEMORY)
    stores = _open_stores(config, directory, train_memory, memory - train_memory, world)
    train_store, test_store, *val_stores = stores
    train, validation, held_out = _choose_samples(config, train_store, bool(val_stores), directory)
    if held_out is not None:
        test_store = train_store
    manifest = train_store.manifest
    if not val_stores and not len(validation) and (settings := config.settings_that_need_validation):
        raise UserError(
            found=f"{' '.join(settings)} with data.val_fraction=0, and no val split in {directory}",
            expected="validation images, from which the metrics of these settings are computed",
            hint="data.val_fraction=0.1",
        )
    stages = resolution_stages(config)
    final = stages[-1]
    spec = TransformSpec.of(manifest, final.resolution, config.data.interpolation, config.data.preprocessing())
    augmentation = config.augment.augmentation()
    if manifest.image_shape[2] == 1 and (augmentation.saturation or augmentation.hue):
        log.warning("augment.saturation and augment.hue have no effect on grayscale images")
    backend, reason = choose_backend(config.loader.backend, world.device.type, spec.encoded)
    train_store, *val_stores = (
        keep_on_device(store, world.device, config.loader.device_cache) for store in (train_store, *val_stores)
    )
    if world.device.type == "cuda":
        is_resident = isinstance(train_store, ResidentStore)
        reason += f"; training images {'stay in GPU memory' if is_resident else 'are copied to the GPU by batch'}"

    def normalized(resolution: Resolution) -> TransformSpec:
        scaled = replace(spec, resolution=resolution)
        if config.data.normalize == "half":  # pixels become -1 .. 1
            half = (0.5,) * spec.image_shape[2]
            return scaled.with_normalization(half, half)
        stats = world.run_on_main(
            lambda: load_or_compute_stats(train_store, directory / "train", scaled, backend, world.device)
        )
        return scaled.with_normalization(stats.mean, stats.std)

    specs = {resolution: normalized(resolution) for resolution in dict.fromkeys(stage.resolution for stage in stages)}
    transform = build_transform(specs[final.resolution], backend, world.device, final.batch_size)

    def make_transform(stage: ResolutionStage) -> Transform:
        if stage[1:] == final[1:] and not augmentation:
            return transform
        return build_transform(specs[stage.resolution], backend, world.device, stage.batch_size, augmentation)

    def evaluation(store: Store, samples: Positions | None = None) -> Loader:
        return evaluation_loader(store, samples, transform, config, world)

    largest_batch = max(stage.batch_size for stage in stages)
    window, shard_bounds = _shuffle_window(stores[0], train_memory, largest_batch, world)
    loader = config.loader
    sampler = ShuffledBatchSampler(
        train.samples,
        loader.batch_size,
        config.seed,
        manifest.block_size,
        window,
        augmentation,
        repeats=loader.repeated_augmentation,
        by_class=SamplesByClass(train, config.seed) if config.data.class_balance else None,
        class_balance=config.data.class_balance,
        unit_bounds=shard_bounds,
    )
    val_loader = None
    if val_stores:
        val_loader = evaluation(val_stores[0])
    elif len(validation):
        _warn_of_scattered_samples(stores[0], validation.samples)
        val_loader = evaluation(train_store, validation.samples)
    return TrainingData(
        manifest=manifest,
        identity="".join(store.manifest.identity() for store in stores),
        spec=specs[final.resolution],
        statistics={stage.input_size: (specs[stage.resolution].mean, specs[stage.resolution].std) for stage in stages},
        adapter=InputAdapter.of(train_store),
        backend=backend,
        backend_reason=reason,
        counts=train.counts,
        drawn=sampler.class_counts if config.data.class_balance else train.counts,
        train=TrainingLoader(train_store, sampler, stages, make_transform, world),
        validation=val_loader,
        has_val_split=bool(val_stores),
        test=evaluation(test_store, None if held_out is None else held_out.samples),
        test_store=test_store,
    )


def _open_stores(config: Config, directory: Path, train_memory: int, other_memory: int, world: World) -> list[Store]:
    """Open and check the splits train, test and, if there is one, val. Both memories are bytes of images."""

    def open_stores() -> list[Store]:
        # Evaluation reads a split in order, so a larger cache would not help it.
        splits = ["test", *([VALIDATION] if has_split(directory, VALIDATION) else [])]
        with detect_replacement(*manifest_paths(directory)):
            verify = config.data.verify != "off"
            evaluated = [open_split(directory, split, other_memory // 2, verify) for split in splits]
            return [open_split(directory, "train", train_memory, verify), *evaluated]

    stores = world.barrier_run(open_stores)
    if len(set(world.all_gather(lambda: "".join(store.manifest.digest() for store in stores)))) > 1:
        raise replaced_error(directory)
    for store in stores[1:]:
        _check_splits_agree(stores[0].manifest, store.manifest, directory)
    # Version 2 has no checksums to compare later.
    newest = {"start": VERSION, "lazy": VERSION - 1, "off": 0}[config.data.verify]
    # Files that are fetched on demand are hashed when they arrive.
    hashed = [store for store in stores if store.manifest.version <= newest and store.cache_bytes is None]
    if hashed:
        world.run_on_main(lambda: _check_hashes(directory, hashed))
    return stores


def _choose_samples(
    config: Config, store: Store, has_val_split: bool, directory: Path
) -> tuple[LabelledSamples, LabelledSamples, LabelledSamples | None]:
    """Return the samples of the training split to train on, to validate on, and those of a fold to test on."""
    settings = config.data
    val_fraction = 0 if has_val_split else settings.val_fraction
    every = LabelledSamples.of(store)
    held_out, rest = split_fold(every, settings.fold, config.seed) if settings.fold else (None, every)
    train, validation = split_train_val(rest, val_fraction, settings.train_fraction, config.seed)
    if not len(train):
        raise UserError(
            found=f"no training samples: {len(store)} with data.train_fraction={settings.train_fraction}",
            expected="at least one training sample",
            hint="raise data.train_fraction",
        )
    check_several_classes(store.manifest.classes, store.manifest.counts, directory)
    if np.count_nonzero(train.counts) < 2:
        raise UserError(
            found=f"{plural(len(train), 'training sample')} of one class, out of {len(store):,}",
            expected="training samples of at least two classes",
            hint="raise data.train_fraction, or lower data.val_fraction",
        )
    if val_fraction > 0 and not len(validation):
        raise UserError(
            found=f"data.val_fraction={val_fraction} of {len(store)} samples, which is none",
            expected="a validation split of at least one sample",
            hint="raise it, or set data.val_fraction=0 to train without validation",
        )
    return train, validation, held_out


def _shuffle_window(
    store: Store, memory: int, batch_size: int, world: World
) -> tuple[int | None, NDArray[np.int64] | None]:
    """Return the shuffle window in blocks, and the bounds of the shards if they are its units.

    Shards are the units if a host reads them on demand. All ranks then use the window of the smallest cache.
    """
    caches = [cache for cache in world.all_gather(lambda: store.cache_bytes) if cache is not None]
    if not caches:
        return world.broadcast_object(max_shuffle_window(store.manifest, memory, batch_size)), None
    memory = min(world.all_gather(lambda: memory))
    return shard_window(store.manifest, memory, min(caches), batch_size), store.shard_bounds


def _warn_of_scattered_samples(store: Store, samples: Positions) -> None:
    """Log a warning if validation samples are in most shards of a data set that is read on demand."""
    shards = np.diff(samples.searchsorted(store.shard_bounds))
    if store.cache_bytes is not None and np.count_nonzero(shards) > len(shards) / 2:
        log.warning(
            "validation fetches %s of %s shards in every epoch: pack a val split, or set data.val_fraction=0",
            np.count_nonzero(shards),
            len(shards),
        )


def _image_memory(config: Config) -> int:
    """Bytes of images that this process may hold."""
    if config.loader.cache_gb != "auto":
        return int(config.loader.cache_gb * 1e9)
    return memory_limit() // 2 // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def split_fold(samples: LabelledSamples, fold: str, seed: int) -> tuple[LabelledSamples, LabelledSamples]:
    """Return the samples of a fold (`data.fold`) and the others.

    Raises:
        UserError: There are more folds than samples.
    """
    number, folds = map(int, fold.split("/"))
    if folds > len(samples):
        raise UserError(
            found=f"data.fold={fold}, more parts than the {len(samples):,} samples",
            expected="at least one sample in each part",
            hint="data.fold=1/2, or --folds 2 of python -m trainer.predict.label_errors",
        )
    return samples.fold(number - 1, folds, seed)


def split_train_val(
    samples: LabelledSamples, val_fraction: float, train_fraction: float, seed: int
) -> tuple[LabelledSamples, LabelledSamples]:
    """Choose the training and validation samples, stratified by class.

    Args:
        samples: The samples to choose from.
        val_fraction: Fraction of all samples for validation. It does not depend on `train_fraction`, so models trained
            on different fractions are validated on the same samples.
        train_fraction: Fraction of the other samples for training.
        seed: Determines the choice.

    Returns:
        The training and the validation samples, which are disjoint.
    """
    validation, rest = samples.split(val_fraction, seed)
    return rest.split(train_fraction, seed)[0], validation


def evaluation_loader(
    store: Store, samples: Positions | None, transform: Transform, config: Config, world: World
) -> Loader:
    """Return a loader that reads samples (None for all) once each, divided among the ranks.

    The batch size depends on the settings, not on the number of ranks, so that predictions are bit-identical with any
    number of ranks.
    """
    samples = IndexRanges.first(len(store)) if samples is None else samples
    sampler = SequentialBatchSampler(samples, min(config.loader.batch_size, _MAX_EVALUATION_BATCH))
    return Loader(store, sampler, transform, world.device, rank=world.rank, world_size=world.size)


def _check_splits_agree(train: Manifest, other: Manifest, directory: Path) -> None:
    for name, attribute in (("classes", "classes"), ("image shape", "image_shape"), ("orientation", "transposed")):
        expected, actual = getattr(train, attribute), getattr(other, attribute)
        if expected != actual:
            raise UserError(
                found=f"{directory}: {name} {expected} in {train.split}, {actual} in {other.split}",
                expected="splits of one data set",
                hint=f"pack the data set again: python -m pipeline.shard SOURCE --out {quote(directory)} --force; or, "
                f"if they are shards of another tool, index them together: python -m shards.index {quote(directory)}",
            )


def _check_hashes(directory: Path, stores: list[Store]) -> None:
    faults = [fault for store in stores for fault in check_hashes(directory / store.manifest.split, store.manifest)]
    if faults:
        raise UserError(
            found="; ".join(faults),
            expected="shards with the hashes of their manifest",
            hint=f"python -m shards.verify {quote(directory)} names the block; then pack again with --force",
        )
