"""Windowed orders of an epoch: every sample once, lanes with fixed shares, each unit once, any step alone."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.common.index_ranges import IndexRanges
from pipeline.common.windowed_order import WindowedOrder
from pipeline.sampler import ShuffledBatchSampler


@st.composite
def orders(draw: st.DrawFn) -> tuple[WindowedOrder, np.ndarray, int, int, int]:
    steps, batch_size, seed = draw(st.integers(1, 60)), draw(st.integers(1, 30)), draw(st.integers(0, 2**63))
    count = steps * batch_size
    inner = draw(st.lists(st.integers(0, count), max_size=12))
    bounds = np.array([0, *sorted(inner), count])
    lanes, window = draw(st.integers(1, min(batch_size, 8))), draw(st.integers(1, count))
    order = WindowedOrder(
        bounds, steps=steps, batch_size=batch_size, window=window, lanes=lanes, seed=seed, epoch=draw(st.integers(0, 9))
    )
    return order, bounds, steps, batch_size, lanes


@settings(max_examples=40)
@given(order=orders(), data=st.data())
def test_every_sample_comes_once_and_any_part_is_computed_alone(
    order: tuple[WindowedOrder, np.ndarray, int, int, int], data: st.DataObject
) -> None:
    windowed, _, steps, batch_size, lanes = order
    numbers = windowed.numbers(range(steps), np.arange(batch_size))
    assert sorted(numbers.reshape(-1).tolist()) == list(range(steps * batch_size))
    first = data.draw(st.integers(0, steps - 1))
    stop = data.draw(st.integers(first + 1, steps))
    positions = np.array(data.draw(st.lists(st.integers(0, batch_size - 1), min_size=1)))
    assert windowed.numbers(range(first, stop), positions).tolist() == numbers[first:stop, positions].tolist()
    for lane in range(lanes):
        share = slice(batch_size * lane // lanes, batch_size * (lane + 1) // lanes)
        own = np.sort(numbers[:, share].reshape(-1))
        assert own.tolist() == list(range(steps * share.start, steps * share.stop)), "the share of a lane is fixed"
        for repeats in (2, 3):
            repeated = np.repeat(numbers[:, share].reshape(-1), repeats)[: own.size]
            found = windowed.numbers(range(steps), np.arange(share.start, share.stop), repeats)
            assert found.reshape(-1).tolist() == repeated.tolist()


@settings(max_examples=40)
@given(order=orders(), data=st.data(), repeats=st.integers(1, 3))
def test_unit_uses_name_the_units_of_a_rank_once_by_first_step(
    order: tuple[WindowedOrder, np.ndarray, int, int, int], data: st.DataObject, repeats: int
) -> None:
    windowed, bounds, steps, batch_size, _ = order
    start = data.draw(st.integers(0, batch_size - 1))
    share = slice(start, data.draw(st.integers(start + 1, batch_size)))
    first = data.draw(st.integers(0, steps - 1))
    numbers = windowed.numbers(range(steps), np.arange(share.start, share.stop), repeats)
    units = np.searchsorted(bounds, numbers, side="right") - 1
    uses = list(windowed.unit_uses(share, first, repeats))
    firsts = [first for _, first, _ in uses]
    assert firsts == sorted(firsts)
    by_unit = {unit: (first, last) for unit, first, last in uses}
    assert len(by_unit) == len(uses)
    for step in range(first, steps):
        for unit in set(units[step].tolist()):
            assert first <= by_unit[unit][0] <= step <= by_unit[unit][1] < steps


def test_units_are_held_for_a_window_and_a_unit() -> None:
    units, steps, batch_size, lanes, window = 240, 2400, 100, 12, 24_000  # units of 1,000 samples
    order = WindowedOrder(
        np.arange(units + 1) * 1000, steps=steps, batch_size=batch_size, window=window, lanes=lanes, seed=1, epoch=0
    )
    held = np.zeros(steps + 1, int)
    for _, first, last in order.unit_uses(slice(0, batch_size)):
        held[first] += 1
        held[last + 1] -= 1
    # A lane holds its window of two units, the unit that it enters and the one that it leaves.
    assert np.cumsum(held).max() <= 24 + 2 * lanes
    assert np.cumsum(held)[500:1900].mean() < 24 + 1.2 * lanes


@pytest.mark.parametrize(("ranks", "lanes"), [(2, 12), (3, 12), (4, 12), (6, 12), (12, 12)])
def test_ranks_divide_the_units_in_every_epoch(ranks: int, lanes: int) -> None:
    sampler = ShuffledBatchSampler(IndexRanges.first(65_537), 48, 5, 16, 12 * 32)
    assert sampler.lanes == lanes
    units = np.append(np.arange(0, 65_537, 16), 65_537)
    owners: dict[int, Counter[int]] = {}
    for epoch in range(3):
        for rank in range(ranks):
            for unit, _, _ in sampler.shard_uses(epoch, rank, ranks, 0, units):
                owners.setdefault(unit, Counter())[rank] += 1
    assert len(owners) == 4097
    # Units in which the share of a rank ends, one or two in each of three epochs, belong to two ranks.
    shared = [unit for unit, counts in owners.items() if len(counts) > 1]
    assert len(shared) <= 2 * (ranks - 1)
    assert all(set(owners[unit].values()) <= {1, 2, 3} for unit in owners)


def sliding_window(count: int, block: int, window: int, seed: int) -> np.ndarray:
    """Sort by the random place of the block plus a uniform fraction of the window: the slow reference."""
    random = np.random.default_rng(seed)
    places = random.permutation(-(-count // block))[np.arange(count) // block]
    return np.argsort(places + random.random(count) * window)


def chi_squared(counts: np.ndarray, expected: np.ndarray) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("lanes", [1, 6])
def test_orders_are_as_random_as_sorting_by_random_keys(lanes: int) -> None:
    """Places of samples, distances of neighbours in a unit, and samples of two units in one batch."""
    count, block, batch_size, window, epochs = 9600, 16, 96, 75, 40
    every, units = np.arange(count), count // block
    places, distances, pairs = np.zeros((2, 24)), np.zeros((2, 12)), np.zeros(2)
    for epoch in range(epochs):
        windowed = WindowedOrder(
            np.arange(units + 1) * block,
            steps=count // batch_size,
            batch_size=batch_size,
            window=window * block,
            lanes=lanes,
            seed=3,
            epoch=epoch,
        ).numbers(range(count // batch_size), np.arange(batch_size))
        for row, order in enumerate((windowed.reshape(-1), sliding_window(count, block, window, epoch))):
            place = np.empty(count, int)
            place[order] = every
            step = place // batch_size
            places[row] += np.bincount(step[:40] * 24 // (count // batch_size), minlength=24)  # of some units
            gap = np.abs(np.diff(step.reshape(units, block), axis=1)).reshape(-1)
            distances[row] += np.bincount(np.minimum(gap, 11), minlength=12)
            pairs[row] += (step[0::32] == step[16::32]).mean()  # of neighbouring units
    by_chance, found = (chi_squared(row, np.full(24, row.mean())) for row in places[::-1])
    assert found < 3 * by_chance + 60
    # Samples of a frame are divided evenly among its periods, so neighbours share a batch less often than by chance.
    assert distances[0, 0] < 1.1 * distances[1, 0]
    assert np.abs(distances[0, 1:] - distances[1, 1:]).sum() < 0.1 * distances[1, 1:].sum()
    assert pairs[0] == pytest.approx(pairs[1], rel=0.3)
