"""The files below a directory or inside an archive: their names and their bytes.

An archive is never unpacked into named files, so its names cannot write anywhere. Names that point outside are refused.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path

from pipeline.readers.archives.files import CorruptFileError
from pipeline.readers.naming import natural_order
from shards.errors import UserError, as_user_error, printable
from shards.manifest import RawFile
from shards.stores.image_header import MAX_BYTES

_CLUTTER = {"__macosx", "thumbs.db", "desktop.ini"}  # written by operating systems
_MAX_DEPTH = 100  # nested directories


class FileTree(ABC):
    """The files of a directory or archive.

    Attributes:
        path: The directory or archive.
        names: All files in it except hidden ones, `a/b.png`, in natural order.
        directories: The directories below it except hidden ones; empty for an archive.
    """

    def __init__(self, path: Path, names: list[str], is_archive: bool = False) -> None:
        self.path = path
        self.names = names
        self.directories: list[str] = []
        self._is_archive = is_archive

    @abstractmethod
    def read(self, name: str, max_bytes: int = MAX_BYTES) -> bytes:
        """Return the bytes of a file of `names`. Any thread and process may call it.

        Raises:
            CorruptFileError: If the file is damaged, or larger than `max_bytes`.
        """

    def path_of(self, name: str) -> str:
        """Return the path of a file, for messages."""
        return printable(f"{self.path}{':' if self._is_archive else '/'}{name}")

    @cached_property
    def records(self) -> tuple[RawFile, ...]:
        """The archive with its hash; empty for a directory, whose files are hashed one by one."""
        return (RawFile.of(self.path.parent, self.path.name),) if self._is_archive else ()


class DirectoryTree(FileTree):
    """A directory. Symbolic links in it are followed.

    Args:
        path: The directory.
        out: The output. If it is inside, it is not read, and directories that contain it are not listed.
    """

    def __init__(self, path: Path, out: Path | None = None) -> None:
        directories: list[str] = []
        top, skipped = (Path(os.path.realpath(each)).as_posix() for each in (path, out or path))
        inner_out = skipped.removeprefix(f"{top}/")
        super().__init__(path, natural_order(_walk(path, "", frozenset(), directories, inner_out)))
        self.directories = [name for name in directories if not f"{inner_out}/".startswith(f"{name}/")]

    def read(self, name: str, max_bytes: int = MAX_BYTES) -> bytes:
        return read_file(self.path / name, max_bytes)


def read_file(path: Path, max_bytes: int) -> bytes:
    """Return the bytes of a file; raises `CorruptFileError` if it is larger than a limit or cannot be read."""
    try:
        with open(path, "rb") as file:
            check_size(os.fstat(file.fileno()).st_size, max_bytes)
            return file.read(max_bytes)
    except OSError as error:
        raise CorruptFileError(error.strerror or type(error).__name__) from None


def check_size(size: int, max_bytes: int) -> None:
    """Raise `CorruptFileError` if a file is larger than a limit."""
    if size > max_bytes:
        raise CorruptFileError(f"of {size:,} bytes, where at most {max_bytes:,} are expected")


def is_hidden(name: str) -> bool:
    """Return whether a file, or a directory above it, is hidden or written by an operating system."""
    return any(component.startswith(".") or component.lower() in _CLUTTER for component in name.split("/"))


def inner_name(name: str) -> str | None:
    """Return a name inside a directory or archive as `a/b`; None if it points outside."""
    components = [component for component in name.replace("\\", "/").split("/") if component != "."]
    is_absolute = not components or not components[0] or components[0][1:2] == ":"  # C: is a drive
    if is_absolute or ".." in components or "\0" in name:
        return None
    return "/".join(component for component in components if component)


def _is_directory(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a symbolic link to itself
        return False


def _walk(
    directory: Path, prefix: str, above: frozenset[tuple[int, int]], directories: list[str], skipped: str
) -> list[str]:
    """The files below a directory, with a prefix. above: device and inode of the directories around it.

    Appends the directories below it to `directories`, except for one that is skipped.
    """
    names = []
    try:
        status = directory.stat()
        identity = (status.st_dev, status.st_ino)
        if identity in above or len(above) > _MAX_DEPTH:
            raise UserError(
                found=f"{directory}, a link to a directory above it, or more than {_MAX_DEPTH} nested directories",
                expected="one directory per class",
                hint="if it is a symbolic link, remove it",
            )
        with os.scandir(directory) as entries:
            for entry in entries:
                if is_hidden(entry.name) or prefix + entry.name == skipped:
                    continue
                if _is_directory(entry):
                    directories.append(prefix + entry.name)
                    names += _walk(Path(entry.path), f"{prefix}{entry.name}/", above | {identity}, directories, skipped)
                # A broken link is listed, so that reading reports it. Devices and pipes are not.
                elif not os.path.exists(entry.path) or entry.is_file():
                    names.append(prefix + entry.name)
    except OSError as error:
        raise as_user_error(error, directory) from None
    return names
