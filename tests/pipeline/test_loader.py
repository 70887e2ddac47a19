"""The loader gives what order, store and transform say, ahead of time and without leaving a thread behind."""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import synthetic_splits
from numpy.typing import NDArray
from support.batches import assert_same
from support.transform_reference import model_input

import pipeline.loader as module
from pipeline.common.batch_source import DeviceSource
from pipeline.loader import Loader, prefetch
from pipeline.sampler import BatchSampler, SequentialBatchSampler, ShuffledBatchSampler, equal_batch_size
from pipeline.transforms.augmentation import AugmentationParams
from pipeline.transforms.build import build_transform
from pipeline.transforms.spec import Transform, TransformSpec
from shards import open_split
from shards.stores.base import Images, Store

RESOLUTION = 20
TOLERANCE = 5e-6  # see test_graph


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture
def store(synthetic_set: Path) -> Store:
    return open_split(synthetic_set, "train")


def make_loader(
    store: Store, order: BatchSampler, device: torch.device, backend: str = "torch", rank: int = 0, world_size: int = 1
) -> Loader:
    transform = build_transform(TransformSpec.of(store.manifest, RESOLUTION), backend, device, order.batch_size)
    return Loader(store, order, transform, device, rank=rank, world_size=world_size)


def training_order(store: Store, batch_size: int = 64, seed: int = 3) -> ShuffledBatchSampler:
    return ShuffledBatchSampler(np.arange(len(store)), batch_size, seed)


def raw_images(store: Store, samples: NDArray[np.int64]) -> NDArray[np.uint8]:
    images = np.empty((len(samples), *store.manifest.image_shape), np.uint8)
    store.gather(samples, images)
    return images


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


@pytest.mark.parametrize("backend", ["torch", "dali"])
def test_batches_hold_what_order_and_store_say(store: Store, device: torch.device, backend: str) -> None:
    order = training_order(store)
    batches = list(make_loader(store, order, device, backend).batches(epoch=2))
    steps = list(order.steps(2, 0, 1))
    assert [batch.step for batch in batches] == list(range(-(-len(store) // 64)))
    for batch, step in zip(batches, steps, strict=True):
        expected = model_input(raw_images(store, step.samples), RESOLUTION, transposed=True)
        assert {tensor.device.type for tensor in (batch.images, batch.labels, batch.source_index)} == {device.type}
        assert np.abs(batch.images.cpu().numpy() - expected).max() <= TOLERANCE
        assert batch.labels.tolist() == store.labels[step.samples].tolist()
        assert batch.source_index.tolist() == store.rows[step.samples].tolist()
        assert batch.global_size == len(step.samples) == equal_batch_size(len(store), 64)


def test_rows_lead_back_to_the_raw_images(store: Store) -> None:
    raw = synthetic_splits()[0]
    loader = make_loader(store, training_order(store, batch_size=50), torch.device("cpu"))
    seen = []
    for batch in loader.batches():
        rows = batch.source_index.numpy()
        expected = model_input(raw.read(rows), RESOLUTION, transposed=True)
        assert np.abs(batch.images.numpy() - expected).max() <= TOLERANCE
        assert np.array_equal(batch.labels.numpy(), raw.labels[rows])
        seen += rows.tolist()
    assert sorted(seen) == list(range(len(raw.labels)))


def test_batches_depend_on_epoch_and_step_alone(store: Store, device: torch.device) -> None:
    loader = make_loader(store, training_order(store), device)
    whole = list(loader.batches(epoch=5))
    list(loader.batches(epoch=1))
    assert_same(list(loader.batches(epoch=5)), whole)
    assert_same(list(loader.batches(epoch=5, first_step=4)), whole[4:])
    assert not torch.equal(next(loader.batches(epoch=6)).source_index, whole[0].source_index)


class Counted:
    """A transform that tells how many images each of its calls had."""

    def __init__(self, transform: Transform, max_fused_batch: int) -> None:
        self._transform = transform
        self.max_fused_batch = max_fused_batch
        self.op_params = transform.op_params
        self.calls: list[int] = []

    def __call__(self, images: Images, params: AugmentationParams | None = None) -> torch.Tensor:
        self.calls.append(len(images))
        return self._transform(images, params)


@pytest.mark.parametrize(
    ("max_fused_batch", "world_size", "joined"), [(0, 1, 1), (63, 1, 1), (200, 1, 3), (100, 2, 3), (10**6, 1, 12)]
)
def test_small_batches_are_prepared_together(store: Store, max_fused_batch: int, world_size: int, joined: int) -> None:
    order, cpu = training_order(store, batch_size=64), torch.device("cpu")
    transform = Counted(
        build_transform(TransformSpec.of(store.manifest, RESOLUTION), "torch", cpu, 64), max_fused_batch
    )
    loader = Loader(store, order, transform, cpu, rank=0, world_size=world_size)
    whole = list(loader.batches(3))
    assert len(transform.calls) == -(-len(whole) // joined)
    assert sum(transform.calls) == sum(len(batch.source_index) for batch in whole)
    for first in range(len(whole)):
        calls = transform.calls.copy()
        transform.calls.clear()
        assert_same(list(loader.batches(3, first)), whole[first:])
        # Whole calls, as an epoch from its beginning has them, so that nothing differs even in the last bit.
        assert transform.calls == calls[-len(transform.calls) :]
        transform.calls[:] = calls


def test_evaluation_and_windows_keep_batches_apart(store: Store) -> None:
    cpu = torch.device("cpu")
    for order in (
        SequentialBatchSampler(np.arange(len(store)), 64),
        replace(training_order(store), shuffle_window_blocks=3),
    ):
        transform = Counted(build_transform(TransformSpec.of(store.manifest, RESOLUTION), "torch", cpu, 64), 10**6)
        batches = list(Loader(store, order, transform, cpu).batches())
        assert transform.calls == [len(batch.source_index) for batch in batches]


def test_a_batch_that_was_let_go_gives_its_memory_to_a_later_one(store: Store) -> None:
    order, cpu = training_order(store, batch_size=64), torch.device("cpu")
    transform = Counted(build_transform(TransformSpec.of(store.manifest, RESOLUTION), "torch", cpu, 64), 0)
    places, kept = [], []
    for batch in Loader(store, order, transform, cpu).batches():
        places.append(batch.images.data_ptr())
        del batch
    assert len(set(places)) == 1
    for batch in Loader(store, order, transform, cpu).batches():
        kept.append((batch.images, batch.images.clone()))
    assert len({images.data_ptr() for images, _ in kept}) == len(kept) > 3
    assert all(torch.equal(images, copy) for images, copy in kept)


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_ranks_share_a_global_batch(store: Store, world_size: int) -> None:
    order, cpu = training_order(store), torch.device("cpu")
    alone = list(make_loader(store, order, cpu).batches(1))
    shares = [list(make_loader(store, order, cpu, "torch", rank, world_size).batches(1)) for rank in range(world_size)]
    for step, (whole, *parts) in enumerate(zip(alone, *shares, strict=True)):
        assert {part.step for part in parts} == {step}
        assert {part.global_size for part in parts} == {len(whole.source_index)}
        assert max(len(part.source_index) for part in parts) - min(len(part.source_index) for part in parts) <= 1
        assert torch.equal(torch.cat([part.source_index for part in parts]), whole.source_index)
        assert torch.equal(torch.cat([part.images for part in parts]), whole.images)


def test_evaluation_ranks_cover_every_sample_once(store: Store) -> None:
    order, cpu = SequentialBatchSampler(np.arange(len(store)), 96), torch.device("cpu")
    batches = [batch for rank in range(3) for batch in make_loader(store, order, cpu, "torch", rank, 3).batches()]
    assert sorted(row for batch in batches for row in batch.source_index.tolist()) == list(range(len(store)))
    assert sorted(batch.step for batch in batches) == list(range(-(-len(store) // 96)))


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_running_ahead_keeps_the_order(depth: int) -> None:
    assert list(prefetch(range(100), depth)) == list(range(100))
    assert list(prefetch((), depth)) == []
    assert loader_threads() == []


def test_an_exception_while_loading_is_raised_where_batches_are_used() -> None:
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise IndexError("position 700")

    batches = prefetch(items(), 2)
    assert [next(batches), next(batches)] == [1, 2]
    with pytest.raises(IndexError, match="position 700"):
        next(batches)
    assert loader_threads() == []


def test_a_damaged_store_is_heard_of_in_the_training_loop(store: Store) -> None:
    order = ShuffledBatchSampler(np.array([0, 1, len(store)]), 3, 0)
    with pytest.raises(IndexError):
        list(make_loader(store, order, torch.device("cpu")).batches())


@pytest.mark.parametrize("taken", [1, 3])
def test_closing_early_ends_the_thread(store: Store, taken: int) -> None:
    loader = make_loader(store, training_order(store), torch.device("cpu"))
    with contextlib.closing(prefetch(loader.batches(), 2)) as batches:
        for _ in range(taken):
            next(batches)
        assert len(loader_threads()) == 1
    assert loader_threads() == []


def test_an_exception_in_the_training_loop_ends_the_thread(store: Store) -> None:
    loader = make_loader(store, training_order(store), torch.device("cpu"))
    with pytest.raises(ZeroDivisionError), contextlib.closing(prefetch(loader.batches(), 2)) as batches:
        for _ in batches:
            raise ZeroDivisionError
    assert loader_threads() == []


def test_an_item_that_nobody_needs_is_freed_before_the_next_is_waited_for() -> None:
    taken: list[weakref.ref] = []
    freed = []

    def items() -> Iterator[NDArray]:
        yield np.zeros(1)
        deadline = time.monotonic() + 10
        while not (taken and taken[0]() is None) and time.monotonic() < deadline:
            time.sleep(0.005)
        freed.append(taken[0]() is None)
        yield np.zeros(1)

    with contextlib.closing(prefetch(items(), 0)) as arrays:
        taken.append(weakref.ref(next(arrays)))
        next(arrays)
    assert freed == [True]


def test_an_iterator_that_ends_in_the_thread_of_another_is_not_waited_for() -> None:
    """As when the garbage collector finds it there."""
    goes_on, went_on = threading.Event(), []

    def first() -> Iterator[int]:
        went_on.append(goes_on.wait(2))
        yield 1

    one = prefetch(first(), 1)

    def second() -> Iterator[int]:
        one.close()
        goes_on.set()
        yield 2

    assert list(prefetch(second(), 1)) == [2]
    deadline = time.monotonic() + 10
    while loader_threads() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert went_on == [True]


def test_iterators_that_share_loader_and_transform_do_not_meet(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The threads of a GPU on a CPU, where a batch takes long to gather."""
    cpu, order = torch.device("cpu"), training_order(store)
    expected = [list(make_loader(store, order, cpu).batches(epoch)) for epoch in range(2)]
    stream, gather = mock.MagicMock(spec_set=torch.cuda.Stream), type(store).gather

    def gather_slowly(*given: Any) -> None:
        gather(*given)
        time.sleep(0.003)

    monkeypatch.setattr(type(store), "gather", gather_slowly)
    monkeypatch.setattr(module, "make_source", DeviceSource)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    loader = make_loader(store, order, cpu)
    monkeypatch.setattr(loader, "_stream", stream)
    monkeypatch.setattr(loader, "_fused_steps", 1)
    batches = list(zip(loader.batches(0), loader.batches(1), strict=True))
    for given, one in zip(expected, zip(*batches, strict=True), strict=True):
        assert all(torch.equal(a.source_index, b.source_index) for a, b in zip(one, given, strict=True))
        assert all(torch.allclose(a.images, b.images, atol=1e-5) for a, b in zip(one, given, strict=True))


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_runs_ahead_but_not_without_end(depth: int) -> None:
    """With n taken, `depth` wait in the queue and one more in the thread's hand."""
    made = []

    def items() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            yield number

    with contextlib.closing(prefetch(items(), depth)) as numbers:
        for taken in range(1, 4):
            next(numbers)
            deadline = time.monotonic() + 10
            while len(made) < taken + depth + 1 and time.monotonic() < deadline:
                time.sleep(0.005)
            time.sleep(0.05)
            assert len(made) == taken + depth + 1
    assert len(made) == 3 + depth + 1, "closing loads nothing more"
