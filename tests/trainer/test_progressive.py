"""Progressive resizing: every epoch at its own resolution, and all else as exact as without."""

from __future__ import annotations

import contextlib
import io
import json
import signal
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT
from support.run_outcome import assert_same_run, history
from support.training_runs import QUICK, stop_in_epoch, train_here

from pipeline.sampler import ShuffledBatchSampler, equal_batch_size
from shards import UserError
from trainer.config.load import load
from trainer.config.schema import Config
from trainer.data.resolution_schedule import ResolutionStage, TrainingLoader, resolution_stages
from trainer.data.training_data import open_data
from trainer.models.precision import resolve_precision
from trainer.optim.schedules import LRSchedule
from trainer.runtime.distributed import World

QUICKSTART = ROOT / "configs" / "quickstart.yaml"
ALONE = World(rank=0, size=1, device=torch.device("cpu"))


def config(*overrides: str) -> Config:
    return resolve_precision(load(QUICKSTART, list(overrides)), ALONE.device)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, synthetic_set: Path) -> Path:
    """An epoch at each of three resolutions, in batches of other sizes, with all that has a state."""
    path = tmp_path_factory.mktemp("recipe") / "growing.yaml"
    changed = {
        "data": QUICK["data"] | {"shards": str(synthetic_set), "resolution": [[1, 8], [2, 12], [3, 20]]},
        "loader": {"batch_size": 16, "scale_batch_with_resolution": True},
    }
    path.write_text(yaml.safe_dump(QUICK | changed))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, recipe: Path) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "whole"
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        assert train_here(patch, recipe, directory) == 0
    assert "at 8x8, from epoch 2 on 12x12, from epoch 3 on 20x20" in said.getvalue()
    assert "batch size 90, from epoch 2 on batch size 39, from epoch 3 on batch size 15" in said.getvalue()
    return directory


def test_phases_follow_the_schedule_and_keep_the_pixels_of_a_batch() -> None:
    given = ("data.resolution=[[1, 48], [5, 80], [9, 112]]", "trainer.epochs=12", "loader.batch_size=512")
    assert resolution_stages(config(*given)) == (
        ResolutionStage(0, 48, 512),
        ResolutionStage(4, 80, 512),
        ResolutionStage(8, 112, 512),
    )
    scaled = resolution_stages(config(*given, "loader.scale_batch_with_resolution=true"))
    assert scaled == (ResolutionStage(0, 48, 2784), ResolutionStage(4, 80, 1000), ResolutionStage(8, 112, 512))
    assert all(stage.batch_size * stage.resolution**2 <= 512 * 112**2 for stage in scaled)
    assert resolution_stages(config("data.resolution=28")) == (ResolutionStage(0, 28, 64),)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.resolution=[[2, 48]]", "start with 1"),
        ("data.resolution=[]", "start with 1"),
        ("data.resolution=[[1, 48], [1, 56]]", "start with 1 and increase"),
        ("data.resolution=[48, 56]", "pairs of an epoch and the side of a square"),
        ("data.resolution=[[1, 48.5]]", "pairs of an epoch and the side of a square"),
        ("data.resolution=[[1, 0]]", "resolutions of 1 .. 4096 pixels"),
    ],
)
def test_a_schedule_that_is_none_is_refused(override: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        load(QUICKSTART, [override])
    assert words in caught.value.expected
    assert caught.value.hint.startswith("data.resolution: ")


def test_a_schedule_agrees_with_the_other_settings() -> None:
    with pytest.raises(UserError, match=r"changes at epoch 9, but trainer\.epochs is 8"):
        load(QUICKSTART, ["data.resolution=[[1, 8], [9, 28]]"])
    with pytest.raises(UserError, match="three_block_cnn takes 4 or more"):
        load(QUICKSTART, ["data.resolution=[[1, 3], [2, 28]]"])
    assert "loader.scale_batch_with_resolution has no effect" in "".join(
        config("loader.scale_batch_with_resolution=true").settings_without_effect()
    )


def test_samples_are_used_equally_often_over_stages_with_other_batch_sizes() -> None:
    given = ("data.resolution=[[1, 48], [4, 80], [9, 112]]", "trainer.epochs=30", "loader.batch_size=32")
    stages = resolution_stages(config(*given, "loader.scale_batch_with_resolution=true"))
    sampler = ShuffledBatchSampler(np.arange(630), 32, 0)
    train = TrainingLoader(Mock(), sampler, stages, Mock(), ALONE)
    assert [sampler.left_out for sampler in map(train.sampler_at, (0, 3, 8))] == [2, 6, 10]
    used = np.zeros(630, int)
    for epoch in range(30):
        for step in train.sampler_at(epoch).steps(epoch, 0, 1):
            used[step.samples] += 1
        assert np.ptp(used) <= 1


def test_every_epoch_has_its_resolution_with_its_own_statistics(synthetic_set: Path) -> None:
    given = ("data.resolution=[[1, 8], [2, 28], [3, 40]]", f"data.shards={synthetic_set}", "loader.batch_size=32")
    data = open_data(
        config(*given, "loader.scale_batch_with_resolution=true", "trainer.epochs=3", "loader.backend=torch"), ALONE
    )
    for epoch, (side, batch_size) in enumerate([(8, 800), (28, 64), (40, 32)]):
        seen, total, squares = [], 0.0, 0.0
        for batch in data.train.batches(epoch):
            assert batch.images.shape[1:] == (1, side, side)
            assert batch.global_size == equal_batch_size(len(data.train.samples), batch_size)
            seen.append(batch.source_index)
            total += float(batch.images.double().mean(dim=(1, 2, 3)).sum())
            squares += float(batch.images.double().square().mean(dim=(1, 2, 3)).sum())
        rows = np.sort(torch.cat(seen).numpy())
        assert len(np.unique(rows)) == len(rows) == data.train.steps(epoch) * batch.global_size
        # Measured over the whole part; what is trained on is 90 % of it.
        assert total / len(rows) == pytest.approx(0, abs=0.02)
        assert squares / len(rows) == pytest.approx(1, abs=0.02)
    assert data.spec.resolution == 40
    assert {batch.images.shape[2] for batch in data.test.batches()} == {40}
    with contextlib.closing(data.train.batches(1, 3)) as later, contextlib.closing(data.train.batches(1)) as whole:
        assert torch.equal(next(later).source_index, [next(whole) for _ in range(4)][-1].source_index)


@pytest.mark.parametrize("schedule", ["cosine", "one_cycle", "warm_restarts", "constant"])
def test_the_learning_rate_goes_by_epochs_whatever_their_number_of_updates(schedule: str) -> None:
    given = (f"schedule.name={schedule}", "trainer.epochs=6", "schedule.warmup=1", "schedule.cycle_epochs=2")

    def ends(updates: list[int]) -> list[float]:
        """The learning rate with which each epoch begins, the last one's end included."""
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
        rate = LRSchedule(optimizer, config(*given), updates)
        found = [rate.lr]
        for count in updates:
            for _ in range(count):
                optimizer.step()
                rate.step_update()
            rate.step_epoch(0.0)
            found.append(rate.lr)
        return found

    uneven, even = ends([2, 2, 5, 5, 7, 12]), ends([12] * 6)
    assert uneven == pytest.approx(even, rel=1e-9)


def test_a_run_tells_of_its_resolutions_and_learns(finished: Path) -> None:
    records = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [record["resolution"] for record in records] == [8, 12, 20]
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["resolution"] == 20
    page = " ".join((finished / "report.html").read_text().replace("\N{MULTIPLICATION SIGN}", "x").split())
    assert "trained at 8x8, 12x12 from epoch 2 on, 20x20 from epoch 3 on, 3 epochs" in page
    assert summary["accuracy"] > 0.9
    best = torch.load(finished / "checkpoints" / "best.pt", weights_only=True)
    last = torch.load(finished / "checkpoints" / "last.pt", weights_only=True)
    assert last["updates"] == 4 + 8 + 20, "630 images in batches of 96, 40 and 16, two batches an update"
    assert best["config"]["data"]["resolution"] == [[1, 8], [2, 12], [3, 20]]


@pytest.mark.parametrize("epoch", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_stopped_within_a_phase_and_resumed_is_bit_identical(
    epoch: int, finished: Path, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "run"
    assert stop_in_epoch(recipe, directory, epoch, signal.SIGTERM, 0.2) == 128 + signal.SIGTERM
    state = torch.load(directory / "checkpoints" / "last.pt", weights_only=True)
    assert state["epoch"] == epoch and state["step"] > 0
    assert train_here(monkeypatch, recipe, directory, "resume=auto") == 0
    assert_same_run(finished, directory)


def test_resuming_with_another_schedule_is_refused_with_the_override_that_fits(
    finished: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError) as caught:
        train_here(monkeypatch, recipe, finished, "resume=auto", "data.resolution=20")
    assert "'data.resolution=[[1, 8], [2, 12], [3, 20]]'" in caught.value.hint


def test_the_other_backend_changes_size_too(
    finished: Path, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train_here(monkeypatch, recipe, tmp_path / "run", "loader.backend=dali") == 0
    for expected, found in zip(history(finished), history(tmp_path / "run"), strict=True):
        assert found["resolution"] == expected["resolution"]
        assert found["train_loss"] == pytest.approx(expected["train_loss"], rel=0.02)
