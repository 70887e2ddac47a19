"""Download files: in parallel, resumable, hash-checked, with one progress bar."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial as partial_function
from pathlib import Path, PurePath, PurePosixPath
from threading import Event
from typing import TypeVar

from tqdm import tqdm

from shards.atomic import make_directory
from shards.errors import MismatchError, UserError, os_errors_as_user_errors
from shards.remote.base import PROGRESS, ChangedError, RemoteStorage, RetryPolicy, TransientError, retry

T = TypeVar("T")

THREADS = 8
_HASHES = {"md5": "MD5", "sha256": "SHA-256"}


@dataclass(frozen=True)
class RemoteFile:
    """A file to download.

    Attributes:
        name: Its name below the address of the storage; "" is the address itself.
        bytes: Its size.
        sha256: SHA-256 of its content (hex), None if it is unknown.
        version: A string that changes with the content, where the hash is unknown.
        md5: MD5 of its content (hex), where only that was published.
    """

    name: str
    bytes: int
    sha256: str | None = None
    version: str = ""
    md5: str | None = None

    @property
    def algorithm(self) -> str:
        """The name of the hash function that the content is checked with."""
        return "md5" if self.md5 and not self.sha256 else "sha256"

    def is_in(self, directory: Path) -> bool:
        """Whether the directory holds the file. It gets its name only when it is complete."""
        path = directory / self.name
        return path.is_file() and path.stat().st_size == self.bytes

    def partial(self, directory: Path) -> Path:
        """Return the path of the incomplete file in a directory of such files."""
        key = hashlib.sha256(f"{self.name}\n{self.sha256}\n{self.version}".encode()).hexdigest()
        return directory / f"{key[:32]}.part"


def remove(path: Path) -> None:
    """Delete a file or a directory, whatever it is."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_names(files: Sequence[RemoteFile], storage: RemoteStorage) -> None:
    """Raise `UserError` if a name is outside the directory to download into, or names collide."""
    names = Counter(file.name for file in files)
    above = {str(parent) for name in names for parent in PurePosixPath(name).parents}
    for name, count in names.items():
        local = PurePath(name)
        if str(PurePosixPath(name)) != name or local.anchor or ".." in local.parts or "\0" in name:
            reason = f"a file named {name!r}, which is not a plain path below it"
        elif name in above:
            reason = f"{name!r} both as a file and as a directory"
        elif count > 1:
            reason = f"two files named {name!r}"
        else:
            continue
        raise UserError(
            found=f"{storage.shown} with {reason}",
            expected="file names that are valid in a directory",
            hint="download from there only if you trust its author",
        )


def download_files(
    storage: RemoteStorage, files: Sequence[RemoteFile], directory: Path, partials: Path, label: str
) -> None:
    """Download the files that are not in a directory yet, or continue where an earlier call ended.

    Args:
        storage: Where the files are.
        files: What to download.
        directory: Where complete files go.
        partials: A directory on the same file system for incomplete files; removed at the end. Only one process at
            a time may use it.
        label: The description of the progress bar.

    Raises:
        UserError: As `download_file` does. Files that are incomplete then are kept.
    """
    missing = [file for file in files if not file.is_in(directory)]
    if not partials.is_dir():
        remove(partials)
    make_directory(partials)

    def download(file: RemoteFile, stop: Event) -> None:
        download_file(storage, file, directory / file.name, file.partial(partials), bar, stop)

    with progress_bar(sum(file.bytes for file in missing), label) as bar:
        run_in_threads(download, missing)
    shutil.rmtree(partials)


def progress_bar(total: int, label: str) -> tqdm:
    """Return a progress bar in bytes. It appears with the first bytes: without a network only the error is printed."""
    return tqdm(total=total, desc=label, unit="B", unit_scale=True, delay=1e-3)


def run_in_threads(work: Callable[[T, Event], None], items: Sequence[T], threads: int | None = None) -> None:
    """Call a function for each item, `THREADS` at a time. The first exception stops the others and is raised.

    Args:
        work: Called with an item and an event, which is set when the call has to end early.
        items: The items.
        threads: Another number of threads.
    """
    stop = Event()
    with ThreadPoolExecutor(threads or THREADS) as pool:
        futures = [pool.submit(work, item, stop) for item in items]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def download_file(
    storage: RemoteStorage,
    file: RemoteFile,
    target: Path,
    partial: Path,
    bar: tqdm,
    stop: Event | None = None,
    fail_fast: bool = False,
) -> None:
    """Download a file, or continue where an earlier call ended. A file with a wrong hash is downloaded once more.

    Args:
        storage: Where the file is.
        file: Its name there, its size and its hash.
        target: The path of the complete file.
        partial: The path of the incomplete file, on the same file system.
        bar: Counts the bytes.
        stop: An event that ends the download early.
        fail_fast: Whether to raise at once if the first request finds no server.

    Raises:
        RemoteError: If the storage does not deliver the file. What has arrived is kept.
        MismatchError: If the storage delivers another file.
        UserError: If the disk is full or may not be written.
    """
    stop = stop or Event()
    make_directory(target.parent)
    try:
        with os_errors_as_user_errors(partial):
            for _ in range(2):
                digest = _receive(storage, file, partial, bar, RetryPolicy(stop=stop, fail_fast=fail_fast), stop)
                if stop.is_set():
                    return
                expected = file.sha256 or file.md5
                if expected is None and file.version:
                    retry(lambda: storage.check_version(file.name, file.version), stop=stop)
                if expected in (None, digest):
                    partial.replace(target)
                    return
                partial.unlink()
                bar.update(-file.bytes)
    finally:
        if partial.exists() and partial.stat().st_size == 0:
            partial.unlink()
    raise MismatchError(
        found=f"{storage.show(file.name)}, whose content has {_HASHES[file.algorithm]} {digest}",
        expected=f"{_HASHES[file.algorithm]} {expected}",
        hint="run again; if it stays so, the file has changed since its hash was recorded (a packed set: pack it "
        "again), or something alters it on the way",
    )


def _receive(
    storage: RemoteStorage, file: RemoteFile, partial: Path, bar: tqdm, policy: RetryPolicy, stop: Event
) -> str:
    """Append the missing bytes to a partial file, unless stopped; returns the hash of its content."""
    new_digest = partial_function(hashlib.new, file.algorithm, usedforsecurity=False)
    # Without a hash or version nothing tells whether the rest belongs to what has arrived.
    is_resumable = bool(file.sha256 or file.md5 or file.version)
    # Unbuffered: after a write to a full disk has failed, close() must not repeat it.
    with open(partial, "ab", buffering=0) as out:
        if out.tell() > file.bytes or not is_resumable:
            out.truncate(0)
            out.seek(0)
        with open(partial, "rb") as begun:
            digest = hashlib.file_digest(begun, new_digest)
        bar.update(out.tell())
        furthest = out.tell()
        while (start := out.tell()) < file.bytes and not stop.is_set():
            try:
                for chunk in storage.stream(file.name, start, file.bytes, file.version):
                    rest = memoryview(chunk)
                    while rest:
                        rest = rest[out.write(rest) :]
                    digest.update(chunk)
                    bar.update(len(chunk))
                    if stop.is_set():
                        break
            except TransientError as error:
                # Bytes that had arrived before a restart are no progress: the restarts would have no end.
                progress = out.tell() - furthest >= PROGRESS
                furthest = max(furthest, out.tell())
                if isinstance(error, ChangedError) or not is_resumable:
                    bar.update(-out.tell())
                    out.truncate(0)
                    out.seek(0)
                    digest, progress = new_digest(), False
                policy.wait(error, progress)
        os.fsync(out.fileno())
    return digest.hexdigest()
