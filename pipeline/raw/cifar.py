"""The binary form of CIFAR-10 and CIFAR-100: https://www.cs.toronto.edu/~kriz/cifar.html, section "Binary version".

A file is records of one length: label bytes, then 3,072 bytes of a 32x32 picture, its red, green and blue plane.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.datasets import Request
from pipeline.raw.download import Download, fetch
from pipeline.readers.raw_dir import RawContent, RawDirectory
from shards.errors import UserError

_SIDE = 32
_PIXELS = 3 * _SIDE * _SIDE


def plan_archive(request: Request, archive: Download, unpacked: str, names: Sequence[str]) -> str:
    """A line that says what `have_archive` would do."""
    if RawDirectory(request.raw, unpacked=unpacked).has_loose(list(names)):
        return f"read the files in {request.raw}"
    if archive.path(request.raw).exists():
        return f"read {archive.path(request.raw)}"
    return f"download {archive.url} ({archive.bytes / 1e6:,.0f} MB) to {request.raw}"


def have_archive(request: Request, archive: Download, unpacked: str, names: Sequence[str]) -> RawDirectory:
    """The directory with all of the files in it, loose or in the archive, which is downloaded if need be.

    unpacked: the directory to which the archive unpacks. Raises `UserError` if files are missing.
    """
    files = RawDirectory(request.raw, archive.name, unpacked)
    if not files.has_loose(list(names)) and not archive.path(request.raw).exists():
        fetch(archive, request.raw, or_else=f"its content ({unpacked}/)")
    if missing := files.missing(list(names)):
        raise UserError(
            found=f"no {', '.join(missing)} in {archive.path(request.raw)}",
            expected=f"the official {archive.name}",
            hint=f"remove it and run again, so that it is downloaded anew: rm {archive.path(request.raw)}",
        )
    return files


def read_names(raw: RawContent, count: int) -> tuple[str, ...]:
    """The class names in a text file, one a line; raises `UserError` if they are not so many."""
    names = tuple(raw.content.decode("ascii", errors="replace").split())
    if len(names) != count or not all(name.isprintable() and name.isascii() for name in names):
        raise _bad(raw, f"with {len(names)} names of classes", f"{count} names, one a line")
    return names


def read_records(raw: RawContent, classes: Sequence[int]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Pictures uint8 [N, 32, 32, 3] and labels int64 [N, len(classes)], the k-th below classes[k]; or `UserError`."""
    length = len(classes) + _PIXELS
    if not raw.content or len(raw.content) % length:
        raise _bad(raw, f"of {len(raw.content):,} bytes", f"a whole number of records of {length:,} bytes")
    records = np.frombuffer(raw.content, np.uint8).reshape(-1, length)
    labels = records[:, : len(classes)].astype(np.int64)
    if wrong := np.argwhere(labels >= np.array(classes)).tolist():
        row, column = wrong[0]
        raise _bad(raw, f"with label {labels[row, column]} in record {row}", f"labels 0 .. {classes[column] - 1}")
    planes = records[:, len(classes) :].reshape(-1, 3, _SIDE, _SIDE)
    return np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), labels


def _bad(raw: RawContent, found: str, expected: str) -> UserError:
    return UserError(
        found=f"{raw.place} {found}",
        expected=f"{expected}, as published",
        hint="get it again: remove it or the archive it is in, and the archive is downloaded",
    )
