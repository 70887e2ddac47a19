"""The splits that a run reads belong to one pack, on every rank."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, pack_splits, synthetic_splits
from support.lying_server import LyingServer
from support.raw_files import refusal

import pipeline.packing.pack
from pipeline.common import labelled_samples
from pipeline.common.index_ranges import IndexRanges
from pipeline.common.labelled_samples import LabelledSamples
from shards import open_split
from shards.atomic import replace_directory
from shards.errors import MismatchError, UserError
from shards.remote import on_demand
from shards.stores.base import Store
from trainer.config.load import load
from trainer.config.schema import Config
from trainer.data import training_data
from trainer.data.resolution_schedule import TrainingLoader
from trainer.data.training_data import open_data, split_fold
from trainer.evaluate.logit_adjustment import log_class_weights
from trainer.models.precision import resolve_precision
from trainer.runtime.distributed import World

ALONE = World(rank=0, size=1, device=torch.device("cpu"))
REPLACED = "which was replaced, changed or removed while it was read"


def config(shards: Path, *overrides: str) -> Config:
    settings = load(ROOT / "configs/quickstart.yaml", [f"data.shards={shards}", *overrides])
    return resolve_precision(settings, ALONE.device)


def test_a_fold_is_tested_and_neither_trained_on_nor_validated(synthetic_set: Path) -> None:
    whole, *folds = (
        open_data(config(synthetic_set, *overrides), ALONE)
        for overrides in ((), *((f"data.fold={number}/3", "data.val_fraction=0.2") for number in (1, 2, 3)))
    )
    assert whole.test_store.manifest.split == "test" and whole.counts.sum() == 630
    tested = []
    for data in folds:
        assert data.validation is not None and data.test_store.manifest.split == "train"
        parts = [data.validation.sampler.samples, data.test.sampler.samples]
        trained = np.concatenate([batch.source_index for batch in data.train.batches()])
        rows = data.test_store.rows
        assert not set(trained) & set(rows[np.concatenate(parts)]) and not set(parts[0]) & set(parts[1])
        assert data.counts.sum() + sum(map(len, parts)) == 700
        tested.append(parts[1])
    assert sorted(np.concatenate(tested)) == list(range(700))
    error = refusal(lambda: open_data(config(synthetic_set, "data.fold=701/701"), ALONE))
    assert "data.fold=701/701" in error.found


@pytest.mark.parametrize("setting", ["schedule.name=plateau", "posthoc.tau=auto", "trainer.patience=2"])
def test_settings_that_need_validation_images(synthetic_set: Path, tmp_path: Path, setting: str) -> None:
    """A val split provides them without `data.val_fraction`."""
    overrides = ("data.val_fraction=0", setting)
    error = refusal(lambda: open_data(config(synthetic_set, *overrides), ALONE))
    assert error.found == f"{setting} with data.val_fraction=0, and no val split in {synthetic_set}"
    assert open_data(config(synthetic_set, error.hint, setting), ALONE).validation is not None
    train, test = synthetic_splits()
    shards = pack_splits((train.select(np.arange(60, 700)), test, train.select(np.arange(60), "val")), tmp_path / "set")
    assert open_data(config(shards, *overrides), ALONE).validation is not None


def test_a_fraction_that_leaves_one_class_is_named(synthetic_set: Path) -> None:
    error = refusal(lambda: open_data(config(synthetic_set, "data.train_fraction=0.001"), ALONE))
    assert error.found == "1 training sample of one class, out of 700"
    assert error.hint.startswith("raise data.train_fraction")


def test_class_balance_is_that_of_the_batches_and_of_the_loss(synthetic_set: Path) -> None:
    settings = config(synthetic_set, "data.class_balance=1", "data.train_fraction=0.3", "loader.batch_size=50")
    data = open_data(settings, ALONE)
    labels = np.concatenate([batch.labels.numpy() for batch in data.train.batches(3)])
    assert np.bincount(labels, minlength=len(data.classes)).tolist() == data.drawn.tolist()
    assert np.ptp(data.drawn) <= 1 < np.ptp(data.counts) and data.counts.sum() == len(data.train.samples)
    # The samples drawn have weights like those of a loss, which tau=1 undoes in predictions.
    assert log_class_weights(data.counts, settings.loss, data.drawn) == pytest.approx(np.log(data.drawn / data.counts))


def test_a_run_continues_with_another_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The batches of a run that fetches shards on demand are those of one that goes on with all of them on disk."""
    monkeypatch.setattr(pipeline.packing.pack, "SHARD_BYTES", 16 * 4 * 4)
    shards = pack_splits(synthetic_splits(24 * 16, shape=(4, 4, 1)), tmp_path / "set", block_size=1)
    packed = open_split(shards, "train").manifest.packed_bytes
    server = LyingServer(tmp_path, lambda: None)
    monkeypatch.setenv("INKSTREAM_CACHE", str(tmp_path / "cache"))

    def open_with(cache: int) -> TrainingLoader:
        on_demand._open.clear()  # as in another process
        monkeypatch.setenv("INKSTREAM_CACHE_SIZE", str(cache))
        address = f"http://127.0.0.1:{server.port}/set"
        return open_data(config(address, "loader.batch_size=16", "data.resolution=8"), ALONE).train

    small = open_with(packed)  # the test split has no room beside it
    assert small.window is not None and small.window_of_shards
    expected = [[batch.source_index.tolist() for batch in small.batches(epoch)] for epoch in range(2)]
    assert len({row for batch in expected[0] for row in batch}) == len(expected[0]) * len(expected[0][0])
    for cache in (packed, 10 * packed):
        loader = open_with(cache)
        loader.window, loader.window_of_shards = small.window, True  # as `Training.restore` does
        assert [batch.source_index.tolist() for batch in loader.batches(1, 7)] == expected[1][7:]
    assert not open_with(10 * packed).window_of_shards
    server.close()


@pytest.mark.parametrize("cache", ["auto", "0.0005"])
def test_a_large_store_is_divided_into_ranges(synthetic_set: Path, monkeypatch: pytest.MonkeyPatch, cache: str) -> None:
    """Any store is large here; with little memory, also for its images."""
    monkeypatch.setattr(labelled_samples, "_MAX_SORTED", 0)
    overrides = ("data.fold=2/3", "data.val_fraction=0.2", "data.train_fraction=0.8", f"loader.cache_gb={cache}")
    data = open_data(config(synthetic_set, *overrides), ALONE)
    assert data.validation is not None
    parts = [data.validation.sampler.samples, data.test.sampler.samples]
    assert all(isinstance(part, IndexRanges) for part in (*parts, data.train.samples))
    trained = torch.cat([batch.source_index for epoch in (0, 1) for batch in data.train.batches(epoch)]).tolist()
    others = [torch.cat([batch.source_index for batch in loader.batches()]) for loader in (data.validation, data.test)]
    assert data.counts.sum() == len(data.train.samples) == len(set(trained)) == 299  # 0.64 of 2/3 of 700
    assert not set(trained) & set(torch.cat(others).tolist()) and [len(other) for other in others] == [93, 233]


@pytest.mark.parametrize("after", ["test", "train"])
def test_splits_of_two_packs_are_refused(
    synthetic_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: str
) -> None:
    """The data set is replaced after one of its splits was opened."""
    directory = Path(shutil.copytree(synthetic_set, tmp_path / "set"))
    other = pack_splits(synthetic_splits(seed=1), tmp_path / "other")

    def open_and_replace(place: Path, split: str, memory: int, verify: bool) -> Store:
        store = open_split(place, split, memory, verify)
        if split == after:
            with replace_directory(directory) as replacement:
                shutil.copytree(other, replacement.path, dirs_exist_ok=True)
                replacement.commit()
        return store

    monkeypatch.setattr(training_data, "open_split", open_and_replace)
    error = refusal(lambda: open_data(config(directory), ALONE))
    assert isinstance(error, MismatchError)
    assert REPLACED in error.found and str(directory) in error.found


class TwoRanks(World):
    """Rank 0, with another rank that has opened another pack."""

    def all_gather(self, work: Callable[[], Any]) -> list[Any]:
        result = work()
        return [result, "0" * 64 if isinstance(result, str) else result]


def test_ranks_with_different_packs_are_refused(synthetic_set: Path) -> None:
    error = refusal(lambda: open_data(config(synthetic_set), TwoRanks(device=torch.device("cpu"))))
    assert error.found == f"{synthetic_set}, {REPLACED}"


def test_more_folds_than_samples_are_refused_in_every_fold() -> None:
    labels = np.array([0, 1, 0, 1])
    every = LabelledSamples(labels, np.arange(4), np.bincount(labels), True)
    for number in range(1, 5):
        assert len(split_fold(every, f"{number}/4", 0)[0]) == 1
    for number in range(1, 6):
        with pytest.raises(UserError, match="more parts than the 4 samples"):
            split_fold(every, f"{number}/5", 0)
