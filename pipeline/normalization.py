"""Mean and standard deviation of the model input, measured through the transform itself."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.loader import Loader
from pipeline.sampler import SequentialBatchSampler
from pipeline.transforms.build import build_transform
from pipeline.transforms.spec import TransformSpec
from shards.atomic import write_file
from shards.stores.base import Store

log = logging.getLogger(__name__)

# Samples were permuted at packing, so a prefix is a fair sample; with so many, the error of the mean is below
# a thousandth of the standard deviation.
_MOST_SAMPLES = 65_536
# Decoding takes a hundred times as long.
_MOST_PICTURES = 16_384
_BATCH = 512


@dataclass(frozen=True)
class DatasetStats:
    """Of pixels scaled to 0 .. 1, after the resize, for each channel; samples: how many images were measured."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    samples: int


def compute_stats(store: Store, spec: TransformSpec, backend: str, device: torch.device) -> DatasetStats:
    """Run images of a store through the transform (without normalisation) and take mean and deviation."""
    channels = spec.image_shape[2]
    raw_spec = spec.with_normalization((0.0,) * channels, (1.0,) * channels)
    samples = _choose(store)
    transform = build_transform(raw_spec, backend, device, _BATCH)
    total = torch.zeros(channels, dtype=torch.float64, device=device)
    squares = torch.zeros_like(total)
    for batch in Loader(store, SequentialBatchSampler(samples, _BATCH), transform, device).batches():
        # Summed in float32 along an image, in float64 over images: fast, and exact to seven digits.
        total += batch.images.mean(dim=(2, 3)).double().sum(dim=0)
        squares += batch.images.square().mean(dim=(2, 3)).double().sum(dim=0)
    mean = total / len(samples)
    std = (squares / len(samples) - mean.square()).clamp_min(0).sqrt()
    # A constant channel (blank images) has nothing to scale.
    std = torch.where(std < 1e-6, torch.ones_like(std), std)
    return DatasetStats(tuple(mean.tolist()), tuple(std.tolist()), len(samples))


def _choose(store: Store) -> NDArray[np.int64]:
    """Select the samples to measure: the first ones, or evenly spaced ones where shards may be sorted by class."""
    if store.manifest.encoded:
        count = min(len(store), _MOST_PICTURES)
        return np.arange(count) * len(store) // count
    return np.arange(min(len(store), _MOST_SAMPLES))


def load_or_compute_stats(
    store: Store, directory: Path, spec: TransformSpec, backend: str, device: torch.device
) -> DatasetStats:
    """The statistics of a packed part, from `DIR/statistics/` or measured and kept there.

    directory: of the part. Where it cannot be written, they are measured each time.
    """
    kind = (str(spec.resolution), spec.interpolation, *spec.preprocessing.steps)
    path = directory / "statistics" / f"{'-'.join(kind)}.json"
    digest = store.manifest.digest()
    try:
        content = json.loads(path.read_text())
        if content.pop("manifest") == digest:
            return DatasetStats(tuple(content["mean"]), tuple(content["std"]), content["samples"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # not computed yet, or damaged
    statistics = compute_stats(store, spec, backend, device)
    try:
        path.parent.mkdir(exist_ok=True)
        write_file(path, json.dumps({**asdict(statistics), "manifest": digest}) + "\n")
    except OSError as error:
        log.warning("cannot keep the statistics in %s (%s); they are measured again next time", path, error)
    return statistics
