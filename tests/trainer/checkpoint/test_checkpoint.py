"""A checkpoint is whole or not there, runs no code, and is resumed only by what it fits."""

from __future__ import annotations

import errno
import os
import shlex
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT

import shards.atomic
from shards import UserError
from trainer.checkpoint import compat
from trainer.checkpoint import io as checkpoint
from trainer.checkpoint.compat import check_fits, list_classes
from trainer.config.load import RECIPES, load
from trainer.config.schema import Config

CLASSES = ("a", "b", "c")
BYCLASS = ROOT / "configs" / "byclass.yaml"


def state_of(config: Config, **changes: Any) -> dict[str, Any]:
    state = {
        "classes": list(CLASSES),
        "data": "digest",
        "recipe": config.recipe(),
        "model": {"weight": torch.arange(1000.0)},
        "history": [{"epoch": 1, "lr": 1e-4, "validation": None}],
        "best": 0.5,
    }
    return state | changes


@pytest.fixture
def config() -> Config:
    return load(BYCLASS, [])


def refusal(state: dict[str, Any], config: Config, classes: tuple[str, ...] = CLASSES, data: str = "digest"):
    with pytest.raises(UserError) as caught:
        check_fits(state, config, classes, data, Path("runs/x/last.pt"))
    return caught.value


def test_comes_back_as_it_was_saved(tmp_path: Path, config: Config) -> None:
    path = tmp_path / checkpoint.LAST
    state = state_of(config)
    checkpoint.save(path, state)
    loaded = checkpoint.load(path)
    assert torch.equal(loaded["model"].pop("weight"), state["model"].pop("weight"))
    assert loaded == state
    assert [entry.name for entry in tmp_path.iterdir()] == [checkpoint.LAST]


def test_a_missing_checkpoint_is_the_users_to_know_of(tmp_path: Path) -> None:
    def hint(run: Path) -> str:
        with pytest.raises(UserError, match="no checkpoint") as caught:
            checkpoint.load(run / "checkpoints" / checkpoint.BEST)
        return caught.value.hint

    assert "runs/RECIPE/DATE" in hint(tmp_path / "runs" / "mine")
    begun, finished = tmp_path / "runs" / "digits" / "begun", tmp_path / "runs" / "digits" / "finished"
    (finished / "checkpoints").mkdir(parents=True)
    (finished / "checkpoints" / checkpoint.BEST).touch()
    for guess in (tmp_path / "runs" / "mine", finished.parent):
        assert f"did you mean {finished}, the newest" in hint(guess)
    begun.mkdir()
    (begun / "config.yaml").touch()
    assert "resume=auto" in hint(begun)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.9999])
def test_a_cut_checkpoint_is_refused(tmp_path: Path, config: Config, share: float) -> None:
    path = tmp_path / checkpoint.LAST
    checkpoint.save(path, state_of(config))
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(UserError, match="cannot be read") as caught:
        checkpoint.load(path)
    assert str(path) in caught.value.found


def test_a_compressed_checkpoint_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / checkpoint.LAST
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10_000_000))
    with pytest.raises(UserError, match=r"cannot be read: 10,000,000 bytes in an archive of"):
        checkpoint.load(path)


def test_values_that_take_more_memory_than_the_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / checkpoint.LAST
    torch.save({"model": torch.zeros(1).expand(10**9)}, path)
    with pytest.raises(UserError, match="a tensor that is larger than its data"):
        checkpoint.load(path, needed=("model",))
    nested: list = []
    for _ in range(60):
        nested = [nested, nested]
    torch.save({"model": nested}, path)
    with pytest.raises(UserError, match="more than 20,000,000 values"):
        checkpoint.load(path, needed=("model",))


@pytest.mark.parametrize("kind", ["directory", "link", "pipe"])
def test_what_is_no_file_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / checkpoint.LAST
    {"directory": path.mkdir, "link": lambda: path.symlink_to(path), "pipe": lambda: os.mkfifo(path)}[kind]()
    assert checkpoint.has_checkpoint(tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        checkpoint.load_newest(tmp_path)


def test_a_checkpoint_runs_no_code(tmp_path: Path) -> None:
    path = tmp_path / checkpoint.LAST
    torch.save({"model": Trap(tmp_path / "trapped")}, path)
    with pytest.raises(UserError):
        checkpoint.load(path)
    assert not (tmp_path / "trapped").exists()


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return Path.touch, (self.path,)


def test_a_write_that_fails_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / checkpoint.LAST
    checkpoint.save(path, {"epoch": 1})
    with pytest.raises((TypeError, AttributeError)):
        checkpoint.save(path, {"epoch": 2, "weights": torch.zeros(10_000), "never": (number for number in ())})
    assert checkpoint.load(path, needed=("epoch",)) == {"epoch": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == [checkpoint.LAST]


def test_a_checkpoint_that_another_program_reads_is_renamed_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Windows, where an open file cannot be renamed."""
    replace, held = os.replace, set[str]()

    def replace_later(source: Path, target: Path) -> None:
        if source.name not in held:
            held.add(source.name)
            raise PermissionError(errno.EACCES, "Permission denied", str(source))
        replace(source, target)

    monkeypatch.setattr(shards.atomic, "_RENAME_SECONDS", 10.0)
    for epoch in (1, 2):
        checkpoint.save_last(tmp_path, {"epoch": epoch}, keep=True)
        monkeypatch.setattr(os, "replace", replace_later)
    epochs = [checkpoint.load(tmp_path / name, ())["epoch"] for name in (checkpoint.PREVIOUS, checkpoint.LAST)]
    assert epochs == [1, 2] and len(held) == 3


def test_what_fits_is_accepted_wherever_it_lies_and_runs(config: Config) -> None:
    elsewhere = load(BYCLASS, ["data.shards=x", "run.dir=y", "device=cpu", "resume=auto", "loader.backend=torch"])
    check_fits(state_of(config), elsewhere, CLASSES, "digest", Path("last.pt"))


def test_another_number_of_classes_is_refused(config: Config) -> None:
    error = refusal(state_of(config), config, classes=("a", "b"))
    assert "2 classes" in error.found and str(config.data.shards) in error.found
    assert "3 classes" in error.expected
    assert "run.dir" in error.hint


def test_other_classes_or_another_order_of_them_are_refused(config: Config) -> None:
    refusal(state_of(config), config, classes=("a", "c", "b"))


def test_another_pack_is_refused(config: Config) -> None:
    error = refusal(state_of(config), config, data="another digest")
    assert f"data.shards={config.data.shards}" in error.found
    assert "same pack" in error.expected
    allowing = "checkpoint.resume_allow_changes=[data.shards]"
    assert f"by '{allowing}', or" in error.hint
    check_fits(state_of(config), load(BYCLASS, [allowing]), CLASSES, "another digest", Path("last.pt"))
    both = "checkpoint.resume_allow_changes=[data.shards, optim.lr]"
    assert (
        both in refusal(state_of(config), load(BYCLASS, [allowing.replace("data.shards", "optim.lr")]), data="x").hint
    )


def test_another_recipe_is_refused_with_the_settings_that_differ(config: Config) -> None:
    now = load(BYCLASS, ["optim.lr=1e-5", "trainer.epochs=20"])
    error = refusal(state_of(config), now)
    assert "optim.lr=1e-05" in error.found and "trainer.epochs=20" in error.found
    assert "optim.lr=0.0003" in error.expected and "trainer.epochs=15" in error.expected
    assert "optim.weight_decay" not in str(error)


def test_what_cannot_be_allowed_is_said_to_be_fixed(config: Config) -> None:
    """Not even by `resume_allow_changes`; the first of the settings is named, and the others only reset."""
    allowing = "checkpoint.resume_allow_changes=[optim.name, model.name, optim.lr]"
    now = load(BYCLASS, ["optim.name=sgd", "model.name=three_block_cnn", "optim.lr=1e-5", allowing])
    error = refusal(state_of(config), now)
    assert "as model.name and optim.name cannot change" in error.hint and "resume_allow_changes" not in error.hint
    assert "optim.name=sgd" in error.found and "optim.lr" not in error.found


@pytest.mark.parametrize(
    "override",
    [
        "optim.lr=1e-5",
        "optim.max_grad_norm=null",
        "model.head_hidden=null",
        "trainer.channels_last=false",
        "model.pretrained=false",
        "model.drop_rate=0.125",
        "optim.name=adamw",
        "model.init_checkpoint=my weights.pth",
        "schedule.min_lr=1e-12",
    ],
)
@pytest.mark.parametrize("reverse", [False, True], ids=["changed now", "changed then"])
def test_the_overrides_of_the_hint_are_those_that_make_it_fit(override: str, reverse: bool) -> None:
    then, now = [override] if reverse else [], [] if reverse else [override]
    state = state_of(load(BYCLASS, then))
    hint = refusal(state, load(BYCLASS, now)).hint
    command = hint.removeprefix("add ").partition(" to the command")[0]
    check_fits(state, load(BYCLASS, [*now, *shlex.split(command)]), CLASSES, "digest", Path("last.pt"))


@pytest.mark.parametrize(
    ("classes", "found", "expected"),
    [
        (("a", "x", "c"), "3 classes (x)", "3 classes (b)"),
        (("a", "b"), "2 classes", "3 classes (c)"),
        (("b", "c", "a"), "3 classes (b, c, a)", "3 classes (a, b, c)"),
    ],
)
def test_other_classes_are_named(classes: tuple[str, ...], found: str, expected: str) -> None:
    config = load(RECIPES / "quickstart.yaml", ["data.shards=other"])
    with pytest.raises(UserError) as caught:
        check_fits({"classes": ["a", "b", "c"]}, config, classes, "", Path("last.pt"))
    assert caught.value.found == f"data.shards=other with {found}"
    assert caught.value.expected == f"the {expected}, as in the checkpoint last.pt"


@pytest.mark.parametrize(
    ("classes", "others", "expected"),
    [
        (range(20), range(3), " ".join(map(str, range(20)))),
        (["a", "\x1b[2J"], ["a"], "a \\x1b[2J"),
        (range(62), range(40), "0 1 2 ... 61, 62 classes (40, 41, 42, 43, 44, ...)"),
        (range(40), range(62), "0 1 2 ... 39, 40 classes"),
        ([*range(21), "x", "z"], [*range(21), "y", "z"], "0 1 2 ... z, 23 classes (x)"),
    ],
)
def test_of_many_classes_those_that_differ_are_listed(
    classes: Iterable[object], others: Iterable[object], expected: str
) -> None:
    assert list_classes(tuple(map(str, classes)), tuple(map(str, others))) == expected


@pytest.fixture
def weights_of_a_run(tmp_path: Path) -> Path:
    """Weights that were trained with the settings of `own_config` on the data `abc`."""
    path = tmp_path / "best.pt"
    torch.save({"model": {}, "classes": ["a"], "data": "abc", "recipe": own_config(tmp_path).recipe()}, path)
    return path


def own_config(directory: Path, **settings: Any) -> Config:
    data = {"shards": "set", "val_fraction": 0.1, **settings.pop("data", {})}
    path = directory / "best.pt"
    return Config.model_validate({"data": data, "model": {"init_checkpoint": str(path)}, **settings})


@pytest.mark.parametrize(
    ("settings", "differing"),
    [
        ({"data": {"fold": "1/5"}}, "data.fold=null"),
        ({"data": {"fold": "2/3"}, "seed": 8}, "data.fold=null seed="),
    ],
)
def test_initial_weights_of_the_images_of_a_fold_are_refused(
    weights_of_a_run: Path, tmp_path: Path, settings: dict[str, Any], differing: str
) -> None:
    with pytest.raises(UserError) as caught:
        compat.check_initial_weights(own_config(tmp_path, **settings), "abc", True)
    assert f"weights of a run on the same data with {differing}" in caught.value.found
    assert caught.value.hint == "model.init_checkpoint=null"
    compat.check_initial_weights(own_config(tmp_path, **settings), "abcd", True)
    weights_of_a_run.write_bytes(b"weights of another program")
    compat.check_initial_weights(own_config(tmp_path, **settings), "abc", True)


@pytest.mark.parametrize(
    ("settings", "differing"),
    [({}, None), ({"seed": 8}, "seed="), ({"data": {"val_fraction": 0.2}}, "data.val_fraction=0.1")],
)
@pytest.mark.parametrize("has_val_split", [False, True])
def test_initial_weights_of_the_validation_images_are_warned_of(
    weights_of_a_run: Path,
    tmp_path: Path,
    settings: dict[str, Any],
    differing: str | None,
    has_val_split: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    compat.check_initial_weights(own_config(tmp_path, **settings), "abc", has_val_split)
    if differing is None or has_val_split:
        assert not caplog.records
    else:
        assert f"too high: {differing}" in caplog.text
