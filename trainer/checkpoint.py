"""Checkpoints: written to a temporary name, synced and renamed; loaded without running code."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import torch

from shards.atomic import replace_file
from shards.errors import UserError, first_line
from trainer.settings import Config

LAST = "last.pt"
BEST = "best.pt"


def save(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain values; whoever reads `path` sees the old checkpoint or the whole new one."""
    with replace_file(path) as file:
        torch.save(state, file)


def load(path: Path, needed: tuple[str, ...] = ("model", "classes", "data", "recipe")) -> dict[str, Any]:
    """Read a checkpoint into the CPU's memory; raises `UserError` if it is missing, damaged or none of ours.

    needed: what it must hold.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        missing = [name for name in needed if name not in state]
        if missing:
            raise ValueError(f"it holds no {missing[0]}")
        return state
    except FileNotFoundError:
        raise UserError(
            found=f"no checkpoint {path}",
            expected="a run that has finished an epoch",
            hint="let the run go on: the same command with resume=auto",
        ) from None
    except Exception as error:  # zip, pickle and tensor readers each raise their own
        raise UserError(
            found=f"{path}, which cannot be read: {first_line(error)}",
            expected="a checkpoint written by this program",
            hint="take another checkpoint of the run, or train anew in another run.dir",
        ) from None


def check_fits(state: dict[str, Any], config: Config, classes: tuple[str, ...], data_digest: str, path: Path) -> None:
    """Refuse to resume what does not match: classes, data or recipe. Raises `UserError` naming what to change."""
    if tuple(state["classes"]) != classes:
        raise UserError(
            found=f"{len(classes)} classes in data.shards={config.data.shards}",
            expected=f"the {len(state['classes'])} classes that {path} was trained on",
            hint="name the packed set of that run, or begin anew with another run.dir",
        )
    if state["data"] != data_digest:
        raise UserError(
            found=f"data.shards={config.data.shards}, packed otherwise than the data of {path}",
            expected="the same pack (manifest digests are compared)",
            hint="name that pack, or begin anew with another run.dir",
        )
    recipe = config.recipe()
    differing = [name for name in recipe if recipe[name] != state["recipe"].get(name)]
    if differing:
        was = " ".join(_override(name, state["recipe"].get(name)) for name in differing)
        now = " ".join(_override(name, recipe[name]) for name in differing)
        raise UserError(
            found=f"{now}, resuming {path}",
            expected=f"the settings it was begun with: {was}",
            hint=f"add {was} to the command, or begin anew with another run.dir",
        )


def _override(name: str, value: Any) -> str:
    """A setting as the command line takes it."""
    return shlex.quote(f"{name}={'null' if value is None else value}")
