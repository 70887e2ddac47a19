"""The loader's thread and stream on a simulated GPU: what one stream writes, another reads only after it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.simulated_gpu import GPU, DeviceError, SimulatedGpu, simulated_gpu

from pipeline import loader
from pipeline.common import batch_source
from pipeline.common.batch_source import DeviceSource, keep_on_device
from pipeline.loader import Batch, Loader
from pipeline.sampler import ShuffledBatchSampler
from pipeline.transforms.augmentation import Augmentation
from pipeline.transforms.build import build_transform
from pipeline.transforms.spec import TransformSpec
from shards import open_split

AUGMENTATION = Augmentation(rotation=10, elastic=0.1, stroke=0.5, erase=0.5, brightness=0.2)


def train(synthetic_set: Path, monkeypatch: pytest.MonkeyPatch, resident: bool) -> tuple[SimulatedGpu, list[Any]]:
    """Read all batches in the default stream while the thread computes the next ones in its own."""
    prefetch, used = loader.prefetch, []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: used.append((tensor, stream)))
    monkeypatch.setattr(batch_source, "free_memory", lambda device: 10**9 if resident else 0)
    with simulated_gpu() as gpu:

        def prefetch_here(items: Iterable[Any], depth: int) -> Generator[Any, None, None]:
            return prefetch(gpu.in_thread(iter(items)), depth)

        monkeypatch.setattr(loader, "prefetch", prefetch_here)
        gpu.check_streams()
        store = keep_on_device(open_split(synthetic_set, "train"), GPU, 0.5)
        spec = TransformSpec.of(store.manifest, 20)
        transform = build_transform(spec, "torch", GPU, 128, AUGMENTATION)
        monkeypatch.setattr(transform, "max_fused_batch", 0)
        sampler = ShuffledBatchSampler(np.arange(len(store)), 128, 3, augmentation=AUGMENTATION)
        batches = Loader(store, sampler, transform, GPU).batches()
        count = 0
        for batch in batches:
            with gpu.step():
                _ = batch.images.mean() + batch.labels.sum() + batch.source_index.sum()
            count += 1
            tensors, streams = zip(*used[-3:], strict=True)
            assert all(map(operator.is_, tensors, (batch.images, batch.labels, batch.source_index)))
            assert {stream.number for stream in streams} == {0}, "the stream of the caller"
        assert count == -(-len(store) // 128) and len(used) == 3 * count
    return gpu, used


@pytest.mark.parametrize("resident", [False, True], ids=["ring", "resident"])
def test_streams_are_ordered(synthetic_set: Path, monkeypatch: pytest.MonkeyPatch, resident: bool) -> None:
    gpu, _ = train(synthetic_set, monkeypatch, resident)
    assert gpu.streams is not None
    assert len(gpu.streams.syncs.current_sync_states) == 2, "the default stream and that of the loader"


def in_default_stream(source: Any, samples: Any, arrays: Any) -> Any:
    with torch.cuda.default_stream():
        return LOAD(source, samples, arrays)


LOAD = DeviceSource.load
FAULTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "the caller does not wait for a batch": lambda patch: patch.setattr(
        Loader, "_receive", lambda self, batches: (batch for batch, _ in batches)
    ),
    "the batch counts as ready before it is computed": lambda patch: patch.setattr(
        Loader, "_mark_ready", lambda self, batch: (batch, torch.cuda.Event())
    ),
    "constants and resident images may not be there": lambda patch: patch.setattr(
        Loader, "batches", lambda self: self._receive(loader.prefetch(map(self._mark_ready, prepared(self)), 2))
    ),
    "images are copied in another stream": lambda patch: patch.setattr(DeviceSource, "load", in_default_stream),
}


def prepared(of: Loader) -> Iterator[Batch]:
    return of._prepare(of.sampler.steps(0, 0, 1, 0), 0, 0)


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("resident", [False, True], ids=["ring", "resident"])
def test_streams_without_an_order_are_found(
    synthetic_set: Path, monkeypatch: pytest.MonkeyPatch, name: str, resident: bool
) -> None:
    FAULTS[name](monkeypatch)
    with pytest.raises(DeviceError, match=r"in stream \d is not ordered after"):
        train(synthetic_set, monkeypatch, resident)
