"""Raw files of published data sets: loose in a directory, compressed or not, or inside an archive in it."""

from __future__ import annotations

import hashlib
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from pipeline.readers.archives.file_trees import FileTree
from pipeline.readers.archives.files import corrupt_as_user_error
from pipeline.readers.archives.zip_tar import open_tree
from pipeline.readers.download import Download, fetch
from shards.errors import UserError, as_user_error
from shards.manifest import RawFile

MAX_RAW_BYTES = 2 << 30  # of one file; the largest known file has 0.6 GB


@dataclass(frozen=True)
class RawContent:
    """The bytes of a raw file as stored on disk or in an archive.

    Attributes:
        name: The name of the file.
        path: Its path, for messages.
        content: Its bytes.
    """

    name: str
    path: str
    content: bytes

    def record(self) -> RawFile:
        """Return the name, size and SHA-256 of the file."""
        digest = hashlib.sha256(self.content).hexdigest()
        return RawFile(name=self.name, bytes=len(self.content), sha256=digest)


class RawDirectory:
    """A directory of raw files, which may be inside an archive in it.

    Args:
        directory: The directory.
        archive: The name of the archive.
        unpacked: The directory to which the archive unpacks; loose files in it count too.
    """

    def __init__(self, directory: Path, archive: str = "", unpacked: str = "") -> None:
        self._archive = directory / archive if archive else None
        self._folders = dict.fromkeys((directory, directory / unpacked))
        self._opened: FileTree | None = None

    def missing(self, names: tuple[str, ...]) -> list[str]:
        """Return the names that are neither loose nor in the archive."""
        return [name for name in names if self._loose(name) is None and self._member(name) is None]

    def read(self, name: str) -> RawContent:
        """Read a file that is not missing; a loose file takes precedence over the archive.

        Raises:
            UserError: If it cannot be read.
        """
        path = self._loose(name)
        if path is not None:
            return RawContent(path.name, str(path), _read_loose(path))
        member = self._member(name)
        assert member is not None
        tree, inner = member
        with self._archive_errors():
            return RawContent(Path(inner).name, tree.path_of(inner), tree.read(inner, MAX_RAW_BYTES))

    def _loose(self, name: str) -> Path | None:
        candidates = (folder / f"{name}{suffix}" for folder in self._folders for suffix in (".gz", ""))
        return next((path for path in candidates if path.is_file()), None)

    def _member(self, name: str) -> tuple[FileTree, str] | None:
        if self._opened is None and self._archive is not None and self._archive.is_file():
            with self._archive_errors():
                self._opened = open_tree(self._archive)
        if (tree := self._opened) is None:
            return None
        return next(((tree, inner) for inner in tree.names if Path(inner).name in (name, f"{name}.gz")), None)

    def _archive_errors(self) -> AbstractContextManager[None]:
        return corrupt_as_user_error(
            f"{self._archive}, a damaged archive",
            expected="the complete archive, as published",
            hint=f"remove it and run again to download it: rm {self._archive}",
        )


@dataclass(frozen=True)
class PublishedArchive:
    """A published archive, or its content as loose files.

    Attributes:
        archive: The address, name, size and hash of the archive.
        names: The files that are read from it, without `.gz`.
        label: The name of the data set or variant, for messages.
        unpacked: The directory to which the archive unpacks.
    """

    archive: Download
    names: tuple[str, ...]
    label: str
    unpacked: str = ""

    def plan(self, directory: Path) -> str:
        """Return a line that describes what `open` would do."""
        _, missing, is_absent = self._inspect(directory)
        if not missing:
            return f"read the {self.label} files in {directory}"
        if not is_absent:
            return f"fail: {', '.join(missing)} not in {directory}"
        return f"download {self.archive.url} ({self.archive.bytes / 1e6:,.0f} MB) to {directory}"

    def open(self, directory: Path) -> RawDirectory:
        """Return the directory with all files, loose or in the archive, which is downloaded if none is there.

        Raises:
            UserError: If files are missing, or the archive cannot be downloaded.
        """
        files, missing, is_absent = self._inspect(directory)
        if is_absent:
            fetch(self.archive, directory, or_else=f"the loose files ({self.names[-1]}, ...)")
            missing = files.missing(self.names)
        if missing:
            raise UserError(
                found=f"no {', '.join(missing)} in {directory}",
                expected=f"the {self.label} files of the official {self.archive.name}, or that archive itself",
                hint=f"add what is missing, or use an empty --raw directory to download {self.archive.url}",
            )
        return files

    def _inspect(self, directory: Path) -> tuple[RawDirectory, list[str], bool]:
        """The directory, the missing files, and whether neither the archive nor any of its files is there."""
        files = RawDirectory(directory, self.archive.name, self.unpacked)
        missing = files.missing(self.names)
        return files, missing, len(missing) == len(self.names) and not (directory / self.archive.name).exists()


def _read_loose(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size <= MAX_RAW_BYTES:
            return path.read_bytes()
    except OSError as error:
        raise as_user_error(error, path) from None
    raise UserError(
        found=f"{path} of {size:,} bytes",
        expected=f"at most {MAX_RAW_BYTES:,} bytes",
        hint=f"remove it and run again to download the right file: rm {path}",
    )
