"""All sources give the same batches. Those of a GPU run on a CPU, and on a simulated GPU that checks for waits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.batches import assert_same
from support.simulated_gpu import GPU, simulated_gpu

from pipeline import loader
from pipeline.common import batch_source
from pipeline.common.batch_source import (
    DeviceSource,
    HostSource,
    PinnedRing,
    ResidentStore,
    keep_on_device,
    make_source,
)
from pipeline.loader import Batch, Loader
from pipeline.sampler import ShuffledBatchSampler
from pipeline.transforms.augmentation import NO_AUGMENTATION, Augmentation
from pipeline.transforms.build import build_transform
from pipeline.transforms.preprocess import Preprocessing
from pipeline.transforms.spec import TransformSpec
from shards import open_split
from shards.stores.base import Store

CPU = torch.device("cpu")
ALL = Augmentation(rotation=10, elastic=0.1, stroke=0.5, erase=0.5, brightness=0.2)


@pytest.fixture(scope="module")
def store(synthetic_set: Path) -> Store:
    return open_split(synthetic_set, "train")


def batches(
    store: Store, backend: str = "torch", augmentation: Augmentation = NO_AUGMENTATION, device: torch.device = CPU
) -> list[Batch]:
    spec = TransformSpec.of(store.manifest, 20, "linear", Preprocessing(equalize=True))
    sampler = ShuffledBatchSampler(np.arange(len(store)), 64, 3, augmentation=augmentation or None)
    return list(Loader(store, sampler, build_transform(spec, backend, device, 64, augmentation), device).batches(2))


@pytest.mark.parametrize("augmentation", [NO_AUGMENTATION, ALL], ids=["plain", "augmented"])
@pytest.mark.parametrize("backend", ["torch", "dali"])
def test_all_sources_give_the_same_batches(
    store: Store, monkeypatch: pytest.MonkeyPatch, backend: str, augmentation: Augmentation
) -> None:
    expected = batches(store, backend, augmentation)
    assert isinstance(make_source(store, CPU), HostSource)
    monkeypatch.setattr(batch_source, "free_memory", lambda device: 10**9)
    monkeypatch.setattr(batch_source, "_UPLOAD_BYTES", 100 * store.manifest.image_bytes)
    resident = keep_on_device(store, CPU, 0.5)
    assert isinstance(resident, ResidentStore)
    assert np.array_equal(resident.images.numpy(), store.read(np.arange(len(store))))
    assert_same(batches(resident, backend, augmentation), expected)
    # Kept batches do not change when the blocks of the ring are filled again.
    monkeypatch.setattr(loader, "make_source", DeviceSource)
    assert_same(batches(store, backend, augmentation), expected)


def test_image_files_are_read_by_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ring = PinnedRing(CPU)
    source = DeviceSource.__new__(DeviceSource)

    class Files:
        manifest = type("Manifest", (), {"encoded": True})

        def read(self, samples: Any) -> list[int]:
            return samples.tolist()

    source._store, source._ring = Files(), ring  # type: ignore[assignment]
    images, sent = source.load(np.arange(3), {"labels": np.arange(3) * 2})
    assert images == [0, 1, 2] and sent["labels"].tolist() == [0, 2, 4]


@pytest.mark.parametrize(
    ("free", "fraction", "fits"), [(1000, 0.5, False), (10**6, 0, False), (0, 1, False), (10**9, 0.25, True)]
)
def test_images_that_fit_stay_on_the_device(
    store: Store, monkeypatch: pytest.MonkeyPatch, free: int, fraction: float, fits: bool
) -> None:
    monkeypatch.setattr(batch_source, "free_memory", lambda device: free)
    assert isinstance(keep_on_device(store, CPU, fraction), ResidentStore) == fits


def test_memory_of_freed_tensors_is_free(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of an earlier training in the same process: the driver counts them, as torch keeps their memory."""
    size = len(store) * store.manifest.image_bytes
    memory = {"mem_get_info": (size // 2, 10 * size), "memory_reserved": 6 * size, "memory_allocated": 5 * size}
    for name, value in memory.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    with simulated_gpu():
        assert keep_on_device(store, GPU, 0.6) is store, "of 1.5 times their size"
        assert isinstance(keep_on_device(store, GPU, 0.7), ResidentStore)


def test_images_on_a_cpu_are_not_copied(store: Store) -> None:
    assert keep_on_device(store, CPU, 1) is store


def test_a_block_holds_arrays_of_all_types_and_sizes() -> None:
    ring, sent = PinnedRing(CPU), []
    given = [
        {
            "bytes": np.full((size, 3), size, np.uint8),
            "none": np.empty((0, 2), np.float64),
            "long": np.arange(size) + 2**40,
            "double": np.full(size, np.pi),
            "float": np.full((size, 2, 1), 0.1, np.float32),
        }
        for size in (5, 1, 7, 4, 100, 3)
    ]
    sent = [ring.send(arrays) for arrays in given]
    for arrays, tensors in zip(given, sent, strict=True):
        assert list(tensors) == list(arrays)
        assert all(np.array_equal(tensor.numpy(), arrays[name]) for name, tensor in tensors.items())
        assert all(tensor.numpy().dtype == arrays[name].dtype for name, tensor in tensors.items())
        assert len({tensor.untyped_storage().data_ptr() for tensor in tensors.values()}) == 1


@pytest.mark.parametrize("resident", [False, True], ids=["ring", "resident"])
@pytest.mark.parametrize("augmentation", [NO_AUGMENTATION, ALL], ids=["plain", "augmented"])
def test_a_batch_takes_one_copy_and_no_wait(
    store: Store, monkeypatch: pytest.MonkeyPatch, resident: bool, augmentation: Augmentation
) -> None:
    monkeypatch.setattr(loader, "prefetch", lambda items, depth: (item for item in items))  # threads are not simulated
    used: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: used.append(tensor))
    with simulated_gpu() as gpu:
        uploads = 0
        check = gpu._check_copy

        def count(name: str, args: Any, kwargs: Any) -> None:
            nonlocal uploads
            uploads += args[0].is_cpu and torch.device(kwargs.get("device") or "cpu").type == "cuda"
            check(name, args, kwargs)

        monkeypatch.setattr(gpu, "_check_copy", count)
        if resident:
            monkeypatch.setattr(batch_source, "free_memory", lambda device: 10**9)
            store = keep_on_device(store, GPU, 0.5)
        spec = TransformSpec.of(store.manifest, 20, "linear", Preprocessing(equalize=True))
        sampler = ShuffledBatchSampler(np.arange(len(store)), 64, 3, augmentation=augmentation or None)
        transform = build_transform(spec, "torch", GPU, 64, augmentation)
        monkeypatch.setattr(transform, "max_fused_batch", 0)
        received = Loader(store, sampler, transform, GPU).batches()
        next(received)  # allocates
        for _ in range(3):
            uploads, used[:] = 0, []
            with gpu.step():
                batch = next(received)
            assert uploads == 1
            assert [tensor.shape for tensor in used] == [(n := len(batch.labels), 1, 20, 20), (n,), (n,)]
            assert {tensor.device for tensor in used} == {GPU}
