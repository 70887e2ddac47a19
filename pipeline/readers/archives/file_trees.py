"""The files below a directory or inside an archive: their names and their bytes.

An archive is never unpacked into files, so no name in it can lead anywhere; names that try are refused all the same.
"""

from __future__ import annotations

import os
from pathlib import Path

from pipeline.readers.archives.files import CorruptFileError
from pipeline.readers.naming import natural_order, printable
from shards.errors import UserError, as_user_error
from shards.manifest import RawFile
from shards.stores.image_header import MAX_BYTES

_CLUTTER = {"__macosx", "thumbs.db", "desktop.ini"}  # what operating systems leave behind
_MAX_DEPTH = 100  # directories in each other


class FileTree:
    """The files of a directory or archive.

    Attributes:
        place: The directory or archive.
        names: All files in it but hidden ones, `a/b.png`, in natural order.
    """

    _separator = "/"

    def __init__(self, place: Path, names: list[str]) -> None:
        self.place = place
        self.names = names

    def read(self, name: str, max_bytes: int = MAX_BYTES) -> bytes:
        """The bytes of a file out of `names`; any thread and process may call it.

        Raises:
            CorruptFileError: The file is damaged, or larger than `max_bytes`.
        """
        raise NotImplementedError

    def place_of(self, name: str) -> str:
        """The path of a file, for messages."""
        return printable(f"{self.place}{self._separator}{name}")

    def records(self) -> tuple[RawFile, ...]:
        """The archive with its hash; empty for a directory, whose files are hashed one by one."""
        return ()


class DirectoryTree(FileTree):
    """A directory. Symbolic links in it are followed."""

    def __init__(self, place: Path) -> None:
        super().__init__(place, natural_order(_walk(place, "", frozenset())))

    def read(self, name: str, max_bytes: int = MAX_BYTES) -> bytes:
        try:
            with open(self.place / name, "rb") as file:
                check_size(os.fstat(file.fileno()).st_size, max_bytes)
                return file.read(max_bytes)
        except OSError as error:
            raise CorruptFileError(error.strerror or type(error).__name__) from None


def check_size(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise CorruptFileError(f"of {size:,} bytes, where at most {max_bytes:,} are expected")


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
        if here in above or len(above) > _MAX_DEPTH:
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
                # A link that leads nowhere counts, so that reading reports it; a device or pipe does not.
                elif entry.is_file() or not os.path.exists(entry.path):
                    names.append(prefix + entry.name)
    except OSError as error:
        raise as_user_error(error, directory) from None
    return names
