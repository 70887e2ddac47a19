"""Checkpoints: written to a temporary name, synced and renamed; loaded without running code."""

from __future__ import annotations

import logging
import os
import shlex
import zipfile
from pathlib import Path
from typing import Any

import torch

from shards.atomic import replace_file, sync_directory
from shards.errors import UserError, first_line
from trainer.config.schema import SHARDS_SETTING, Config

log = logging.getLogger(__name__)

LAST = "last.pt"
PREVIOUS = "previous.pt"
BEST = "best.pt"
# What the weights and the optimiser's state take their form from.
_FIXED = ("model.name", "model.head_hidden", "optim.name")


def save(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain values; whoever reads `path` sees the old checkpoint or the whole new one.

    Raises `OSError` if the disk does not take it.
    """
    try:
        with replace_file(path) as file:
            torch.save(state, file)
    except RuntimeError as error:
        # torch's writer meets its own unfinished archive while it passes on that the disk is full.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def save_last(directory: Path, state: dict[str, Any], keep: bool) -> None:
    """Write `last.pt` into a directory. keep: the one that is there becomes `previous.pt`, else it is overwritten."""
    last, next_last = directory / LAST, directory / f".next-{LAST}"
    save(next_last, state)
    if keep and last.exists():
        os.replace(last, directory / PREVIOUS)
    os.replace(next_last, last)
    sync_directory(directory)


def has_checkpoint(directory: Path) -> bool:
    """Whether a directory holds a checkpoint to go on from; killed between two renames, it may be `previous.pt`."""
    return (directory / LAST).exists() or (directory / PREVIOUS).exists()


def load_newest(directory: Path) -> tuple[dict[str, Any], Path]:
    """The newest whole checkpoint to go on from, and its path; one that is damaged is passed over with a warning.

    Raises `UserError` if there is none.
    """
    paths = [path for path in (directory / LAST, directory / PREVIOUS) if path.exists()]
    for path in paths[:-1]:
        try:
            return load(path), path
        except UserError as error:
            log.warning("%s; going on from %s, the one before it", error.found, paths[-1])
    path = paths[-1] if paths else directory / LAST
    return load(path), path


def load(path: Path, needed: tuple[str, ...] = ("model", "classes", "data", "recipe")) -> dict[str, Any]:
    """Read a checkpoint into the CPU's memory; raises `UserError` if it is missing, damaged or none of ours.

    needed: what it must hold.
    """
    try:
        # torch reads tensors without comparing them with the checksums that it wrote.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"{damaged} in it is not what was written")
        state = torch.load(path, map_location="cpu", weights_only=True)
        missing = [name for name in needed if name not in state]
        if missing:
            raise ValueError(f"it holds no {missing[0]}")
        return state
    except FileNotFoundError:
        raise UserError(
            found=f"no checkpoint {path}",
            expected="the directory of a run that has finished an epoch",
            hint=_where_runs_are(path),
        ) from None
    except Exception as error:  # zip, pickle and tensor readers each raise their own
        raise UserError(
            found=f"{path}, which cannot be read: {first_line(error)}",
            expected="a checkpoint written by this program",
            hint="take another checkpoint of the run, or train anew in another run.dir",
        ) from None


def check_fits(state: dict[str, Any], config: Config, classes: tuple[str, ...], data_digest: str, path: Path) -> None:
    """Refuse to resume what does not match: classes, data or recipe. Raises `UserError` naming what to change.

    What `checkpoint.resume_allow_changes` names may differ, if weights and optimiser keep their form.
    """
    if tuple(state["classes"]) != classes:
        raise UserError(
            found=f"{len(classes)} classes in data.shards={config.data.shards}",
            expected=f"the {len(state['classes'])} classes that {path} was trained on",
            hint="name the packed set of that run, or begin anew with another run.dir",
        )
    allowed = set(config.checkpoint.resume_allow_changes)
    if state["data"] != data_digest and SHARDS_SETTING not in allowed:
        raise UserError(
            found=f"data.shards={config.data.shards}, packed otherwise than the data of {path}",
            expected="the same pack (manifest digests are compared)",
            hint=f"name that pack, go on with this one by {_allowing(allowed | {SHARDS_SETTING})}, or begin anew with "
            "another run.dir",
        )
    recipe = config.recipe()
    differing = [name for name in changed_settings(state, config) if name not in allowed or name in _FIXED]
    if differing:
        was = " ".join(_override(name, state["recipe"].get(name)) for name in differing)
        now = " ".join(_override(name, recipe[name]) for name in differing)
        fixed = [name for name in differing if name in _FIXED]
        go_on = f"go on with the change by {_allowing(allowed.union(differing))}"
        raise UserError(
            found=f"{now}, resuming {path}",
            expected=f"the settings it was begun with: {was}",
            hint=f"add {was} to the command, {f'as {fixed[0]} cannot change' if fixed else go_on}, or begin anew with "
            "another run.dir",
        )


def changed_settings(state: dict[str, Any], config: Config) -> list[str]:
    """Names of the settings that decide the weights and are not what the checkpoint was made with."""
    recipe = config.recipe()
    return [name for name in recipe if recipe[name] != state["recipe"].get(name)]


def _allowing(names: set[str]) -> str:
    return shlex.quote(f"checkpoint.resume_allow_changes=[{', '.join(sorted(names))}]")


def _override(name: str, value: Any) -> str:
    """A setting as the command line takes it."""
    return shlex.quote(f"{name}={'null' if value is None else value}")


def _where_runs_are(missing: Path) -> str:
    """What to do about a checkpoint RUN/checkpoints/NAME that is not there."""
    run = missing.parent.parent
    if (run / "config.yaml").exists():
        return "let the run go on: the same command with resume=auto"
    directory = run if run.is_dir() else run.parent
    places = [place for depth in ("", "*/", "*/*/") for place in directory.glob(f"{depth}{missing.parent.name}/{BEST}")]
    if places:
        newest = max(places, key=lambda place: place.stat().st_mtime).parent.parent
        return f"did you mean {newest}, the newest run below {directory}?"
    return "training prints the directory of its run, runs/RECIPE/DATE unless run.dir names another"
