"""Mean and standard deviation of the model input, computed with the transform itself."""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.loader import Loader
from pipeline.sampler import SequentialBatchSampler
from pipeline.transforms.build import build_transform
from pipeline.transforms.spec import TransformSpec
from shards.atomic import read_json, write_json
from shards.manifest import STATISTICS_SAMPLES, Manifest
from shards.stores.base import Store

log = logging.getLogger(__name__)

_MAX_ENCODED_SAMPLES = 16_384  # decoding takes 100 times as long
_MAX_SHARDS = 64  # of image files
_MAX_BATCH_SIZE = 512
_MAX_BATCH_BYTES = 64 << 20  # of the raw images or the model input, as float32
_MIN_STD = 1e-6


@dataclass(frozen=True)
class DatasetStats:
    """Statistics of the pixels, scaled to 0 .. 1, after the resize.

    Attributes:
        mean: Mean of each channel.
        std: Standard deviation of each channel.
        samples: Number of images in the statistics.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    samples: int


def compute_stats(store: Store, spec: TransformSpec, backend: str, device: torch.device) -> DatasetStats:
    """Compute mean and std of the transform's output without normalization.

    Args:
        store: Open training split.
        spec: Specification of the transform; its mean and std are ignored.
        backend: `dali` or `torch`.
        device: Device of the transform.
    """
    channels = spec.image_shape[2]
    raw_spec = spec.with_normalization((0.0,) * channels, (1.0,) * channels)
    samples = _select_samples(store)
    height, width = spec.input_size if spec.encoded else map(max, spec.input_size, spec.upright_size)
    batch_size = min(_MAX_BATCH_SIZE, max(1, _MAX_BATCH_BYTES // (4 * channels * height * width)))
    transform = build_transform(raw_spec, backend, device, batch_size)
    sums = torch.zeros(channels, dtype=torch.float64, device=device)
    squares = torch.zeros_like(sums)
    for batch in Loader(store, SequentialBatchSampler(samples, batch_size), transform, device).batches():
        # float32 within an image and float64 over images is fast and accurate to seven digits.
        sums += batch.images.mean(dim=(2, 3)).double().sum(dim=0)
        squares += batch.images.square().mean(dim=(2, 3)).double().sum(dim=0)
    mean = sums / len(samples)
    std = (squares / len(samples) - mean.square()).clamp_min(0).sqrt()
    # A constant channel is not scaled.
    std = torch.where(std < _MIN_STD, torch.ones_like(std), std)
    return DatasetStats(tuple(mean.tolist()), tuple(std.tolist()), len(samples))


def packed_stats(manifest: Manifest, spec: TransformSpec) -> DatasetStats | None:
    """Return the statistics that packing has computed; None if the transform changes the stored pixels.

    Args:
        manifest: Of the training split.
        spec: Specification of the transform; its mean and std are ignored.
    """
    if manifest.statistics is None or spec.needs_resize or spec.preprocessing.steps:
        return None
    statistics = manifest.statistics
    count = statistics.samples * manifest.image_bytes // manifest.image_shape[2]
    mean, std = [], []
    for total, squares in zip(statistics.sums, statistics.squares, strict=True):
        mean.append(total / count / 255)
        # Integers: the difference of two floats of this size would have few exact digits.
        variance = max(0, count * squares - total * total) / (255 * count) ** 2
        std.append(math.sqrt(variance) if variance >= _MIN_STD**2 else 1.0)
    return DatasetStats(tuple(mean), tuple(std), statistics.samples)


def _select_samples(store: Store) -> NDArray[np.int64]:
    """Select the first samples, or evenly spaced ones of a record store, whose shards may be sorted by class.

    They are from few shards, because a shard may have to be fetched.
    """
    if store.manifest.encoded:
        bounds, shards = store.shard_bounds, len(store.manifest.shards)
        chosen = np.arange(min(shards, _MAX_SHARDS)) * shards // min(shards, _MAX_SHARDS)
        positions = np.concatenate([np.arange(*bounds[shard : shard + 2]) for shard in chosen])
        count = min(len(positions), _MAX_ENCODED_SAMPLES)
        return positions[np.arange(count) * len(positions) // count]
    return np.arange(min(len(store), STATISTICS_SAMPLES))


def load_or_compute_stats(
    store: Store, directory: Path, spec: TransformSpec, backend: str, device: torch.device
) -> DatasetStats:
    """Load the statistics of a packed split from its cache or its manifest, or compute them and write the cache.

    The cache is read first. A run that was started before an upgrade of the format is then resumed with the same
    statistics.

    Args:
        store: Open training split.
        directory: Directory of the split; the cache is its `statistics/`. If it is not writable, statistics are
            computed on each call.
        spec: Specification of the transform.
        backend: `dali` or `torch`.
        device: Device of the transform.
    """
    name = "-".join((str(spec.resolution), spec.interpolation, *spec.preprocessing.steps))
    path = directory / "statistics" / f"{name}.json"
    identity = store.manifest.identity()
    content = read_json(path)
    if content.get("manifest") == identity:
        return DatasetStats(tuple(content["mean"]), tuple(content["std"]), content["samples"])
    if packed := packed_stats(store.manifest, spec):
        return packed
    statistics = compute_stats(store, spec, backend, device)
    try:
        path.parent.mkdir(exist_ok=True)
        write_json(path, {**asdict(statistics), "manifest": identity})
    except OSError as error:
        log.warning("cannot write the statistics to %s (%s); they will be computed again", path, error)
    return statistics
