"""The order of samples: a pure function, the same on any number of ranks, and never to change."""

from __future__ import annotations

import hashlib
import math
import tracemalloc
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.common import rng
from pipeline.common.index_ranges import IndexRanges
from pipeline.common.labelled_samples import LabelledSamples, SamplesByClass
from pipeline.common.rng import (
    ELASTIC_STREAM,
    PACKING_STREAM,
    PARTITION_STREAM,
    IndexPermutation,
    permutation,
    random_keys,
)
from pipeline.sampler import (
    BatchSampler,
    SequentialBatchSampler,
    ShuffledBatchSampler,
    equal_batch_size,
    max_shuffle_window,
)
from pipeline.transforms.augmentation import Augmentation
from shards.errors import UserError
from shards.manifest import Manifest

seeds = st.integers(0, 2**63 - 1)
streams = st.one_of(st.integers(0, 1000), st.sampled_from([PACKING_STREAM, PACKING_STREAM + 1, PARTITION_STREAM]))


def positions(count: int) -> NDArray[np.int64]:
    """Positions that are not simply 0 .. count-1, as those of a carved training part are not."""
    return np.arange(count, dtype=np.int64) * 3 + 7


def global_batches(order: BatchSampler, epoch: int, ranks: int, first: int = 0) -> dict[int, list[int]]:
    """The samples of each step of an epoch, the ranks' shares joined in the order of the ranks."""
    batches: dict[int, list[int]] = {}
    sizes: dict[int, int] = {}
    for rank in range(ranks):
        for step in order.steps(epoch, rank, ranks, first):
            batches.setdefault(step.step, []).extend(step.samples.tolist())
            assert sizes.setdefault(step.step, step.global_size) == step.global_size
    assert {number: len(batch) for number, batch in batches.items()} == sizes
    return dict(sorted(batches.items()))


def joined(batches: dict[int, list[int]]) -> list[int]:
    return [sample for batch in batches.values() for sample in batch]


def order_of(sampler: ShuffledBatchSampler, epoch: int) -> NDArray[np.int64]:
    return np.concatenate([step.samples for step in sampler.steps(epoch, 0, 1)])


@given(count=st.integers(0, 500), seed=seeds, stream=streams)
def test_a_permutation_has_every_number_once(count: int, seed: int, stream: int) -> None:
    numbers = permutation(count, seed, stream)
    assert numbers.dtype == np.int64
    np.testing.assert_array_equal(np.sort(numbers), np.arange(count))


def test_golden_keys() -> None:
    """Changing these changes every packed byte and every training run: resumed runs would lose their place."""
    assert random_keys(0, 0, 3).tolist() == [213000021201967259, 4455796210202625458, 2055444239878205049]
    assert random_keys(2**63 - 1, PARTITION_STREAM, 1).tolist() == [14890155944611412985]


def test_streams_of_a_seed_are_apart() -> None:
    streams = [value for name, value in vars(rng).items() if name.endswith("_STREAM")]
    assert len(streams) > 8
    assert len(set(streams)) == len(streams)


def test_keys_from_any_place_on_are_those_of_the_generator_from_there() -> None:
    assert random_keys(5, 6, 8, first=4).tolist() == random_keys(5, 6, 12)[4:].tolist()
    far = np.random.Philox(key=np.array([5, ELASTIC_STREAM], np.uint64), counter=2**54 + 1)
    assert random_keys(5, 1 << 59, 4, first=4 * (2**54 + 1)).tolist() == far.random_raw(4).tolist()


def test_keys_that_agree_in_their_high_bits_are_sorted_by_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fast way keeps the low two bits of four keys for their index."""
    monkeypatch.setattr(rng, "random_keys", lambda *_: np.array([7, 4, 1, 6], np.uint64))
    assert permutation(4, 0, 0).tolist() == [2, 1, 3, 0]


def test_golden_permutations() -> None:
    assert permutation(10, 0, 0).tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
    assert permutation(10, 0, 1).tolist() == [5, 3, 7, 8, 2, 4, 1, 0, 6, 9]
    assert permutation(10, 1, 0).tolist() == [3, 5, 2, 9, 7, 0, 8, 6, 1, 4]
    assert permutation(10, 7, PACKING_STREAM).tolist() == [3, 0, 8, 4, 1, 9, 5, 7, 2, 6]
    many = permutation(100_000, 42, 5).astype("<i8").tobytes()
    assert hashlib.sha256(many).hexdigest() == "579629df5151a84665cfb3f64314f6806fe860c9b05e9bdfa0e9fca5fff2ce6c"


def test_golden_training_batches() -> None:
    steps = list(ShuffledBatchSampler(np.arange(10), batch_size=4, seed=3).steps(epoch=2, rank=1, world_size=2))
    assert [step.samples.tolist() for step in steps] == [[4, 8], [1, 2], [0, 9]]


def test_seeds_and_streams_are_independent() -> None:
    """No two of these 40 orders of 1,000 numbers agree in noticeably more places than chance has it (one)."""
    orders = np.stack(
        [permutation(1000, seed, stream) for seed in range(5) for stream in (*range(6), 1 << 62, 1 << 63)]
    )
    agreeing = (orders[:, None] == orders[None]).sum(axis=2)
    assert agreeing[~np.eye(len(orders), dtype=bool)].max() < 12


def test_every_place_is_as_likely_for_every_number() -> None:
    """Over 6,000 epochs of four samples, each of the 16 pairs of number and place comes about 1,500 times."""
    orders = np.stack([permutation(4, 0, epoch) for epoch in range(6000)])
    counts = np.stack([np.bincount(orders[:, place], minlength=4) for place in range(4)])
    deviation = (6000 * 3 / 16) ** 0.5
    assert np.abs(counts - 1500).max() < 5 * deviation


class Network(IndexPermutation):
    """An index permutation without the table of short ones."""

    _MAX_TABLE = 0


@given(count=st.integers(2, 3000), seed=seeds, stream=streams)
def test_an_index_permutation_has_every_number_once(count: int, seed: int, stream: int) -> None:
    for permuted in (IndexPermutation(count, seed, stream), Network(count, seed, stream)):
        numbers = permuted[np.arange(count)]
        assert numbers.dtype == np.int64
        np.testing.assert_array_equal(np.sort(numbers), np.arange(count))


@pytest.mark.parametrize("count", [1 << 16, (1 << 16) + 1, 100_003, 1 << 17])
def test_a_long_index_permutation_has_every_number_once(count: int) -> None:
    numbers = IndexPermutation(count, 5, 2)[np.arange(count)]
    np.testing.assert_array_equal(np.sort(numbers), np.arange(count))


def test_short_index_permutations_are_uniform() -> None:
    assert IndexPermutation(10, 7, 1)[np.arange(10)].tolist() == permutation(10, 7, 1).tolist()


def test_golden_index_permutations() -> None:
    """Changing these changes every training run, as do the golden permutations."""
    assert IndexPermutation(10**9, 0, 0)[np.arange(4)].tolist() == [224957664, 754784518, 565451606, 62501051]
    assert IndexPermutation(3 * 10**12, 42, 7)[np.array([0, 2 * 10**12])].tolist() == [2614130780631, 2265807223644]


@given(count=st.integers(1 << 17, 1 << 62), seed=seeds, stream=streams, data=st.data())
def test_any_part_of_an_index_permutation_is_computed_alone(
    count: int, seed: int, stream: int, data: st.DataObject
) -> None:
    first = data.draw(st.integers(0, count - 100))
    permuted = IndexPermutation(count, seed, stream)
    part = permuted[np.arange(first, first + 100)]
    assert permuted[np.arange(first + 40, first + 50)].tolist() == part[40:50].tolist()
    assert len(set(part.tolist())) == 100
    assert part.min() >= 0
    assert part.max() < count


def test_a_batch_of_a_billion_samples_takes_the_memory_of_a_batch() -> None:
    IndexPermutation(10**9, 0, 0)[np.arange(512)]  # the first call of a process imports modules of numpy
    tracemalloc.start()
    try:
        for epoch in range(3):
            IndexPermutation(10**9, 0, epoch)[np.arange(5 * 10**8, 5 * 10**8 + 512)]
        assert tracemalloc.get_traced_memory()[1] < 1 << 18
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("window", [None, 2, 250_000])
def test_the_first_batches_of_an_epoch_of_a_billion_samples_take_little_memory(window: int | None) -> None:
    """50 MB at most. They include those that are computed together with the first one."""
    tracemalloc.start()
    try:
        sampler = ShuffledBatchSampler(IndexRanges.first(10**9), 512, 0, 512, window)
        for epoch in (0, 1000):
            first = [next(sampler.steps(epoch, rank, 2, 10**6)).samples for rank in range(2)]
            assert list(map(len, first)) == [256, 256]
        assert tracemalloc.get_traced_memory()[1] < 30e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("count", [1000, 66_000, 1_048_576])
def test_index_permutations_pass_the_chi_squared_tests_that_uniform_ones_pass(count: int) -> None:
    """Places of the first numbers, displacements, and steps between neighbours, over epochs, in 50 equal classes."""
    bins, epochs = 50, 2000 if count == 1000 else 12
    every = np.arange(count)
    for make in (Network, IndexPermutation):
        counts = np.zeros((3, bins), int)
        for epoch in range(epochs):
            numbers = make(count, 3, epoch)[every]
            steps = (numbers[1:] - numbers[:-1]) % count - 1  # 0 .. count - 2
            counts[0] += np.bincount(numbers[:20] * bins // count, minlength=bins)
            counts[1] += np.bincount((numbers - every) % count * bins // count, minlength=bins)
            counts[2] += np.bincount(steps * bins // (count - 1), minlength=bins)
        for row, values in zip(counts, (count, count, count - 1), strict=True):
            share = np.diff(-(-np.arange(bins + 1) * values // bins)) / values  # classes differ by one value
            statistic = ((row - row.sum() * share) ** 2 / (row.sum() * share)).sum()
            # 49 degrees of freedom: 99.3 is exceeded once in 30,000. Draws without replacement vary less.
            assert statistic < 99.3


@given(count=st.integers(1, 300), batch_size=st.integers(1, 70), seed=seeds, epoch=st.integers(0, 10_000))
def test_training_batches_are_the_same_on_any_number_of_ranks(
    count: int, batch_size: int, seed: int, epoch: int
) -> None:
    order = ShuffledBatchSampler(positions(count), batch_size, seed)
    alone = global_batches(order, epoch, 1)
    assert list(alone) == list(range(order.steps_per_epoch))
    for ranks in (2, 3, 5, 8):
        assert global_batches(order, epoch, ranks) == alone


@given(
    count=st.integers(1, 300),
    batch_size=st.integers(1, 70),
    seed=seeds,
    epoch=st.integers(0, 10_000),
    window=st.one_of(st.none(), st.integers(1, 40)),
)
def test_a_training_epoch_has_batches_of_one_size_without_repeated_samples(
    count: int, batch_size: int, seed: int, epoch: int, window: int | None
) -> None:
    order = ShuffledBatchSampler(positions(count), batch_size, seed, block_size=16, shuffle_window_blocks=window)
    steps = math.ceil(count / batch_size)
    for ranks in (1, 2, 3, 5):
        batches = global_batches(order, epoch, ranks)
        assert {len(batch) for batch in batches.values()} == {count // steps} == {equal_batch_size(count, batch_size)}
        assert count // steps <= batch_size
        assert list(batches) == list(range(steps))
        assert order.steps_per_epoch == steps
        samples = joined(batches)
        assert len(set(samples)) == len(samples) == count - order.left_out
        assert set(samples) <= set(positions(count).tolist())


@given(
    count=st.integers(1, 150),
    batch_size=st.integers(1, 40),
    seed=seeds,
    epochs=st.integers(1, 20),
    window=st.one_of(st.none(), st.integers(1, 10)),
    offset=st.integers(-(10**6), 10**6),
)
def test_after_any_number_of_epochs_all_samples_were_used_equally_often(
    count: int, batch_size: int, seed: int, epochs: int, window: int | None, offset: int
) -> None:
    order = ShuffledBatchSampler(np.arange(count), batch_size, seed, 16, window, left_out_offset=offset)
    used = np.zeros(count, int)
    for epoch in range(epochs):
        used[order_of(order, epoch)] += 1
        assert np.ptp(used) <= 1
    assert used.sum() == epochs * (count - count % math.ceil(count / batch_size))


def test_epochs_leave_out_consecutive_parts_of_one_permutation() -> None:
    order = ShuffledBatchSampler(positions(10), 4, 5)
    turns = [set(positions(10)) - set(order_of(order, epoch)) for epoch in range(25)]
    assert set.union(*turns[:10]) == set(positions(10))
    assert [len(turn) for turn in turns] == [1] * 25
    assert turns[10:] == (turns[:10] * 2)[:15]


@pytest.mark.slow
def test_which_samples_are_left_out_depends_on_the_seed_only() -> None:
    """Over 2,000 seeds each of 20 samples is left out by the first epoch (of 2) about 200 times."""
    counts = np.zeros(20, int)
    for seed in range(2000):
        counts[np.setdiff1d(np.arange(20), order_of(ShuffledBatchSampler(np.arange(20), 7, seed), 0))] += 1
    assert counts.sum() == 2 * 2000
    assert np.abs(counts - 200).max() < 5 * (2000 * 0.1 * 0.9) ** 0.5


@given(count=st.integers(8, 300), batch_size=st.integers(8, 70), ranks=st.integers(1, 8))
def test_ranks_share_a_training_batch_evenly(count: int, batch_size: int, ranks: int) -> None:
    order = ShuffledBatchSampler(positions(count), batch_size, 0)
    shares = [[len(step.samples) for step in order.steps(0, rank, ranks)] for rank in range(ranks)]
    assert {len(share) for share in shares} == {order.steps_per_epoch}
    sizes = [share[0] for share in shares]
    assert all(set(share) == {size} for share, size in zip(shares, sizes, strict=True)), "a compiled model sees one"
    assert max(sizes) - min(sizes) <= 1


@given(
    count=st.integers(1, 300),
    batch_size=st.integers(1, 70),
    epoch=st.integers(0, 100),
    first=st.integers(0, 310),
    ranks=st.sampled_from([1, 2, 3]),
)
def test_resuming_at_a_step_is_the_tail_of_the_epoch(
    count: int, batch_size: int, epoch: int, first: int, ranks: int
) -> None:
    for order in (
        ShuffledBatchSampler(positions(count), batch_size, 11),
        ShuffledBatchSampler(positions(count), batch_size, 11, 4, 8),
        SequentialBatchSampler(positions(count), batch_size),
    ):
        for rank in range(ranks):
            whole = {step.step: step.samples.tolist() for step in order.steps(epoch, rank, ranks)}
            tail = {step.step: step.samples.tolist() for step in order.steps(epoch, rank, ranks, first)}
            assert tail == {number: samples for number, samples in whole.items() if number >= first}


@pytest.mark.parametrize("window", [None, 12])
def test_epochs_and_seeds_differ(window: int | None) -> None:
    orders = [
        tuple(order_of(ShuffledBatchSampler(positions(1000), 64, seed, 16, window), epoch).tolist())
        for seed in range(3)
        for epoch in range(4)
    ]
    assert len(set(orders)) == 12


BLOCK = 32


@dataclass
class Reads:
    """What a cache that lets go of the blocks that came in first reads for an order."""

    total: int
    distinct: int
    first_batch: int


def reads(order: ShuffledBatchSampler, slots: int, rank: int = 0, ranks: int = 1) -> Reads:
    held: OrderedDict[int, None] = OrderedDict()
    read: list[int] = []
    first_batch = 0
    for step in order.steps(3, rank, ranks):
        needed = np.unique(step.samples // BLOCK).tolist()
        for block in needed:
            if block not in held:
                held[block] = None
                read.append(block)
        first_batch = first_batch or len(read)
        while len(held) > slots:
            held.popitem(last=False)
    return Reads(len(read), len(set(read)), first_batch)


def manifest_of(samples: int, block_size: int = BLOCK) -> Manifest:
    """As much of a manifest as an order asks for: one of a part of 1x1 gray images."""
    return Manifest.model_construct(samples=samples, block_size=block_size, image_shape=(1, 1, 1))


@pytest.mark.parametrize("batch_size", [8, 32, 100, 256])
@pytest.mark.parametrize("slots", [40, 100, 250])
def test_a_windowed_order_reads_every_block_once(slots: int, batch_size: int) -> None:
    samples = 600 * BLOCK
    window = max_shuffle_window(manifest_of(samples), slots * BLOCK, batch_size)
    assert window is not None
    assert slots - 2 * (2 * slots * batch_size / BLOCK) ** 0.5 - 4 < window < slots
    order = ShuffledBatchSampler(np.arange(samples), batch_size, 0, BLOCK, window)
    alone = reads(order, slots)
    assert alone.distinct == 600
    assert alone.total <= 600 * 1.01
    assert alone.first_batch <= min(slots, batch_size)
    for rank in range(3):
        assert reads(order, slots, rank, 3).total <= 600 * 1.01


@pytest.mark.parametrize(("ranks", "lanes"), [(2, 2), (2, 6), (3, 6), (6, 6)])
def test_ranks_read_their_lanes_only_and_have_the_batches_of_one_rank(ranks: int, lanes: int) -> None:
    order = ShuffledBatchSampler(np.arange(600 * BLOCK), 96, 0, BLOCK, 32 * lanes)
    assert order.lanes == lanes
    alone = global_batches(order, 3, 1)
    assert global_batches(order, 3, ranks) == alone
    assert global_batches(order, 3, 2 * ranks, 150) == {step: alone[step] for step in list(alone)[150:]}
    for rank in range(ranks):
        assert abs(reads(order, 40 * lanes, rank, ranks).total - 600 / ranks) <= 1


@pytest.mark.parametrize(
    ("slots", "blocks_per_batch", "window"),
    [
        (50, 1, 50 - 10 - 1 - 2 - 1),
        (100, 2, 100 - 20 - 2 - 2 - 2),
        (200, 4, 200 - 40 - 4 - 2 - 4),
        (5000, 1, 5000 - 100 - 1 - 2 - 48),
        (32, 0.25, 32 - 4 - 3 - 1),
        (9, 2, 1),
    ],
)
def test_the_window_leaves_room_for_the_blocks_of_a_batch(slots: int, blocks_per_batch: float, window: int) -> None:
    """slots - sqrt(2 slots b) - b - 2 - lanes, rounded down, with b blocks per batch; at least one."""
    batch_size = int(blocks_per_batch * BLOCK)
    assert max_shuffle_window(manifest_of(1_000_000), slots * BLOCK, batch_size) == window
    assert max_shuffle_window(manifest_of(1_000_000), slots * BLOCK + BLOCK - 1, batch_size) == window
    larger = manifest_of(1_000_000).model_copy(update={"image_shape": (2, 5, 3)})
    assert max_shuffle_window(larger, slots * BLOCK * 30, batch_size) == window


def test_only_batches_whose_blocks_and_composition_are_free_may_be_fused() -> None:
    assert ShuffledBatchSampler(positions(10), 4, 0).can_fuse
    assert not ShuffledBatchSampler(positions(10), 4, 0, block_size=2, shuffle_window_blocks=2).can_fuse
    assert not SequentialBatchSampler(positions(10), 4).can_fuse


def test_a_store_without_blocks_has_blocks_of_one_sample() -> None:
    order = order_of(ShuffledBatchSampler(np.arange(50), 4, 0, shuffle_window_blocks=3), 1)
    same = order_of(ShuffledBatchSampler(np.arange(50), 4, 0, block_size=1, shuffle_window_blocks=3), 1)
    assert order.tolist() == same.tolist()


def test_a_set_that_fits_has_no_window() -> None:
    assert max_shuffle_window(manifest_of(1000), 1000, 64) is None
    assert max_shuffle_window(manifest_of(1000), 999, 64) is not None


def test_memory_for_hardly_a_block_still_gives_an_order() -> None:
    window = max_shuffle_window(manifest_of(1000), BLOCK, 512)
    assert window == 1
    order = ShuffledBatchSampler(positions(200), 64, 0, BLOCK, window)
    assert sorted(joined(global_batches(order, 0, 1))) == positions(200).tolist()


def test_golden_windowed_batches() -> None:
    steps = list(
        ShuffledBatchSampler(np.arange(12), 4, 3, block_size=2, shuffle_window_blocks=3).steps(
            epoch=2, rank=0, world_size=1
        )
    )
    assert [step.samples.tolist() for step in steps] == [[1, 0, 3, 10], [4, 11, 2, 6], [7, 9, 5, 8]]


@given(count=st.integers(0, 300), batch_size=st.integers(1, 70))
def test_evaluation_has_every_sample_once_in_the_same_batches_on_any_number_of_ranks(
    count: int, batch_size: int
) -> None:
    order = SequentialBatchSampler(positions(count), batch_size)
    alone = global_batches(order, 0, 1)
    assert joined(alone) == positions(count).tolist()
    assert len(alone) == order.steps_per_epoch
    for ranks in (2, 3, 5):
        assert global_batches(order, 0, ranks) == alone


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_evaluation_gives_each_rank_consecutive_batches(ranks: int) -> None:
    order = SequentialBatchSampler(np.arange(95), 10)
    shares = [[step.step for step in order.steps(0, rank, ranks)] for rank in range(ranks)]
    assert [step for share in shares for step in share] == list(range(10))
    assert {len(share) for share in shares} <= {10 // ranks, -(-10 // ranks)}
    shards = np.arange(0, 96, 5)
    read = [{use.shard for use in order.shard_uses(0, rank, ranks, 0, shards)} for rank in range(ranks)]
    assert sum(map(len, read)) == 19, "no shard that lies within a batch is read by two ranks"


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("repeats", [2, 3])
def test_repeated_augmentation_fills_consecutive_positions_with_each_sample(window: int | None, repeats: int) -> None:
    every = positions(1000)
    plain, repeated = (
        ShuffledBatchSampler(every, 64, 5, 10, window, Augmentation(rotation=10), repeats=count)
        for count in (1, repeats)
    )
    for epoch in (0, 1):
        once, batches = joined(global_batches(plain, epoch, 1)), global_batches(repeated, epoch, 1)
        assert {len(batch) for batch in batches.values()} == {62}
        assert joined(batches) == np.repeat(once, repeats)[: len(once)].tolist()
        assert global_batches(repeated, epoch, 3) == batches
        assert global_batches(repeated, epoch, 2, first=5) == {step: batches[step] for step in list(batches)[5:]}
    params = next(iter(repeated.steps(0, 0, 1))).params
    assert params is not None
    assert len(np.unique(params.uniform[:, 0])) == 62, "each copy has its own augmentation"


def expected_draws(counts: list[int], balance: float, total: int) -> list[int]:
    """Samples of each class in an epoch: n^(1 - balance), the largest fractions rounded up."""
    weights = [count ** (1 - balance) if count else 0.0 for count in counts]
    exact = [total * weight / sum(weights) for weight in weights]
    draws = [math.floor(each) for each in exact]
    by_fraction = sorted(range(len(counts)), key=lambda label: draws[label] - exact[label])
    for label in by_fraction[: total - sum(draws)]:
        draws[label] += 1
    return draws


def class_balanced(
    samples: NDArray[np.int64],
    labels: NDArray[np.int64],
    batch_size: int,
    seed: int,
    balance: float,
    block_size: int = 1,
    window: int | None = None,
) -> ShuffledBatchSampler:
    of_store = np.zeros(samples[-1] + 1, np.uint8)
    of_store[samples] = labels
    by_class = SamplesByClass(LabelledSamples(of_store, samples, np.bincount(labels), True), seed)
    return ShuffledBatchSampler(samples, batch_size, seed, block_size, window, by_class=by_class, class_balance=balance)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("balance", [0.3, 0.5, 1.0])
def test_class_balanced_epochs_draw_each_class_by_the_formula(balance: float, window: int | None) -> None:
    counts = [100, 3, 0, 37, 12]
    labels = np.repeat(np.arange(5), counts)[permutation(152, 1, 2)]
    samples = positions(152)
    order = class_balanced(samples, labels, 15, 7, balance, 8, window)
    label_of, used = dict(zip(samples.tolist(), labels.tolist(), strict=True)), dict.fromkeys(samples.tolist(), 0)
    draws = expected_draws(counts, balance, 143)  # 11 batches of 13
    assert order.class_counts.tolist() == draws
    orders = set()
    for epoch in range(9):
        batches = global_batches(order, epoch, 1)
        assert [len(batch) for batch in batches.values()] == [13] * 11
        drawn = joined(batches)
        assert np.bincount([label_of[sample] for sample in drawn], minlength=5).tolist() == draws
        for sample in drawn:
            used[sample] += 1
        orders.add(tuple(drawn))
        for ranks, first in ((3, 0), (2, 6)):  # any number of ranks, also resumed within the epoch
            assert global_batches(order, epoch, ranks, first) == {
                step: batch for step, batch in batches.items() if step >= first
            }
        for label in range(5):
            times = [used[sample] for sample in used if label_of[sample] == label]
            assert not times or max(times) - min(times) <= 1
    assert len(orders) == 9


@given(
    labels=st.lists(st.integers(0, 6), min_size=1, max_size=60),
    batch_size=st.integers(1, 20),
    balance=st.floats(0.01, 1),
    seed=seeds,
    epoch=st.integers(0, 10**6),
)
def test_class_balanced_batches_of_any_data(
    labels: list[int], batch_size: int, balance: float, seed: int, epoch: int
) -> None:
    samples = positions(len(labels))
    order = class_balanced(samples, np.array(labels), batch_size, seed, balance)
    drawn = joined(global_batches(order, epoch, 2))
    found = np.bincount([labels[(sample - 7) // 3] for sample in drawn], minlength=7)
    assert found.tolist() == expected_draws(np.bincount(labels, minlength=7).tolist(), balance, len(drawn))


def batches_of(order: BatchSampler) -> list[list[int]]:
    return [step.samples.tolist() for step in order.steps(0, 0, 1)]


@pytest.mark.parametrize("kind", [ShuffledBatchSampler, SequentialBatchSampler])
def test_samples_may_be_any_integers(kind: type) -> None:
    """As `torch.utils.data.Subset` holds them, or NumPy returns them."""
    arguments = {"seed": 0} if kind is ShuffledBatchSampler else {}
    numbers = [3, 5, 8, 200, 250]
    expected = batches_of(kind(np.array(numbers), batch_size=2, **arguments))
    assert {number for batch in expected for number in batch} <= set(numbers)
    for samples in (numbers, tuple(numbers), np.array(numbers, np.uint8), np.array(numbers, np.int32)):
        assert batches_of(kind(samples, batch_size=2, **arguments)) == expected


@pytest.mark.parametrize("kind", [ShuffledBatchSampler, SequentialBatchSampler])
@pytest.mark.parametrize("samples", [np.arange(9) < 5, np.arange(9.0), np.arange(9).reshape(3, 3), ["a"]])
def test_samples_that_are_no_numbers_are_refused(kind: type, samples: object) -> None:
    """A mask would draw samples 0 and 1 only."""
    with pytest.raises(UserError, match="flatnonzero"):
        kind(samples, batch_size=2, **({"seed": 0} if kind is ShuffledBatchSampler else {}))


def test_no_samples_are_refused() -> None:
    with pytest.raises(UserError, match="no samples"):
        ShuffledBatchSampler(np.arange(0), 2, 0)
