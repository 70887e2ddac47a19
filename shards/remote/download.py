"""Fetch files from a place into a directory: side by side, resumable, hash-checked, with one progress bar."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath
from threading import Event

from tqdm import tqdm

from shards.errors import UserError, no_permission
from shards.remote.base import Patience, Place, Unreachable
from shards.remote.cache import DIRECTORY_VARIABLE

THREADS = 8


@dataclass(frozen=True)
class Wanted:
    """A remote file: its name, size in bytes, SHA-256 (hex) if known, and otherwise what tells its versions apart."""

    name: str
    bytes: int
    sha256: str | None = None
    version: str = ""

    def is_in(self, directory: Path) -> bool:
        """Whether it is there; it gets its name only when it is whole."""
        path = directory / self.name
        return path.is_file() and path.stat().st_size == self.bytes


def check_names(files: Sequence[Wanted], place: Place) -> None:
    """Raise `UserError` if the files cannot all be put into one directory, and nowhere else."""
    names = [file.name for file in files]
    known = set(names)
    above = {str(parent) for name in names for parent in PurePosixPath(name).parents}
    for name in names:
        local = PurePath(name)
        if str(PurePosixPath(name)) != name or local.anchor or ".." in local.parts or "\0" in name:
            reason = f"a file named {name!r}, which is not a plain path below it"
        elif name in above:
            reason = f"{name!r} both as a file and as a directory"
        elif len(known) < len(names) and names.count(name) > 1:
            reason = f"two files named {name!r}"
        else:
            continue
        raise UserError(
            found=f"{place.shown} with {reason}",
            expected="files that can be put into a directory",
            hint="fetch nothing more from there unless you know who made it",
        )


def fetch_files(place: Place, files: Sequence[Wanted], directory: Path, partials: Path, label: str) -> None:
    """Fetch those of the files that are not in the directory yet, or continue where an earlier call was cut off.

    partials: where files lie until they are whole; on the same file system. One process at a time. A file whose hash
    is wrong is fetched once more. Raises `RemoteError` if the place does not give them, `UserError` if it gives
    others, or if the disk is full; what has come by then is kept.
    """
    missing = [file for file in files if not file.is_in(directory)]
    stop = Event()
    # The bar appears with the first bytes, so that a missing network shows one message and nothing else.
    bar = tqdm(total=sum(file.bytes for file in missing), desc=label, unit="B", unit_scale=True, delay=1e-3)
    try:
        partials.mkdir(parents=True, exist_ok=True)
        with bar, ThreadPoolExecutor(THREADS) as pool:
            work = [pool.submit(_fetch, place, file, directory, partials, bar, stop) for file in missing]
            try:
                for done in as_completed(work):
                    done.result()
            except BaseException:
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    except OSError as error:
        raise disk_trouble(error, directory) from None


def disk_trouble(error: OSError, directory: Path) -> UserError:
    """The message for a disk that takes no more, or another refusal of the operating system."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return no_permission(error, error.filename or directory)
    return UserError(
        found=f"{directory}: {error.strerror}",
        expected="a disk with room for what is fetched",
        hint=f"free some room (df -h), or export {DIRECTORY_VARIABLE}=DIR on a larger disk; what came is kept",
    )


def _fetch(place: Place, file: Wanted, directory: Path, partials: Path, bar: tqdm, stop: Event) -> None:
    target = directory / file.name
    key = hashlib.sha256(f"{file.name}\n{file.sha256}\n{file.version}".encode()).hexdigest()
    partial = partials / f"{key[:32]}.part"
    target.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(2):
        digest = _receive(place, file, partial, bar, stop)
        if stop.is_set():
            return
        if file.sha256 in (None, digest):
            partial.replace(target)
            return
        partial.unlink()
        bar.update(-file.bytes)
    raise UserError(
        found=f"{place.show(file.name)}, whose content has SHA-256 {digest}",
        expected=f"SHA-256 {file.sha256}, as its manifest says",
        hint="run again; if it stays so, the set has been changed since it was packed, or something alters it on the "
        "way: pack it again",
    )


def _receive(place: Place, file: Wanted, partial: Path, bar: tqdm, stop: Event) -> str:
    """Append what is missing to a partial file; returns the SHA-256 of what it has then, all of it unless stopped."""
    patience = Patience(stop=stop)
    # Unbuffered: what could not be written to a full disk must not be tried again at the closing.
    with open(partial, "ab", buffering=0) as out:
        if out.tell() > file.bytes:
            out.truncate(0)
            out.seek(0)
        with open(partial, "rb") as begun:
            digest = hashlib.file_digest(begun, "sha256")
        bar.update(out.tell())
        while (start := out.tell()) < file.bytes and not stop.is_set():
            try:
                for chunk in place.stream(file.name, start, file.bytes):
                    rest = memoryview(chunk)
                    while rest:
                        rest = rest[out.write(rest) :]
                    digest.update(chunk)
                    bar.update(len(chunk))
                    if stop.is_set():
                        break
            except Unreachable as error:
                patience.wait(error, progress=out.tell() > start)
        os.fsync(out.fileno())
    return digest.hexdigest()
