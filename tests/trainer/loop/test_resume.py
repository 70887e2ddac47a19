"""Going on after a stop is exact, whatever has a state; with settings changed on purpose it is as near as can be."""

from __future__ import annotations

import errno
import itertools
import json
import os
import resource
import shutil
import signal
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import free_port, pack_splits, run_module, synthetic_splits
from support.training_runs import stop_in_epoch
from support.version_2 import downgrade

from shards import UserError
from shards.convert import upgrade
from shards.errors import DiskFullError
from trainer.checkpoint import io as checkpoint
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.checkpoint.run_dir import RunDirectory
from trainer.config.load import load
from trainer.config.schema import CheckpointConfig
from trainer.loop import engine, state
from trainer.run import main as run_main

# 130 training images make 9 steps of 14 and leave 4 out; with accumulation 2 five updates, the last of one batch.
SMALL = {
    "data": {"val_fraction": 0.1, "resolution": 12},
    "loader": {"batch_size": 16},
    "model": {"name": "three_block_cnn", "drop_rate": 0.3},
    "optim": {"name": "adamw", "lr": 2e-3},
    "schedule": {"name": "cosine"},
    "trainer": {"epochs": 3, "precision": "fp32"},
    "checkpoint": {"every_steps": 2},
}
STEPS = 9

OPTIMIZERS = ("adam", "adamw", "lion", "sgd_lookahead")
SCHEDULES = (
    "constant warmup=1",
    "cosine warmup=1",
    "cosine unit=epoch",
    "warm_restarts cycle_epochs=1",
    "warm_restarts unit=epoch cycle_epochs=1 cycle_mult=2",
    "one_cycle warmup=1",
    "plateau patience=0 factor=0.5",
)
EXTRAS = {
    "ema": ["trainer.ema_decay=0.9"],
    "mixing": ["mixup.prob=0.7"],
    "accumulation": ["optim.grad_accumulation=2", "optim.max_grad_norm=1.0"],
    "augmentation": [
        *("augment.rotation=10", "augment.shear=5", "augment.translation=0.05", "augment.scale=0.1"),
        *("augment.elastic=0.05", "augment.stroke=0.7", "augment.erase=0.5", "augment.erase_at=contour"),
    ],
    "depth": ["model.name=test_efficientnet", "model.drop_path_rate=0.4"],
}
ALL = [override for overrides in EXTRAS.values() for override in overrides]


CLOCKED = {"seconds", "wait_seconds", "elapsed", "images_per_second", "data_wait_share"}


class Killed(BaseException):
    """Stands for the end of the process: nothing of ours catches it."""


@pytest.fixture(scope="module")
def small_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    parts = synthetic_splits(train=144, test=30, classes=3, shape=(12, 12, 1), transposed=False)
    return pack_splits(parts, tmp_path_factory.mktemp("small") / "set", block_size=16)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, small_set: Path) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL | {"data": SMALL["data"] | {"shards": str(small_set)}}))
    return path


def train(recipe: Path, directory: Path, *overrides: str, die_at: tuple[int, int] | None = None) -> int:
    """Train in this process. die_at: (epoch, step) at which it ends in the middle of the step."""
    step = engine.train_step

    def until_death(training: Any, batch: Any, *arguments: Any) -> torch.Tensor:
        if (training.state.epoch, batch.step) == die_at:
            raise Killed
        return step(training, batch, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["trainer.run", str(recipe), f"run.dir={directory}", *overrides])
        patch.setattr(engine, "train_step", until_death)
        return run_main()


def newest(directory: Path) -> dict[str, Any]:
    return checkpoint.load_newest(directory / "checkpoints")[0]


def history(directory: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name not in CLOCKED} for record in records]


def assert_same(first: Any, second: Any, place: str = "") -> None:
    """Equal to the last bit, but for what a clock decides."""
    assert type(first) is type(second), place
    if isinstance(first, dict):
        assert first.keys() == second.keys(), place
        for name in first:
            if name not in CLOCKED:
                assert_same(first[name], second[name], f"{place}.{name}")
    elif isinstance(first, list | tuple):
        assert len(first) == len(second), place
        for number, (one, other) in enumerate(zip(first, second, strict=True)):
            assert_same(one, other, f"{place}[{number}]")
    elif isinstance(first, torch.Tensor):
        assert torch.equal(first, second), place
    else:
        assert first == second, place


def assert_exact(recipe: Path, tmp_path: Path, overrides: list[str], deaths: list[tuple[int, int]]) -> None:
    """A run that dies at some places, one after another, ends as one that does not."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert train(recipe, whole, *overrides) == 0
    for place in deaths:
        with pytest.raises(Killed):
            train(recipe, stopped, "resume=auto", *overrides, die_at=place)
    assert newest(stopped)["step"] > 0, "in the middle of an epoch"
    assert train(recipe, stopped, "resume=auto", *overrides) == 0
    assert_same(newest(whole), newest(stopped))
    best = [checkpoint.load(RunDirectory(directory).best)["model"] for directory in (whole, stopped)]
    assert_same(*best)
    assert history(whole) == history(stopped)


def combined(optimizer: str, schedule: str) -> list[str]:
    name, *options = schedule.split()
    return [f"optim.name={optimizer}", f"schedule.name={name}", *(f"schedule.{option}" for option in options)]


# Every optimiser, every schedule and every extra at least once; the slow grid has all pairs.
@pytest.mark.parametrize(
    ("optimizer", "schedule", "extras"),
    [
        ("adam", SCHEDULES[0], ["mixing"]),
        ("adamw", SCHEDULES[1], ["ema", "accumulation"]),
        ("lion", SCHEDULES[3], ["mixing", "ema"]),
        ("sgd_lookahead", SCHEDULES[5], ["accumulation"]),
        ("adamw", SCHEDULES[4], ["depth", "ema"]),
        ("sgd_lookahead", SCHEDULES[6], list(EXTRAS)),
        ("lion", SCHEDULES[2], []),
        ("muon", "poly warmup=1", []),
        ("schedule_free_adamw", SCHEDULES[0], []),
    ],
)
def test_dying_within_an_epoch_changes_nothing(
    recipe: Path, tmp_path: Path, optimizer: str, schedule: str, extras: list[str]
) -> None:
    overrides = combined(optimizer, schedule) + [override for extra in extras for override in EXTRAS[extra]]
    assert_exact(recipe, tmp_path, overrides, [(1, 5)])


def test_dying_within_validation_changes_nothing(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batch norm of schedule-free weights is computed anew, with drop path."""
    settings = ["model.name=cifar_efficientnet", "model.channel_multiplier=0.25", "model.drop_path_rate=0.4"]
    settings += [
        "model.depth_multiplier=0.5",
        "optim.name=schedule_free_adamw",
        "schedule.name=constant",
        "trainer.epochs=1",
    ]

    def die(*_: Any, **__: Any) -> None:
        raise Killed

    assert train(recipe, tmp_path / "whole", *settings) == 0
    with monkeypatch.context() as patch:
        patch.setattr(engine, "evaluate", die)
        with pytest.raises(Killed):
            train(recipe, tmp_path / "stopped", *settings)
    assert newest(tmp_path / "stopped")["step"] == STEPS
    torch.rand(7)
    assert train(recipe, tmp_path / "stopped", *settings, "resume=auto") == 0
    assert_same(newest(tmp_path / "whole"), newest(tmp_path / "stopped"))


@pytest.mark.slow
def test_a_run_is_resumed_after_an_upgrade_of_its_data_set(tmp_path: Path) -> None:
    """Killed with the data set in format version 2, resumed with it in version 3: as with version 2 throughout."""
    parts = synthetic_splits(train=700, test=90)
    old = downgrade(pack_splits(parts, tmp_path / "old"))
    shards, whole, stopped = tmp_path / "set", tmp_path / "whole", tmp_path / "stopped"
    shutil.copytree(old, shards)
    settings = SMALL | {"data": {"val_fraction": 0.1, "resolution": 28, "shards": str(shards)}}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(settings))
    assert run_module("trainer.run", recipe, f"run.dir={whole}", f"data.shards={old}").returncode == 0
    assert stop_in_epoch(recipe, stopped, 1, signal.SIGKILL, 0.5) == -signal.SIGKILL
    assert newest(stopped)["epoch"] == 1
    assert [manifest.version for manifest in upgrade(shards)] == [3, 3]
    process = run_module("trainer.run", recipe, f"run.dir={stopped}", "resume=auto")
    assert process.returncode == 0, process.stdout + process.stderr
    first, second = ({**newest(directory), "recipe": None} for directory in (whole, stopped))
    assert_same(first, second)


@pytest.mark.slow
@pytest.mark.parametrize("extras", [[], *EXTRAS, list(EXTRAS)], ids=str)
@pytest.mark.parametrize(("optimizer", "schedule"), list(itertools.product(OPTIMIZERS, SCHEDULES)))
def test_dying_anywhere_changes_nothing_with_any_settings(
    recipe: Path, tmp_path: Path, optimizer: str, schedule: str, extras: list[str] | str
) -> None:
    names = [extras] if isinstance(extras, str) else extras
    overrides = combined(optimizer, schedule) + [override for extra in names for override in EXTRAS[extra]]
    assert_exact(recipe, tmp_path, overrides, [(0, 7), (1, 2), (1, 8), (2, 8)])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, recipe: Path) -> Path:
    """The run directory of the recipe, trained without a stop."""
    directory = tmp_path_factory.mktemp("runs") / "whole"
    assert train(recipe, directory) == 0
    return directory


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: Path) -> None:
    """Of the largest tensor, which torch reads without a look at the checksum."""
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda member: member.file_size)
    content = bytearray(path.read_bytes())
    content[largest.header_offset + largest.file_size // 2] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [cut_short, flip_a_bit, empty, Path.unlink])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_it(
    recipe: Path, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None]
) -> None:
    damaged = tmp_path / "damaged"
    with pytest.raises(Killed):
        train(recipe, damaged, die_at=(1, 7))
    last, previous = (damaged / "checkpoints" / name for name in (checkpoint.LAST, checkpoint.PREVIOUS))
    assert (checkpoint.load(last)["step"], checkpoint.load(previous)["step"]) == (6, 4)
    damage(last)
    if damage is not Path.unlink:  # what a kill between two renames leaves is nobody's fault
        with pytest.raises(Killed):
            train(recipe, damaged, "resume=auto", die_at=(1, 7))
        assert f"{last}, which cannot be read" in caplog.text and str(previous) in caplog.text
        assert checkpoint.load(previous)["step"] == 4, "and a damaged one does not take the place of a whole one"
    assert train(recipe, damaged, "resume=auto") == 0
    assert_same(newest(whole), newest(damaged))
    assert history(whole) == history(damaged)


def test_two_damaged_checkpoints_are_refused(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train(recipe, tmp_path / "run", die_at=(0, 5))
    for name in (checkpoint.LAST, checkpoint.PREVIOUS):
        cut_short(tmp_path / "run" / "checkpoints" / name)
    with pytest.raises(UserError, match=r"previous\.pt, which cannot be read"):
        train(recipe, tmp_path / "run", "resume=auto")


def test_a_full_disk_costs_checkpoints_and_not_the_run(
    recipe: Path, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit on a file's size stops a write in its middle, as a full disk does."""
    crowded = tmp_path / "crowded"
    save, limits = Checkpointer.save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def crowding(checkpointer: Checkpointer, state: dict[str, Any], best: dict[str, Any] | None = None) -> None:
        checkpointer.finish()
        full = (0, 6) <= (state["epoch"], state["step"]) < (2, 4)
        if full and state["epoch"] == 2:
            last = newest(crowded)
            assert (last["epoch"], last["step"]) == (0, 4), "the one before stands"
            names = sorted(path.name for path in (crowded / "checkpoints").iterdir())
            assert names == [".lock", checkpoint.LAST, checkpoint.PREVIOUS]
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000 if full else limits[0], limits[1]))
        save(checkpointer, state, best)

    monkeypatch.setattr(Checkpointer, "save", crowding)
    try:
        assert train(recipe, crowded) == 0
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    for words in (
        "checkpoint for epoch 1, step 6 not written",
        "checkpoint for epoch 3, step 2 not written",
        "File too large",
    ):
        assert words in caplog.text
    assert "epoch 1, step 4 not" not in caplog.text and "epoch 3, step 4 not" not in caplog.text
    assert_same(newest(whole), newest(crowded))
    best = [checkpoint.load(RunDirectory(directory).best)["model"] for directory in (whole, crowded)]
    assert_same(*best)
    assert history(whole) == history(crowded)


def test_a_run_whose_best_epoch_the_disk_does_not_take_is_not_complete(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = checkpoint.save

    def full(path: Path, state: dict[str, Any]) -> None:
        if path.name == checkpoint.BEST:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(path, state)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", full)
        with pytest.raises(DiskFullError, match="no space left on device"):
            train(recipe, tmp_path / "run")
    assert newest(tmp_path / "run")["best_epoch"] == 0, "no checkpoint tells of a best epoch that is not there"
    assert not (tmp_path / "run" / "summary.json").exists(), "the run is not complete"
    assert train(recipe, tmp_path / "run", "resume=auto") == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["best_epoch"] == 3


def test_a_checkpoint_is_due_by_steps_or_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("trainer.checkpoint.checkpointer.time.monotonic", lambda: now[0])
    directory = RunDirectory(tmp_path)
    with Checkpointer(directory, CheckpointConfig(every_minutes=None, every_steps=10), 25, True) as checkpointer:
        assert [step for step in range(26, 41) if checkpointer.is_due(step)] == [30, 40]
    with Checkpointer(directory, CheckpointConfig(every_minutes=None, every_steps=2), 2000, True) as checkpointer:
        assert [checkpointer.is_due(step) for step in (2001, 2002)] == [False, True]
    with Checkpointer(directory, CheckpointConfig(every_minutes=2), 0, True) as checkpointer:
        assert not checkpointer.is_due(100_000)
        now[0] = 120.0
        assert [checkpointer.is_due(1) for _ in range(2)] == [True, False]
        directory.checkpoints.mkdir()
        checkpointer.save({"step": 1, "epoch": 0, "history": []})
        assert not checkpointer.is_due(2)
        now[0] = 239.0
        assert not checkpointer.is_due(2)
    with Checkpointer(directory, CheckpointConfig(every_minutes=None), 0, True) as checkpointer:
        now[0] = 1e9
        assert not checkpointer.is_due(100_000)


def test_what_is_written_is_the_state_when_it_was_given(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    directory.checkpoints.mkdir()
    weights, history = torch.zeros(1000), [{"epoch": 1}]
    state = {"step": 1, "epoch": 0, "history": history, "model": {"weight": weights}}
    with Checkpointer(directory, CheckpointConfig(), 0, True) as checkpointer:
        checkpointer._writer.submit(time.sleep, 0.2)  # let the copy wait for its turn
        checkpointer.save(state)
        weights.fill_(1)
        history.append({"epoch": 2})
    written = checkpoint.load(directory.checkpoints / checkpoint.LAST, needed=("model",))
    assert not written["model"]["weight"].any() and len(written["history"]) == 1
    assert directory.metrics.read_text() == '{"epoch": 1}\n'


def stop_at(recipe: Path, directory: Path, place: tuple[int, int], *overrides: str) -> dict[str, Any]:
    with pytest.raises(Killed):
        train(recipe, directory, *overrides, die_at=place)
    return newest(directory)


@pytest.mark.parametrize("name", ["adamw", "lion"])  # timm's Lion keeps a further copy of the learning rate
def test_changed_settings_are_refused_with_what_allows_them(recipe: Path, tmp_path: Path, name: str) -> None:
    optimizer = f"optim.name={name}"
    stop_at(recipe, tmp_path / "run", (1, 5), optimizer)
    with pytest.raises(UserError) as caught:
        train(recipe, tmp_path / "run", "resume=auto", optimizer, "optim.lr=1e-4", "optim.weight_decay=0.5")
    assert "optim.lr=0.002 optim.weight_decay=0.01" in caught.value.expected
    allow = "checkpoint.resume_allow_changes=[optim.lr, optim.weight_decay]"
    assert f"'{allow}'" in caught.value.hint
    with pytest.raises(UserError, match=r"optim\.weight_decay=0\.01"):
        train(
            recipe,
            tmp_path / "run",
            "resume=auto",
            optimizer,
            "optim.weight_decay=0.5",
            "checkpoint.resume_allow_changes=[optim.lr]",
        )
    changed = ["resume=auto", optimizer, "optim.lr=1e-4", "optim.weight_decay=0.5", allow]
    assert train(recipe, tmp_path / "run", *changed) == 0
    groups = newest(tmp_path / "run")["optimizer"]["param_groups"]
    assert sorted(group["weight_decay"] for group in groups) == [0.0, 0.5]
    assert train(recipe, tmp_path / "unchanged", optimizer, "optim.lr=1e-4", "optim.weight_decay=0.5") == 0
    rates = ([record["lr"] for record in newest(tmp_path / name)["history"]] for name in ("run", "unchanged"))
    resumed, unchanged = rates
    assert resumed[1:] == unchanged[1:] and resumed[0] == pytest.approx(20 * unchanged[0])


@pytest.mark.parametrize("change", ["optim.lr=2e-3", "optim.head_lr=5e-4"])
def test_a_changed_rate_passes_or_meets_that_of_the_classifier(recipe: Path, tmp_path: Path, change: str) -> None:
    rates = ["optim.lr=1e-3", "optim.head_lr=2e-3"]
    stop_at(recipe, tmp_path / "run", (0, 5), *rates)
    allow = f"checkpoint.resume_allow_changes=[{change.partition('=')[0]}]"
    assert train(recipe, tmp_path / "run", "resume=auto", *rates, change, allow) == 0


@pytest.mark.parametrize(
    ("setting", "is_known"),
    [
        *(("model.name=test_efficientnet", True), ("optim.name=lion", True), ("model.head_hidden=9", True)),
        *(("model.freeze=backbone", True), ("optim.head_lr=1e-3", True), ("optim.layer_decay=0.9", True)),
        *(("optim.options={fallback_list: ['*.weight']}", False),),
    ],
)
def test_what_gives_the_weights_their_form_cannot_change(
    recipe: Path, tmp_path: Path, setting: str, is_known: bool
) -> None:
    stop_at(recipe, tmp_path / "run", (0, 5))
    name = setting.partition("=")[0]
    for allow in ([], [f"checkpoint.resume_allow_changes=[{name}, trainer.epochs]", "trainer.epochs=4"]):
        with pytest.raises(UserError) as caught:
            train(recipe, tmp_path / "run", "resume=auto", setting, *allow)
        assert (f"as {name} cannot change" in caught.value.hint) == bool(is_known or allow)
        assert ("resume_allow_changes" in caught.value.hint) != bool(is_known or allow)


@pytest.mark.parametrize(
    "schedule",
    [pytest.param(name, marks=() if name in SCHEDULES[1::5] else pytest.mark.slow) for name in SCHEDULES],
)
def test_a_changed_schedule_stands_where_it_would_had_it_always_been_so(
    recipe: Path, tmp_path: Path, schedule: str
) -> None:
    changed = ["trainer.epochs=4", "optim.lr=1e-3", *combined("adamw", schedule)]
    assert train(recipe, tmp_path / "always", *changed) == 0
    stop_at(recipe, tmp_path / "run", (1, 5))
    changing = f"checkpoint.resume_allow_changes=[{', '.join(load(recipe, []).recipe())}]"
    assert train(recipe, tmp_path / "run", "resume=auto", *changed, changing) == 0
    rates = [[record["lr"] for record in history(tmp_path / name)] for name in ("always", "run")]
    assert rates[0][1:] == pytest.approx(rates[1][1:], rel=1e-12) or "plateau" in schedule
    assert len(rates[1]) == 4


@pytest.mark.parametrize("before", ["trainer.epochs=3", "schedule.name=constant"])
def test_a_schedule_by_epoch_ends_with_fewer_epochs(recipe: Path, tmp_path: Path, before: str) -> None:
    stop_at(recipe, tmp_path / "run", (2, 5), "schedule.name=one_cycle" if "epochs" in before else before)
    changed = ["trainer.epochs=1", "schedule.name=one_cycle", "schedule.unit=epoch", "resume=auto"]
    names = "[trainer.epochs, schedule.name, schedule.unit]"
    assert train(recipe, tmp_path / "run", *changed, f"checkpoint.resume_allow_changes={names}") == 0
    assert len(history(tmp_path / "run")) == 3


def test_validation_from_a_later_epoch_on_selects_a_validated_epoch(recipe: Path, tmp_path: Path) -> None:
    stop_at(recipe, tmp_path / "run", (1, 5), "data.val_fraction=0", "trainer.monitor=loss")
    changed = [
        "resume=auto",
        "trainer.monitor=loss",
        "checkpoint.resume_allow_changes=[data.val_fraction, data.shards]",
    ]
    assert train(recipe, tmp_path / "run", *changed) == 0
    best = json.loads((tmp_path / "run" / "summary.json").read_text())["best_epoch"]
    losses = [record["validation"]["loss"] for record in history(tmp_path / "run")[1:]]
    assert best == 2 + losses.index(min(losses))


@pytest.mark.parametrize("end", [(1, 0), (2, 0)], ids=["at the end of an epoch", "within an epoch"])
def test_a_best_model_of_a_later_epoch_is_replaced(
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    end: tuple[int, int],
) -> None:
    """The disk took `best.pt` but not `last.pt`, and the resumed run is worse than the one before."""
    save_last = checkpoint.save_last

    def full(directory: Path, state: dict[str, Any], keep: bool) -> None:
        if (state["epoch"], state["step"]) > (1, 0 if end == (1, 0) else STEPS - 1):
            raise OSError(errno.ENOSPC, "No space left on device")
        save_last(directory, state, keep)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_last", full)
        assert stop_at(recipe, tmp_path / "run", (2, 0), "optim.lr=2e-4")["epoch"] == 1
    run = RunDirectory(tmp_path / "run")
    assert checkpoint.load(run.best)["epoch"] == 2, "the metric rises slowly"
    changed = ["resume=auto", "optim.lr=10", "trainer.epochs=3", "checkpoint.resume_allow_changes=[optim.lr]"]
    assert train(recipe, run.path, *changed) == 0
    summary = json.loads(run.summary_path.read_text())
    assert summary["best_epoch"] == checkpoint.load(run.best)["epoch"] == newest(run.path)["best_epoch"]
    assert "best.pt is of epoch 2" in caplog.text


def test_another_batch_or_pack_continues_after_the_same_share_of_the_epoch(recipe: Path, tmp_path: Path) -> None:
    assert stop_at(recipe, tmp_path / "run", (1, 5))["step"] == 4
    seen, step = [], engine.train_step

    def noting(training: Any, batch: Any, *arguments: Any) -> torch.Tensor:
        seen.append((training.state.epoch, batch.step, training.state.updates))
        return step(training, batch, *arguments)

    allow = "checkpoint.resume_allow_changes=[loader.batch_size, optim.grad_accumulation]"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "train_step", noting)
        overrides = ("loader.batch_size=8", "optim.grad_accumulation=3", allow)
        assert train(recipe, tmp_path / "run", "resume=auto", *overrides) == 0
    # 4 of 9 steps are 8 of 17, which a window of three does not end at: 9, the third update of this epoch.
    assert seen[0] == (1, 9, 6 + 3) and seen[-1] == (2, 16, 12 + 5)

    other = pack_splits(synthetic_splits(train=160, test=30, classes=3, shape=(12, 12, 1)), tmp_path / "other", seed=3)
    stop_at(recipe, tmp_path / "moved", (1, 5))
    moved = ("resume=auto", f"data.shards={other}")
    with pytest.raises(UserError, match="packed otherwise") as caught:
        train(recipe, tmp_path / "moved", *moved)
    assert "checkpoint.resume_allow_changes=[data.shards]" in caught.value.hint
    assert train(recipe, tmp_path / "moved", *moved, "checkpoint.resume_allow_changes=[data.shards]") == 0


def test_a_name_that_allows_nothing_is_refused(recipe: Path) -> None:
    with pytest.raises(UserError, match=r"optim\.rate, which is not compared with checkpoints"):
        load(recipe, ["checkpoint.resume_allow_changes=[optim.rate]"])


@pytest.mark.slow
def test_two_ranks_go_on_where_one_was_stopped(recipe: Path, tmp_path: Path) -> None:
    """With a model whose arithmetic does not depend on how a batch is shared out, but for rounding."""
    settings = ["model.name=test_convnext", "model.drop_rate=0", "data.resolution=32"]
    settings += ["optim.name=sgd_lookahead", "optim.lr=0.05"]
    assert train(recipe, tmp_path / "whole", *settings) == 0
    stop_at(recipe, tmp_path / "run", (1, 5), *settings)
    launcher = ("torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}", "-m", "trainer.run")
    process = run_module(*launcher, recipe, f"run.dir={tmp_path / 'run'}", "resume=auto", *settings, timeout=600)
    assert process.returncode == 0, process.stderr
    assert "resuming from epoch 2 after step 4" in process.stdout
    expected, found = newest(tmp_path / "whole"), newest(tmp_path / "run")
    for name, tensor in expected["model"].items():
        torch.testing.assert_close(found["model"][name], tensor, rtol=1e-4, atol=1e-5)
    for one, other in zip(history(tmp_path / "whole"), history(tmp_path / "run"), strict=True):
        assert other["train_loss"] == pytest.approx(one["train_loss"], rel=1e-5)


def test_a_checkpoint_within_an_epoch_of_another_sampler_is_resumed_with_a_warning(
    recipe: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tmp_path / "run"
    with pytest.raises(Killed):
        train(recipe, directory, die_at=(1, 5))
    state = newest(directory)
    assert state["epoch"] == 1 and state["step"] > 0
    del state["sampler_version"]
    checkpoint.save(directory / "checkpoints" / "last.pt", state)
    assert train(recipe, directory, "resume=auto") == 0
    assert "other batches. The rest of epoch 2 repeats some samples and omits others" in caplog.text


def test_fp16_resumes_with_its_loss_scale_bit_for_bit(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scale is halved by overflows at the start and doubled every five steps."""

    def make_grad_scaler(*_: Any) -> torch.amp.GradScaler:
        return torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=5)

    monkeypatch.setattr(state, "make_grad_scaler", make_grad_scaler)
    assert_exact(recipe, tmp_path, ["trainer.precision=fp16", "trainer.ema_decay=0.9"], [(0, 3), (1, 5)])
    assert newest(tmp_path / "whole")["scaler"]["scale"] < 2.0**24
