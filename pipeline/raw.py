"""Raw files where people have them: loose in a directory, compressed or not, or inside an archive there."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from shards.errors import UserError
from shards.manifest import RawFile

# What a damaged archive makes zipfile raise; RuntimeError (NotImplementedError): a password, an unknown compression.
_ARCHIVE_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError)


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
    """A directory of raw files, with or without an archive that holds them."""

    def __init__(self, directory: Path, archive: str | None = None) -> None:
        self.directory = directory
        self._archive = directory / archive if archive else None

    def missing(self, names: list[str]) -> list[str]:
        """Those of the names that are neither loose nor in the archive."""
        return [name for name in names if self._loose(name) is None and self._member(name) is None]

    def has_any(self, names: list[str]) -> bool:
        return len(self.missing(names)) < len(names)

    def read(self, name: str) -> RawContent:
        """Read a file that is there, loose ones first. Raises `UserError` if it cannot be read."""
        path = self._loose(name)
        if path is not None:
            return RawContent(path.name, str(path), path.read_bytes())
        member = self._member(name)
        assert member is not None and self._archive is not None
        try:
            with zipfile.ZipFile(self._archive) as archive:
                return RawContent(Path(member).name, f"{self._archive}:{member}", archive.read(member))
        except _ARCHIVE_ERRORS as error:
            raise self._bad_archive(error) from None

    def _loose(self, name: str) -> Path | None:
        candidates = (self.directory / f"{name}.gz", self.directory / name)
        return next((path for path in candidates if path.is_file()), None)

    def _member(self, name: str) -> str | None:
        if self._archive is None or not self._archive.is_file():
            return None
        try:
            with zipfile.ZipFile(self._archive) as archive:
                names = archive.namelist()
        except _ARCHIVE_ERRORS as error:
            raise self._bad_archive(error) from None
        wanted = {name, f"{name}.gz"}
        return next((member for member in names if member.rpartition("/")[2] in wanted), None)

    def _bad_archive(self, error: Exception) -> UserError:
        return UserError(
            found=f"{self._archive}, a damaged archive: {error}",
            expected="a whole ZIP file",
            hint=f"remove it and run again, so that it is downloaded anew: rm {self._archive}",
        )
