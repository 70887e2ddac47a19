"""Cache of downloaded files: a directory per entry, limited in size, shared by all processes of a machine.

CACHE/sets/KEY/NAME        downloaded files
CACHE/sets/KEY/.parts/     incomplete files
CACHE/sets/KEY/.checked    size, modification time and SHA-256 of each downloaded file
CACHE/sets/KEY/.use        locked (shared) by every process that uses the entry, until the process ends; its
                           modification time is that of the last use, its content the final bytes of the entry
CACHE/sets/.KEY.lock       held by the process that downloads
CACHE/.room.lock           held during eviction
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.atomic import NO_LOCKS, file_lock, make_directory, read_json, write_json
from shards.errors import AccessDeniedError, DiskFullError, UserError, os_errors_as_user_errors
from shards.manifest import RawFile
from shards.remote.download import RemoteFile, remove

try:
    import fcntl
except ImportError:  # Windows: a directory with open files cannot be renamed there, so it is not evicted either
    fcntl = None  # type: ignore[assignment]  # no such module

log = logging.getLogger(__name__)

DIRECTORY_VARIABLE = "INKSTREAM_CACHE"
SIZE_VARIABLE = "INKSTREAM_CACHE_SIZE"
_OTHER_CACHE = f"use another cache: export {DIRECTORY_VARIABLE}=$PWD/cache"
_UNITS = ("", "K", "M", "G", "T")
_EVICTED = ".evicted-"
_NOTICE_AFTER = 2.0  # seconds; a process that does not download releases the lock earlier

_descriptors: dict[Path, int] = {}
"""Open descriptors of the `.use` files that this process has locked."""


def cache_directory() -> Path:
    """Return $INKSTREAM_CACHE, or `inkstream` in $XDG_CACHE_HOME, or ~/.cache/inkstream."""
    named = os.environ.get(DIRECTORY_VARIABLE)
    path = Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "inkstream"
    try:
        return path.expanduser().absolute()
    except RuntimeError:
        raise UserError(
            found="no home directory, in which remote files are cached",
            expected=f"$HOME, or ${DIRECTORY_VARIABLE}",
            hint=f"export {DIRECTORY_VARIABLE}=DIR",
        ) from None


def cache_limit() -> int | None:
    """Return the limit in bytes that $INKSTREAM_CACHE_SIZE sets (200GB, 1.5TB, 300GiB); None without one."""
    text = os.environ.get(SIZE_VARIABLE, "").strip()
    if not text:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?", text.upper())
    size = float(match[1]) * (1024 if match[3] else 1000) ** _UNITS.index(match[2]) if match else 0
    if match is None or (match[3] and not match[2]) or size < 1:
        raise UserError(
            found=f"{SIZE_VARIABLE}={text}",
            expected="a size such as 200GB, 1.5TB or 300GiB",
            hint=f"export {SIZE_VARIABLE}=200GB, or unset it (the default is half of the disk space)",
        )
    return int(size)


def cache_used() -> int:
    """Return the bytes of all entries, once their downloads are complete."""
    return sum(map(_recorded_size, cache_directory().glob("*/[!.]*/.use")))


def _recorded_size(use: Path) -> int:
    """The size of an entry, once its download is complete; 0 if it is not recorded, or has been evicted meanwhile."""
    with contextlib.suppress(OSError, ValueError):
        return max(0, int(use.read_bytes()))
    return 0


def mark_unchecked(path: Path) -> None:
    """Have a file checked again when its entry is used next, if it is a file of the cache."""
    with contextlib.suppress(OSError, UserError):
        if path.absolute().is_relative_to(cache_directory()):
            os.utime(path)


def write_record(path: Path, fields: dict[str, Any]) -> None:
    """Replace a JSON file of the cache, even if it has become a directory."""
    if path.is_dir():
        remove(path)
    write_json(path, fields)


@dataclass(frozen=True)
class Entry:
    """An entry of the cache.

    Attributes:
        directory: The directory of the entry.
        content: The directory for complete files.
        read_only: Whether this user may only read it. Files that are missing or damaged cannot be fetched then.
    """

    directory: Path
    content: Path
    read_only: bool = False

    def make_room(self, total: int, what: str, least: int | None = None) -> int:
        """Evict other entries, least recently used first, until this one can grow to a size.

        Args:
            total: The size in bytes.
            what: The name of the entry in messages.
            least: A smaller size that is enough if `total` does not fit; None if there is none.

        Returns:
            The size that the entry may have.

        Raises:
            UserError: If the entry exceeds the limit or the disk. Nothing is evicted then.
        """
        root = cache_directory()
        with file_lock(root / ".room.lock"):
            total = _evict_until_it_fits(root, self.directory, total, what, least)
            (self.directory / ".use").write_text(str(total), encoding="ascii")
        return total

    def check_files(self, files: Sequence[RemoteFile]) -> None:
        """Hash the files that have changed since they were last checked, and delete those that are damaged.

        Files that are missing are ignored. The first check of a file of unknown hash records its hash.

        Raises:
            UserError: If a file is damaged in an entry that this user may only read.
        """
        record = self.directory / ".checked"
        before, after = read_json(record).get("files", {}), {}
        for file in files:
            path = self.content / file.name
            for above in [*path.relative_to(self.directory).parents][-2::-1]:
                if os.path.lexists(self.directory / above) and not (self.directory / above).is_dir():
                    self.remove_damaged(self.directory / above)
            if not os.path.lexists(path):
                continue
            known = before.get(file.name)
            known = known if isinstance(known, list) and len(known) == 3 else [None, None, None]
            status = path.stat() if path.is_file() else None
            stamp = [status.st_size, status.st_mtime_ns] if status else None
            if known[:2] != stamp or file.sha256 not in (None, known[2]):
                intact = status is not None and status.st_size == file.bytes
                digest = RawFile.of(path.parent, path.name).sha256 if intact else None
                if digest is None or digest != (file.sha256 or known[2] or digest):
                    self.remove_damaged(path)
                    continue
                known = [*(stamp or []), digest]
            after[file.name] = known
        if after != before and not self.read_only:
            write_record(record, {"files": after})

    def remove_damaged(self, path: Path) -> None:
        """Delete a damaged file, with a warning; raise `UserError` if this user may not."""
        if self.read_only:
            raise self.refusal(f"{path}, which is damaged, and which this user may not replace")
        log.warning("%s is damaged and is downloaded again", path)
        remove(path)

    def refusal(self, found: str) -> AccessDeniedError:
        """Return the error for an entry that this user may only read, and cannot use."""
        return AccessDeniedError(
            found, "a complete copy in the cache, or a cache that this user may write", _OTHER_CACHE
        )

    @contextlib.contextmanager
    def exclusive(self, busy: UserError) -> Iterator[None]:
        """Lock the entry exclusively, to change existing files; raise `busy` if another process uses it."""
        descriptor = _descriptors[self.directory / ".use"]
        try:
            _lock(descriptor, exclusive=True)
        except BlockingIOError:
            _lock(descriptor)  # the failed attempt has released the shared lock
            raise busy from None
        try:
            yield
        finally:
            _lock(descriptor)


@contextlib.contextmanager
def open_entry(kind: str, key: str, name: str) -> Iterator[Entry]:
    """Open a new or existing entry, to read and to fill it. Other processes wait.

    The entry is not evicted until this process ends.

    Args:
        kind: The kind of the entry: "sets" or "files".
        key: The unique name of the entry.
        name: The name of the directory for its files.

    Raises:
        UserError: If the operating system refuses to read or write the entry.
    """
    root = cache_directory() / kind
    waiting = threading.Timer(_NOTICE_AFTER, log.warning, ["waiting for another process that fetches %s", name])
    waiting.start()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_refusals_with_hint())
        stack.enter_context(os_errors_as_user_errors(root / key))
        lock, is_locked, read_only = root / f".{key}.lock", False, False
        try:
            make_directory(root)
            stack.enter_context(file_lock(lock))
            is_locked = True
            waiting.cancel()
            with os_errors_as_user_errors(root / key):
                _lock_for_use(root / key)
        except AccessDeniedError:  # the cache of another user, or a file system that is read-only
            read_only = _lock_for_reading(root / key, None if is_locked else lock)
            if not read_only:
                raise
        finally:
            waiting.cancel()
        yield Entry(root / key, root / key / name, read_only)


@contextlib.contextmanager
def _refusals_with_hint() -> Iterator[None]:
    """Name another cache in the hint of an error about a path that the operating system refuses."""
    try:
        yield
    except AccessDeniedError as error:
        if type(error) is not AccessDeniedError:  # of a remote storage
            raise
        raise AccessDeniedError(error.found, "a cache that this user may read and write", _OTHER_CACHE) from None


def _lock_for_reading(directory: Path, lock: Path | None) -> bool:
    """Lock an entry that this user may only read, until this process ends; returns False if it cannot be read.

    Its time of use is not recorded. A process of another user that holds `lock`, because it fills the entry, is waited
    for.
    """
    path = directory / ".use"
    with contextlib.suppress(OSError):
        if lock is not None:
            with contextlib.suppress(FileNotFoundError), open(lock, "rb") as writer:
                _lock(writer.fileno())
        if path in _descriptors and _is(_descriptors[path], path):
            return True
        descriptor = os.open(path, os.O_RDONLY)
        _lock(descriptor)
        if _is(descriptor, path):
            _descriptors[path] = descriptor
            return True
        os.close(descriptor)
    return False


def _lock_for_use(directory: Path) -> None:
    """Lock an entry until this process ends, and record the time of use."""
    path = directory / ".use"
    while True:
        # Not exist_ok: it checks again, and mistakes a directory that was evicted in between for a file.
        with contextlib.suppress(FileExistsError):
            directory.mkdir()
        descriptor = _descriptors.get(path)
        if descriptor is None:
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            except FileNotFoundError:
                if directory.is_symlink():
                    raise  # a broken link
                continue  # evicted since mkdir
            _lock(descriptor)
        if _is(descriptor, path):
            _descriptors[path] = descriptor
            os.utime(path)
            return
        # Evicted while this process waited, or removed by hand: the locked file does not exist any more.
        _descriptors.pop(path, None)
        os.close(descriptor)


def _lock(descriptor: int, exclusive: bool = False) -> None:
    """Wait for the shared lock, or take the exclusive one; raise BlockingIOError if others share it.

    On a file system without locks an entry may be evicted while it is used. The process that uses it then ends.
    """
    if fcntl is not None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB if exclusive else fcntl.LOCK_SH)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise


def _is(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _evict_until_it_fits(root: Path, directory: Path, total: int, what: str, least: int | None) -> int:
    for leftover in root.glob(f"*/{_EVICTED}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    present = _bytes_in(directory)
    free = shutil.disk_usage(root).free
    used = promised = 0  # promised: bytes that other processes are still downloading
    idle = []
    for use in root.glob("*/[!.]*/.use"):
        if use.parent == directory:
            continue
        size = _bytes_in(use.parent)
        used += size
        if _is_locked(use):
            promised += max(0, _recorded_size(use) - size)
        else:
            idle.append((use.stat().st_mtime, size, use.parent))
    limit = cache_limit() or (free + used + present) // 2
    evictable = sum(size for _, size, _ in idle)
    largest = min(limit - (used - evictable), free + present + evictable) - promised
    if least is not None and least <= largest:
        total = min(total, largest)

    if total > limit:
        raise UserError(
            found=f"{what} of {format_size(total)}, and a cache of at most {format_size(limit)} in {root}",
            expected="a cache that is large enough",
            hint=f"export {SIZE_VARIABLE}={format_size(total + total // 10)} (the default is half of the disk space), "
            f"or {DIRECTORY_VARIABLE}=DIR on a larger disk",
        )
    over_limit = used + promised + total - limit
    over_disk = total - present + promised - free
    if over_disk > evictable:
        raise DiskFullError(
            found=f"{format_size(free + evictable)} of free space for {what} on the disk of {root}",
            expected=f"{format_size(total - present + promised)}",
            hint=f"free disk space, or export {DIRECTORY_VARIABLE}=DIR on a larger disk",
        )
    over = max(over_limit, over_disk)
    if over <= evictable:
        for _, size, other in sorted(idle):
            if over > 0 and _evict(other):
                over -= size
    if over > 0:
        raise UserError(
            found=f"{format_size(used - evictable + promised)} of the cache in {root} in use by running processes",
            expected=f"room for {what} of {format_size(total)} below the limit of {format_size(limit)}",
            hint=f"wait for them to end, or export {SIZE_VARIABLE}={format_size((total + used + promised) * 11 // 10)}",
        )
    return total


@contextlib.contextmanager
def _locked_exclusively(use: Path) -> Iterator[None]:
    """Lock a `.use` file; raise BlockingIOError if another process uses the entry, or another user owns it."""
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open(use, "rb+"))
        except PermissionError:
            raise BlockingIOError from None
        _lock(file.fileno(), exclusive=True)
        yield


def _is_locked(use: Path) -> bool:
    try:
        with _locked_exclusively(use):
            return False
    except BlockingIOError:
        return True


def _evict(directory: Path) -> bool:
    """Remove an entry, unless a process has begun to use it. Returns whether it was removed."""
    aside = directory.with_name(f"{_EVICTED}{directory.name}")
    try:
        # Without locks (Windows) no file is open: a directory with open files cannot be renamed there.
        with contextlib.nullcontext() if fcntl is None else _locked_exclusively(directory / ".use"):
            directory.rename(aside)
    except OSError:  # locked, or (Windows) open
        return False
    shutil.rmtree(aside, ignore_errors=True)
    log.info("evicted %s from the cache", directory)
    return True


def _bytes_in(directory: Path) -> int:
    total = 0
    for path, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # another process writes to it
                total += os.lstat(os.path.join(path, name)).st_size
    return total


def format_size(count: int) -> str:
    """Return bytes as 1.23GB, the format of $INKSTREAM_CACHE_SIZE."""
    power = max((power for power in range(1, len(_UNITS)) if count >= 1000**power), default=0)
    return f"{count / 1000**power:.2f}{_UNITS[power]}B" if power else f"{count}B"
