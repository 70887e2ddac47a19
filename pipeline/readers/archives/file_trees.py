"""Files below a directory or inside a zip or tar archive, alike: their names, and their bytes at random.

An archive is never unpacked into files, so no name in it can lead anywhere; those that try are refused all the same.
"""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from typing import Protocol

from pipeline.readers.archives.files import BadFile, record_file
from pipeline.readers.naming import natural_order, printable
from shards.errors import UserError, no_permission
from shards.manifest import RawFile
from shards.stores.image_header import MAX_BYTES

_CLUTTER = {"__macosx", "thumbs.db", "desktop.ini"}  # what operating systems leave behind
_MOST_DEPTH = 100  # directories in each other


class FileTree(Protocol):
    """place: the directory or archive. names: of all files in it but hidden ones, `a/b.png`, in natural order."""

    place: Path
    names: list[str]

    def read(self, name: str, most: int = MAX_BYTES) -> bytes:
        """The bytes of a file out of `names`, at most so many. Raises `BadFile`. For any thread and process."""
        ...

    def place_of(self, name: str) -> str:
        """Where a file lies, for messages."""
        ...

    def records(self) -> tuple[RawFile, ...]:
        """The archive with its hash; nothing for a directory, whose files are hashed one by one."""
        ...


class DirectoryTree:
    """A directory. Symbolic links in it are followed, as whoever made them meant."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.names = natural_order(_walk(place, "", frozenset()))

    def read(self, name: str, most: int = MAX_BYTES) -> bytes:
        try:
            with open(self.place / name, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size > most:
                    raise BadFile(f"of {size:,} bytes, where at most {most:,} are expected")
                return file.read(most)
        except OSError as error:
            raise BadFile(error.strerror or type(error).__name__) from None

    def place_of(self, name: str) -> str:
        return printable(str(self.place / name))

    def records(self) -> tuple[RawFile, ...]:
        return ()


class Archive:
    """What zip and tar have in common: a file that holds others, at known places."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def place_of(self, name: str) -> str:
        return printable(f"{self.place}:{name}")

    def records(self) -> tuple[RawFile, ...]:
        return self._records

    @cached_property
    def _records(self) -> tuple[RawFile, ...]:
        return (record_file(self.place),)


def is_hidden(name: str) -> bool:
    """Whether a file is one that systems and tools keep for themselves."""
    return any(part.startswith(".") or part.lower() in _CLUTTER for part in name.split("/"))


def inner_name(name: str) -> str | None:
    """A name inside a directory or archive as `a/b`; None for one that leads out of it."""
    parts = [part for part in name.replace("\\", "/").split("/") if part != "."]
    absolute = not parts or not parts[0] or parts[0][1:2] == ":"  # or nothing at all; C: is a drive
    return None if absolute or ".." in parts or "\0" in name else "/".join(part for part in parts if part)


def _walk(directory: Path, prefix: str, above: frozenset[tuple[int, int]]) -> list[str]:
    """Names of the files in a directory, after the prefix. above: device and inode of the directories around it."""
    names = []
    try:
        status = directory.stat()
        here = (status.st_dev, status.st_ino)
        if here in above or len(above) > _MOST_DEPTH:
            raise UserError(
                found=f"{directory}, which leads back to a directory above it, or into endless depth",
                expected="a directory for each class",
                hint="is it a symbolic link? Remove it",
            )
        with os.scandir(directory) as entries:
            for entry in entries:
                if is_hidden(entry.name):
                    continue
                if entry.is_dir():
                    names += _walk(Path(entry.path), f"{prefix}{entry.name}/", above | {here})
                # A link that leads nowhere counts, so that reading tells of it; a device or pipe does not.
                elif entry.is_file() or not os.path.exists(entry.path):
                    names.append(prefix + entry.name)
    except OSError as error:
        raise no_permission(error, directory) from None
    return names
