"""Compatibility of a checkpoint with the data and settings of the run that resumes it."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from shards.cli import plural
from shards.errors import UserError, printable, quote
from trainer.checkpoint import io as checkpoint
from trainer.config.schema import SHARDS_SETTING, Config

log = logging.getLogger(__name__)

# The weights or the optimizer's state have another form with another value.
_FIXED = {
    *(f"model.{name}" for name in ("name", "head_hidden", "freeze", "filters", "kernel", "dense", "gray_input")),
    *("model.channel_multiplier", "model.depth_multiplier", "optim.name"),
}
_GROUPING = {"optim.head_lr", "optim.layer_decay"}  # whether they are set divides the parameters into groups
_MAX_NAMES = 20  # of classes in a message
_MAX_NUMBER = 10**15  # of a number


def check_fits(state: dict[str, Any], config: Config, classes: tuple[str, ...], data_identity: str, path: Path) -> None:
    """Check that a checkpoint can be resumed.

    Args:
        state: Contents of the checkpoint.
        config: Settings to resume with; those in `checkpoint.resume_allow_changes` may differ.
        classes: Class names of the data.
        data_identity: Concatenated `Manifest.identity()` of the splits.
        path: The checkpoint, for messages.

    Raises:
        UserError: Classes, data or settings differ.
    """
    if tuple(state["classes"]) != classes:
        raise UserError(
            found=f"data.shards={config.data.shards} with {_differing(classes, tuple(state['classes']))}",
            expected=f"the {_differing(tuple(state['classes']), classes)}, as in the checkpoint {path}",
            hint="name the data set of that run, or start a new run with another run.dir",
        )
    allowed = set(config.checkpoint.resume_allow_changes)
    if state["data"] != data_identity and SHARDS_SETTING not in allowed:
        raise UserError(
            found=f"data.shards={config.data.shards}, packed otherwise than the data of {path}",
            expected="the same packed data set (identities of the splits are compared)",
            hint=f"name that data set, resume with this one by {_allow(allowed | {SHARDS_SETTING})}, or start a new "
            "run with another run.dir",
        )
    recipe, saved = config.recipe(), _saved_recipe(state)
    fixed = _FIXED | {name for name in _GROUPING if None in (recipe[name], saved[name])}
    if differing := [name for name in changed_settings(state, config) if name not in allowed or name in fixed]:
        other = f"resume by {_allow(allowed.union(differing))}"
        raise _settings_error(differing, fixed.intersection(differing), state, config, path, other)


def check_initial_weights(config: Config, data_identity: str, has_val_split: bool) -> None:
    """Check that the weights of `model.init_checkpoint` were not trained on images that this run holds out.

    Only a checkpoint of a run on the same data states which images that were.

    Args:
        config: Settings of a new run.
        data_identity: Concatenated `Manifest.identity()` of the splits.
        has_val_split: Whether the data set has a val split.

    Raises:
        UserError: The part of `data.fold` was trained on.
    """
    path = config.model.init_checkpoint
    state: dict[str, Any] = {}
    if path is not None:
        with contextlib.suppress(UserError):  # weights that no run has written
            state = checkpoint.load(path, needed=("data", "recipe"))
    if not state or state["data"] != data_identity:
        return
    own, saved = config.recipe(), _saved_recipe(state)
    of_fold = [name for name in ("data.fold", "seed") if own[name] != saved[name]]
    differing = [name for name in ("data.fold", "data.val_fraction", "seed") if own[name] != saved[name]]
    if config.data.fold and of_fold:
        raise UserError(
            found=f"{_override('data.fold', config.data.fold)} and weights of a run on the same data with "
            + " ".join(_override(name, saved[name]) for name in of_fold)
            + f": {path}",
            expected="weights that were not trained on the images of the fold",
            hint="model.init_checkpoint=null",
        )
    if differing and config.data.val_fraction and not has_val_split:
        log.warning(
            "model.init_checkpoint=%s was trained on validation images of this run, whose metrics are too high: %s "
            "holds out the same images",
            path,
            " ".join(_override(name, saved[name]) for name in differing),
        )


def explain_structure(state: dict[str, Any], config: Config, path: Path) -> None:
    """Raise `UserError` if changed settings may be why a checkpoint has another structure than the training."""
    names = [name for name in changed_settings(state, config) if name.startswith(("model.", "optim.", "data.res"))]
    if names:
        raise _settings_error(names, names, state, config, path)


def _settings_error(
    names: list[str], fixed: Collection[str], state: dict[str, Any], config: Config, path: Path, other: str = ""
) -> UserError:
    """Return the error for settings that differ, some of which are fixed."""
    recipe, saved = config.recipe(), _saved_recipe(state)
    before = " ".join(_override(name, saved[name]) for name in names)
    if fixed:
        other = f"as {' and '.join(sorted(fixed))} cannot change"
    return UserError(
        found=f"{' '.join(_override(name, recipe[name]) for name in names)}, resuming {path}",
        expected=f"the settings of the checkpoint: {before}",
        hint=f"add {before} to the command, {other}, or start a new run with another run.dir",
    )


def list_classes(classes: Sequence[str], others: Sequence[str]) -> str:
    """List classes for a message that compares them with others; of more than 20, those at the ends and that differ."""
    names = list(map(printable, classes))
    if len(names) <= _MAX_NAMES:
        return " ".join(names)
    return f"{' '.join(names[:3])} ... {names[-1]}, {_differing(classes, others)}"


def _differing(classes: Sequence[str], others: Sequence[str]) -> str:
    """Count classes, and name the first that another list does not have at the same place."""
    names = [printable(name) for number, name in enumerate(classes) if [name] != list(others[number : number + 1])]
    listed = f" ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})" if names else ""
    return f"{plural(len(classes), 'class', 'es')}{listed}"


def check_structure(saved: Any, new: Any, name: str) -> None:
    """Raise `ValueError` if saved values have another structure than new ones: keys, types, lengths and shapes.

    None, truth values, texts and empty lists of `new` fit everything.

    Args:
        saved: Part of a checkpoint.
        new: The same part of the checkpoint of a new training.
        name: Its dotted name, for the message.
    """
    if isinstance(new, torch.Tensor):
        fits = isinstance(saved, torch.Tensor) and saved.shape == new.shape
    elif isinstance(new, dict):
        fits = isinstance(saved, dict)
        for key, value in new.items() if fits else ():
            if key in saved:
                check_structure(saved[key], value, f"{name}.{key}")
            elif value is not None and not isinstance(value, bool):
                raise ValueError(f"no key {name}.{key}")
    elif isinstance(new, list | tuple) and new:
        fits = isinstance(saved, list | tuple) and len(saved) == len(new)
        for position, pair in enumerate(zip(saved, new, strict=True) if fits else ()):
            check_structure(*pair, f"{name}.{position}")
    elif isinstance(new, int | float) and not isinstance(new, bool):
        kind = int if isinstance(new, int) else (int, float)
        fits = isinstance(saved, kind) and not isinstance(saved, bool)
        fits = fits and (abs(saved) <= _MAX_NUMBER or (math.isinf(new) and math.isinf(saved)))
    else:
        fits = True
    if not fits:
        raise ValueError(f"{name} is {type(saved).__name__} {getattr(saved, 'shape', '')}".rstrip())


def changed_settings(state: dict[str, Any], config: Config) -> list[str]:
    """Return the names of settings that affect the weights and differ from those of a checkpoint."""
    recipe, saved = config.recipe(), _saved_recipe(state)
    return [name for name in recipe if recipe[name] != saved[name]]


def _saved_recipe(state: dict[str, Any]) -> dict[str, Any]:
    """Return the recipe of a checkpoint, with the defaults of settings that were added after it was written."""
    return default_recipe() | state["recipe"]


def default_recipe() -> dict[str, Any]:
    """Return the default of every setting that affects the weights."""
    return Config.model_validate({"data": {"shards": ""}}).recipe()


def _allow(names: set[str]) -> str:
    return quote(f"checkpoint.resume_allow_changes=[{', '.join(sorted(names))}]")


def _override(name: str, value: Any) -> str:
    """Return a setting as a command-line argument."""
    return quote(f"{name}={'null' if value is None else value}")
