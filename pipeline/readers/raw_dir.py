"""Raw files of published data sets: loose in a directory, compressed or not, or inside an archive in it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pipeline.readers.archives.file_trees import FileTree, read_file
from pipeline.readers.archives.files import corrupt_as_user_error
from pipeline.readers.archives.zip_tar import open_tree
from pipeline.readers.download import Download, fetch
from pipeline.readers.naming import some_of
from shards.errors import UserError, quote
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
        return RawFile.of_content(self.name, self.content)


class RawDirectory:
    """A directory of raw files, which may be inside an archive in it.

    Args:
        directory: The directory.
        folders: Directories in it whose files and archives count too.
        archives: The names that the archive may have.
    """

    def __init__(self, directory: Path, folders: Sequence[str] = (), archives: Sequence[str] = ()) -> None:
        self._folders = (directory, *(directory / folder for folder in folders))
        paths = (folder / archive for folder in self._folders for archive in archives)
        self._archive = next((path for path in paths if path.is_file()), None)

    @property
    def has_archive(self) -> bool:
        """Whether the archive is there."""
        return self._archive is not None

    def missing(self, names: Sequence[str]) -> list[str]:
        """Return the names that are neither loose nor in the archive."""
        return [name for name in names if self._loose(name) is None and self._member(name) is None]

    def read(self, name: str) -> RawContent:
        """Read a file that is not missing; a loose file takes precedence over the archive.

        Raises:
            UserError: If it cannot be read.
        """
        path = self._loose(name)
        if path is not None:
            with _errors(path, "file"):
                return RawContent(path.name, str(path), read_file(path, MAX_RAW_BYTES))
        assert self._archive is not None
        with _errors(self._archive, "archive"):
            inner = self._member(name)
            assert self._tree is not None and inner is not None
            content = self._tree.read(inner, MAX_RAW_BYTES)
            return RawContent(Path(inner).name, self._tree.path_of(inner), content)

    def path(self, name: str) -> Path:
        """Return the path of a loose file that is not missing."""
        path = self._loose(name)
        assert path is not None
        return path

    def _loose(self, name: str) -> Path | None:
        candidates = (folder / f"{name}{suffix}" for folder in self._folders for suffix in (".gz", ""))
        return next((path for path in candidates if path.is_file()), None)

    @cached_property
    def _tree(self) -> FileTree | None:
        """The opened archive, None without one. To open it may take long."""
        if self._archive is None:
            return None
        with _errors(self._archive, "archive"):
            return open_tree(self._archive)

    def _member(self, name: str) -> str | None:
        members = self._tree.names if self._tree else ()
        return next((inner for inner in members if Path(inner).name in (name, f"{name}.gz")), None)


@dataclass(frozen=True)
class PublishedFiles:
    """The files of a published data set: each published by itself, or all in one archive.

    Attributes:
        names: The files that are read, without `.gz`.
        downloads: The file of each name in gzip, or the archive alone.
        label: The name of the data set or variant, for messages.
        folders: Directories below that of the raw files in which other programs put them.
        archives: Other names that the archive may have.
    """

    names: tuple[str, ...]
    downloads: tuple[Download, ...]
    label: str
    folders: tuple[str, ...] = ()
    archives: tuple[str, ...] = ()

    @property
    def archive(self) -> str:
        """The name of the archive; empty if each file is published by itself."""
        return self.downloads[0].name if len(self.downloads) < len(self.names) else ""

    def directory(self, directory: Path) -> RawDirectory:
        """Return the directory with the files that are there."""
        return RawDirectory(directory, self.folders, (self.archive, *self.archives) if self.archive else ())

    def missing(self, directory: Path) -> list[str]:
        """Return the names whose files are not there."""
        return self.directory(directory).missing(self.names)

    def plan(self, directory: Path) -> str:
        """Return a line that describes what `open` would do."""
        if needed := self._needed(directory):
            what = needed[0].url if len(needed) == 1 else some_of([download.name for download in needed])
            size = sum(each.bytes for each in needed)
            return f"download {what}{f' ({size / 1e6:,.1f} MB)' if size else ''} to {directory}"
        if missing := self.missing(directory):
            return f"fail: {some_of(missing)} not in {directory}"
        return f"read the {self.label} files in {directory}"

    def open(self, directory: Path) -> RawDirectory:
        """Return the directory with all files. Those that can be downloaded are; an archive only if no file is there.

        Raises:
            UserError: If files are missing, or cannot be downloaded.
        """
        for download in self._needed(directory):
            fetch(download, directory, or_else=f"the files {some_of(self.names)}")
        files = self.directory(directory)
        if missing := files.missing(self.names):
            raise UserError(
                found=f"no {some_of(missing)} in {directory}",
                expected=f"the {self.label} files of the official {self.archive}, or that archive itself",
                hint=f"add what is missing, or use an empty --raw directory to download {self.downloads[0].url}",
            )
        return files

    def _needed(self, directory: Path) -> list[Download]:
        """Return what has to be downloaded. An archive that is there is not opened; `open` does that."""
        files = self.directory(directory)
        if files.has_archive:
            return []
        missing = files.missing(self.names)
        if self.archive:
            return list(self.downloads) if len(missing) == len(self.names) else []
        return [each for each, name in zip(self.downloads, self.names, strict=True) if name in missing]


def _errors(path: Path, kind: str) -> AbstractContextManager[None]:
    return corrupt_as_user_error(
        f"{path}, a damaged {kind}",
        expected=f"the complete {kind}, as published",
        hint=f"remove it and run again to download it: rm {quote(path)}",
    )
