"""Raw files where people have them: loose in a directory, compressed or not, or inside an archive there."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from pipeline.readers.archives.file_trees import FileTree
from pipeline.readers.archives.files import CorruptFileError
from pipeline.readers.archives.zip_tar import open_tree
from pipeline.readers.download import Download, fetch
from shards.errors import UserError, as_user_error
from shards.manifest import RawFile

MOST_RAW_BYTES = 2 << 30  # of one file, as it lies there; the largest one known here has 0.6 GB


@dataclass(frozen=True)
class RawContent:
    """The bytes of a raw file as they lie on the disk (or in the archive), and where they came from."""

    name: str
    place: str
    content: bytes

    def record(self) -> RawFile:
        digest = hashlib.sha256(self.content).hexdigest()
        return RawFile(name=self.name, bytes=len(self.content), sha256=digest)


class RawDirectory:
    """A directory of raw files, with or without an archive that holds them.

    unpacked: the directory in it to which the archive unpacks; loose files are looked for there too.
    """

    def __init__(self, directory: Path, archive: str | None = None, unpacked: str = "") -> None:
        self.directory = directory
        self._archive = directory / archive if archive else None
        self._folders = (directory, directory / unpacked) if unpacked else (directory,)
        self._opened: FileTree | None = None

    def missing(self, names: list[str]) -> list[str]:
        """Those of the names that are neither loose nor in the archive."""
        return [name for name in names if self._loose(name) is None and self._member(name) is None]

    def read(self, name: str) -> RawContent:
        """Read a file that is there, loose ones first. Raises `UserError` if it cannot be read."""
        path = self._loose(name)
        if path is not None:
            return RawContent(path.name, str(path), _read_loose(path))
        member, tree = self._member(name), self._tree()
        assert member is not None and tree is not None
        try:
            content = tree.read(member, MOST_RAW_BYTES)
        except CorruptFileError as error:
            raise self._bad_archive(error) from None
        return RawContent(Path(member).name, tree.place_of(member), content)

    def _loose(self, name: str) -> Path | None:
        candidates = (folder / f"{name}{suffix}" for folder in self._folders for suffix in (".gz", ""))
        return next((path for path in candidates if path.is_file()), None)

    def _member(self, name: str) -> str | None:
        wanted = {name, f"{name}.gz"}
        tree = self._tree()
        members = tree.names if tree else []
        return next((member for member in members if member.rpartition("/")[2] in wanted), None)

    def _tree(self) -> FileTree | None:
        """The archive, opened once it is there."""
        if self._opened is None and self._archive is not None and self._archive.is_file():
            try:
                self._opened = open_tree(self._archive)
            except CorruptFileError as error:
                raise self._bad_archive(error) from None
        return self._opened

    def _bad_archive(self, error: CorruptFileError) -> UserError:
        return UserError(
            found=f"{self._archive}, a damaged archive: {error}",
            expected="the whole archive, as published",
            hint=f"remove it and run again, so that it is downloaded anew: rm {self._archive}",
        )


@dataclass(frozen=True)
class PublishedArchive:
    """A published archive, or its content as loose files.

    Attributes:
        archive: Where it is downloaded from.
        names: The files that are read of it, without `.gz`.
        label: What the files are, for messages.
        unpacked: The directory to which the archive unpacks.
    """

    archive: Download
    names: tuple[str, ...]
    label: str
    unpacked: str = ""

    def plan(self, directory: Path) -> str:
        """A line that says what `open` would do."""
        files = RawDirectory(directory, self.archive.name, self.unpacked)
        if not (missing := files.missing(list(self.names))):
            return f"read the {self.label} files in {directory}"
        if len(missing) < len(self.names) or self.archive.path(directory).exists():
            return f"fail: {', '.join(missing)} not in {directory}"
        return f"download {self.archive.url} ({self.archive.bytes / 1e6:,.0f} MB) to {directory}"

    def open(self, directory: Path) -> RawDirectory:
        """The directory with all of the files, loose or in the archive, which is downloaded if none is there.

        Raises:
            UserError: Files are missing, or the archive cannot be downloaded.
        """
        files = RawDirectory(directory, self.archive.name, self.unpacked)
        missing = files.missing(list(self.names))
        if len(missing) == len(self.names) and not self.archive.path(directory).exists():
            fetch(self.archive, directory, or_else=f"the loose files ({self.names[-1]}, ...)")
            missing = files.missing(list(self.names))
        if missing:
            raise UserError(
                found=f"no {', '.join(missing)} in {directory}",
                expected=f"the {self.label} files of the official {self.archive.name}, or that archive itself",
                hint=f"add what is missing, or name an empty --raw directory to download {self.archive.url}",
            )
        return files


def _read_loose(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size <= MOST_RAW_BYTES:
            return path.read_bytes()
    except OSError as error:
        raise as_user_error(error, path) from None
    raise UserError(
        found=f"{path} of {size:,} bytes",
        expected=f"at most {MOST_RAW_BYTES:,}, as such files have",
        hint="is it another file of that name? Remove it, and the right one is downloaded",
    )
