"""Write and read checkpoint files: atomic replacement, checksums, and no code execution while loading."""

from __future__ import annotations

import logging
import math
import os
import zipfile
from pathlib import Path
from typing import Any

import torch

from shards.atomic import check_zip, rename, replace_file, sync_directory
from shards.errors import NotFoundError, UserError, errors_as_corrupt, quote

log = logging.getLogger(__name__)

LAST = "last.pt"
PREVIOUS = "previous.pt"
BEST = "best.pt"
HINT = "use another checkpoint of the run, or train from scratch in another run.dir"
_MAX_NODES = 20_000_000  # values of a checkpoint, and characters of its texts


def save(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain values atomically: a reader sees the old checkpoint or the complete new one.

    Raises:
        OSError: The file cannot be written.
    """
    try:
        with replace_file(path) as file:
            torch.save(state, file)
    except RuntimeError as error:
        # On a full disk torch's zip writer fails again while it closes the archive, which hides the OSError.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def save_last(directory: Path, state: dict[str, Any], keep: bool) -> None:
    """Write `last.pt`.

    Args:
        directory: Directory of the checkpoints.
        state: Contents.
        keep: Whether an existing `last.pt` becomes `previous.pt`; it is replaced otherwise.
    """
    last, next_last = directory / LAST, directory / f".next-{LAST}"
    save(next_last, state)
    if keep and last.exists():
        rename(last, directory / PREVIOUS)
    rename(next_last, last)
    sync_directory(directory)


def has_checkpoint(directory: Path) -> bool:
    """Whether a directory holds a checkpoint to resume. After a kill between two renames it is `previous.pt`."""
    return os.path.lexists(directory / LAST) or os.path.lexists(directory / PREVIOUS)


def load_newest(directory: Path) -> tuple[dict[str, Any], Path]:
    """Load the newest intact checkpoint, and warn of a damaged one.

    Returns:
        The checkpoint and its path.

    Raises:
        UserError: There is no intact checkpoint.
    """
    last, previous = directory / LAST, directory / PREVIOUS
    if os.path.lexists(last) and previous.exists():
        try:
            return load(last), last
        except UserError as error:
            log.warning("%s; resuming from the previous checkpoint %s", error.found, previous)
    path = previous if os.path.lexists(previous) else last
    return load(path), path


def load(path: Path, needed: tuple[str, ...] = ("model", "classes", "data", "recipe")) -> dict[str, Any]:
    """Load a checkpoint into CPU memory.

    Args:
        path: The file.
        needed: Keys that it must have.

    Raises:
        UserError: The file is missing or damaged, or lacks a key.
    """
    if not os.path.lexists(path):
        raise NotFoundError(
            found=f"no checkpoint {path}",
            expected="the directory of a run that has completed an epoch",
            hint=_find_run(path),
        )
    with errors_as_corrupt(path, HINT):
        check_zip(path)
        # torch.load does not compare the checksums of tensors.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"wrong checksum of {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if _count_nodes(state, {}) > _MAX_NODES:
            raise ValueError(f"more than {_MAX_NODES:,} values")
        for name in needed:
            state[name]
    return state


def _count_nodes(value: Any, known: dict[int, float]) -> float:
    """Count values and characters, infinitely many in a value that contains itself; check that tensors have memory."""
    if isinstance(value, torch.Tensor) and value.nbytes > value.untyped_storage().nbytes():
        raise ValueError("a tensor that is larger than its data")
    if not isinstance(value, dict | list | tuple | set):
        return 1 + len(value) if isinstance(value, str | bytes | bytearray) else 1
    if id(value) not in known:
        known[id(value)] = math.inf
        inner = [*value, *value.values()] if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_count_nodes(each, known) for each in inner)
    return known[id(value)]


def _find_run(missing: Path) -> str:
    """Return a hint about a checkpoint RUN/checkpoints/NAME that does not exist."""
    run = missing.parent.parent
    if (run / "config.yaml").exists():
        return "run the same command with resume=auto to complete an epoch"
    root = run if run.is_dir() else run.parent
    paths = [path for depth in ("", "*/", "*/*/") for path in root.glob(f"{depth}{missing.parent.name}/{BEST}")]
    if paths:
        newest = max(paths, key=lambda path: path.lstat().st_mtime).parent.parent
        return f"did you mean {quote(newest)}, the newest run below {quote(root)}?"
    return "training prints the directory of its run: runs/RECIPE/DATE, or run.dir"
