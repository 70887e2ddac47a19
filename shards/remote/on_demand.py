"""Files of a data set larger than the cache: fetched when they are needed, evicted when no process needs them.

CACHE/sets/KEY/.fetching/  incomplete files
CACHE/sets/KEY/.files      for each file two int64: the modification time that it had when its SHA-256 was verified (0:
                           absent, 1: reserved), and its rank in the order of eviction
CACHE/sets/KEY/.locks      locked by byte ranges, so that one descriptor is enough for any number of files: byte 0 while
                           files are evicted, byte 1 + 2n by the process that fetches file n, byte 2 + 2n (shared) by
                           every process that needs file n, and the last byte (shared) by all of them
"""

from __future__ import annotations

import contextlib
import errno
import heapq
import logging
import os
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from shards.atomic import NO_LOCKS, FileIdentity, file_identity, make_directory
from shards.errors import DiskFullError, UserError, os_errors_as_user_errors
from shards.manifest import RawFile
from shards.remote.base import RemoteStorage
from shards.remote.cache import SIZE_VARIABLE, Entry, cache_limit, cache_used, format_size
from shards.remote.download import RemoteFile, download_file, remove

try:
    import fcntl
except ImportError:  # Windows: data sets are fetched whole there
    fcntl = None  # type: ignore[assignment]  # no such module

log = logging.getLogger(__name__)

_THREADS = 8
_LEAD = 4  # files of later steps occupy at most 1/_LEAD of the part of an iterator
_PAUSE = 0.02  # seconds between attempts to take a lock that is held for long
_RETRY_PAUSE = 5.0  # seconds until a file that could not be fetched ahead is tried again
_YIELD_SECONDS = 0.2  # that a step waits for room before it takes that of files of later steps
_ROOM_SECONDS = 120.0  # that a step waits until other threads and processes need fewer files
_ABSENT, _RESERVED = 0, 1  # in place of a modification time
_MIDDLE = 1 << 61  # divides the order of eviction: more than a time in nanoseconds
_LAST_BYTE = 1 << 40
_ROW = 16  # bytes of a file in .files
_open: dict[Path, OnDemandFiles] = {}
"""Data sets of this process that are read on demand, by their directory."""


@dataclass
class _Claim:
    """A need of this process for a file: how many users it has, and its identity once it is in the cache."""

    count: int = 0
    identity: FileIdentity | None = None


class OnDemandFiles:
    """Files in a cache entry that are fetched when they are opened. Processes of a host share them.

    A file stays in the cache while one of the processes needs it. The iterators of a process share one budget for the
    files that they keep for a window or fetch ahead. A step that finds no room takes that of files which were fetched
    ahead, so iterators and processes that wait for each other go on. When room is needed, files that the training has
    passed are evicted first, the most recently passed one first: a shuffled epoch reads every file once, so files that
    it has not reached yet are needed earlier than those that it has just passed.

    Args:
        entry: The cache entry.
        storage: Where the files are.
        files: The files.
        room: Bytes that they may occupy in the cache.
    """

    def __init__(self, entry: Entry, storage: RemoteStorage, files: Sequence[RemoteFile], room: int) -> None:
        self._entry = entry
        self._storage = storage
        self._files = files
        self._sizes = np.array([file.bytes for file in files], np.int64)
        self._numbers = {str(entry.content / file.name): number for number, file in enumerate(files)}
        self._parts = entry.directory / ".fetching"
        self.room = room
        self.fetched_bytes = 0
        with os_errors_as_user_errors(entry.directory):
            make_directory(self._parts)
            self._states = os.open(entry.directory / ".files", os.O_RDWR | os.O_CREAT, 0o666)
            self._locks = os.open(entry.directory / ".locks", os.O_RDWR | os.O_CREAT, 0o666)
        self._start_process()
        with os_errors_as_user_errors(entry.directory), self._exclusive():
            self._reconcile()

    def _start_process(self) -> None:
        """Begin without claims: at first, and in a forked process, which does not inherit locks."""
        self._claims: dict[int, _Claim] = {}
        self._mutex = threading.RLock()
        self.changed = threading.Condition(self._mutex)
        self._prefetchers: list[_Prefetcher] = []
        self._kept: Counter[int] = Counter()  # for how many iterators each file is kept
        self._kept_bytes = 0
        self._fetching: dict[int, threading.Lock] = defaultdict(threading.Lock)
        _lock(self._locks, _LAST_BYTE, exclusive=False)

    def _reconcile(self) -> None:
        """Record files that are in the cache already: an earlier process may have fetched all of them."""
        size = len(self._files) * _ROW
        if os.fstat(self._states).st_size != size:
            os.ftruncate(self._states, 0)
            os.pwrite(self._states, bytes(size), 0)  # allocated at once: no write fails on a full disk later
        for number in np.flatnonzero(self._read_states()[:, 0] == _ABSENT).tolist():
            if self._files[number].is_in(self._entry.content):
                self._write_state(number, _RESERVED)

    @property
    def share(self) -> int:
        """Bytes of the room that all iterators of a process of this host may keep and fetch ahead.

        The rest of the room is for files that are read out of order.
        """
        return self.room // _ranks() - 2 * int(self._sizes.max())

    @contextlib.contextmanager
    def held(self, path: str) -> Iterator[FileIdentity | None]:
        """Keep a file in the cache during the block. Yields its identity; None for a file that is always there.

        Raises:
            UserError: If it cannot be fetched, or there is no room for it.
        """
        number = self._numbers.get(path)
        if number is None:
            yield None
            return
        self.claim(number)
        try:
            yield self.fetch(number)
        finally:
            self.release(number)

    def claim(self, number: int) -> None:
        """Keep a file from being evicted once it is there."""
        with self._mutex:
            claim = self._claims.setdefault(number, _Claim())
            claim.count += 1
            if claim.count == 1:
                with self._exclusive():
                    _lock(self._locks, 2 + 2 * number, exclusive=False)

    def release(self, number: int, passed: bool = False) -> None:
        """Allow a file to be evicted. `passed`: the epoch does not need it any more."""
        with self._mutex:
            claim = self._claims[number]
            claim.count -= 1
            if claim.count:
                return
            del self._claims[number]
            now = time.time_ns()
            with self._exclusive():
                # Ascending: passed files, the most recent first; then others, the least recently used first.
                self._write_state(number, order=-(_MIDDLE + now) if passed else now - _MIDDLE)
                self._unlock(2 + 2 * number)

    def fetch(self, number: int, stop: threading.Event | None = None) -> FileIdentity | None:
        """Wait until a file that this process has claimed is in the cache; returns its identity.

        With `stop`, the file is fetched ahead: returns None if there is no room now, or `stop` is set before the end.
        """
        claim = self._claims[number]
        with self._fetching[number]:
            if claim.identity is None:
                with (
                    os_errors_as_user_errors(self._entry.directory),
                    self._fetched_by_this_process(number, stop) as is_fetched_here,
                ):
                    if is_fetched_here:
                        claim.identity = self._find(number) or self._download(number, stop)
            return claim.identity

    @contextlib.contextmanager
    def prefetch(self, uses: Iterable[tuple[str, int, int]]) -> Iterator[Callable[[int], None]]:
        """Fetch files in threads, ahead of the steps that need them, as far as the room allows.

        Errors are left to the step that needs the file: it tries again.

        Args:
            uses: Path, first step and last step of each file, by the first step that reads it.

        Yields:
            A function to call with the number of each step before it reads: it allows files of earlier steps to be
            evicted.
        """
        prefetcher = _Prefetcher(self, ((self._numbers[path], first, last) for path, first, last in uses))
        with self.changed:
            self._prefetchers.append(prefetcher)
        prefetcher.start()
        try:
            yield prefetcher.advance
        finally:
            prefetcher.close()
            with self.changed:
                if prefetcher in self._prefetchers:  # not in a forked process
                    self._prefetchers.remove(prefetcher)
                self.changed.notify_all()

    def has_room_ahead(self, number: int, own_bytes: int) -> bool:
        """Whether an iterator that keeps `own_bytes` may keep another file: it fits into the budget of the process.

        An iterator keeps at most its equal part of the budget, or one file if a file is larger than the part.
        """
        size = self.size(number)
        is_fair = not own_bytes or own_bytes + size <= self.part
        return is_fair and (number in self._kept or self._kept_bytes + size <= self.share)

    def keep(self, number: int) -> None:
        """Claim a file for an iterator."""
        with self.changed:
            self.claim(number)
            self._kept_bytes += 0 if number in self._kept else self.size(number)
            self._kept[number] += 1

    def drop(self, number: int, passed: bool = False) -> None:
        """End `keep`. `passed`: as for `release`."""
        with self.changed:
            self._kept[number] -= 1
            if not self._kept[number]:
                del self._kept[number]
                self._kept_bytes -= self.size(number)
            self.release(number, passed)
            self.changed.notify_all()

    @property
    def part(self) -> int:
        """Bytes of the budget of this process for each of its iterators."""
        return self.share // max(1, len(self._prefetchers))

    def size(self, number: int) -> int:
        """Return the bytes of a file."""
        return self._files[number].bytes

    def _find(self, number: int) -> FileIdentity | None:
        """Return the identity of a file that is in the cache and intact."""
        file, path = self._files[number], self._entry.content / self._files[number].name
        if not file.is_in(self._entry.content):
            return None
        status = path.stat()
        if np.frombuffer(os.pread(self._states, 8, number * _ROW), np.int64) != status.st_mtime_ns:
            if RawFile.of(path.parent, path.name).sha256 != file.sha256:
                log.warning("%s is damaged and is downloaded again", path)
                remove(path)
                return None
            self._write_state(number, status.st_mtime_ns)
        return file_identity(status)

    def _download(self, number: int, stop: threading.Event | None) -> FileIdentity | None:
        file, path = self._files[number], self._entry.content / self._files[number].name
        start = time.monotonic()
        while not self._reserve(number):
            if stop is not None:
                return None
            waited = time.monotonic() - start
            if waited > _ROOM_SECONDS:
                raise self._no_room(number)
            if waited > _YIELD_SECONDS and self._reserve_instead(number):
                break
            time.sleep(_PAUSE)
        with tqdm(disable=True) as bar:
            while True:
                try:
                    download_file(self._storage, file, path, file.partial(self._parts), bar, stop)
                    break
                except DiskFullError:
                    if not self._free(file.bytes, ahead=stop is not None):
                        raise
        if not file.is_in(self._entry.content):  # stopped
            return None
        with self._mutex:
            self.fetched_bytes += file.bytes
        status = path.stat()
        self._write_state(number, status.st_mtime_ns)
        return file_identity(status)

    def _reserve(self, number: int) -> bool:
        """Evict files until there is room for one more. Returns False if running processes need too many of them."""
        with self._exclusive():
            times = self._read_states()[:, 0]
            if times[number] == _ABSENT:
                over = int(self._sizes[times != _ABSENT].sum()) + self.size(number) - self.room
                if over > 0 and self._evict(over) < over:
                    return False
                self._write_state(number, _RESERVED)
            return True

    def _reserve_instead(self, number: int) -> bool:
        """Reserve room for a file, if need be that of files which the iterators of this process keep."""
        with self._mutex:  # no other thread takes the room meanwhile
            while self._yield_latest():
                if self._reserve(number):
                    return True
        return False

    def _free(self, count: int, ahead: bool) -> bool:
        """Delete files of at least `count` bytes from a full disk. Returns False if there are too few.

        A step (`ahead` is false) takes the room of files that the iterators of this process keep, if need be.
        """
        with self._mutex:
            with self._exclusive():
                freed = self._evict(count)
            while freed < count and not ahead and self._yield_latest():
                with self._exclusive():
                    freed += self._evict(count - freed)
        return freed >= count

    def _yield_latest(self) -> bool:
        """Allow the kept file whose first step is the latest to be evicted. Returns False if no kept file is idle.

        Files that are read or fetched at this moment stay.
        """
        with self.changed:
            present = self._read_states()[:, 0] != _ABSENT
            idle = [
                number
                for number, count in self._kept.items()
                if present[number] and self._claims[number].count == count
            ]
            if not idle:
                return False
            users = {number: [each for each in self._prefetchers if number in each.claimed] for number in idle}
            latest = max(idle, key=lambda number: min(each.distance(number) for each in users[number]))
            for prefetcher in users[latest]:
                prefetcher.release(latest)
            return True

    def _no_room(self, number: int) -> UserError:
        with self._mutex:
            present = self._read_states()[:, 0] != _ABSENT
            own = int(self._sizes[[other for other in self._claims if present[other]]].sum())
        others = int(self._sizes[present].sum()) - own
        limit = max(cache_limit() or 0, cache_used(), self.room)
        return UserError(
            found=f"no room for {self._storage.show(self._files[number].name)} in {format_size(self.room)} of the "
            f"cache: this process reads {format_size(own)}, and other processes need {format_size(others)}",
            expected="a cache that holds what the processes of this host need at the same time",
            hint=f"export {SIZE_VARIABLE}={format_size(limit + self.room)}, or run fewer processes at a time",
        )

    def _evict(self, count: int) -> int:
        """Delete files that no process needs until at least `count` bytes are freed. Returns the bytes freed."""
        times, order = self._read_states().T
        freed = 0
        for number in np.argsort(order, kind="stable").tolist():
            if freed >= count:
                break
            if times[number] == _ABSENT or number in self._claims or not _lock(self._locks, 2 + 2 * number):
                continue
            file = self._files[number]
            remove(self._entry.content / file.name)
            remove(file.partial(self._parts))
            self._write_state(number, _ABSENT)
            self._unlock(2 + 2 * number)
            freed += file.bytes
        return freed

    def _read_states(self) -> NDArray[np.int64]:
        """Return modification time and order of eviction of each file, int64 [files, 2]."""
        return np.frombuffer(os.pread(self._states, len(self._files) * _ROW, 0), np.int64).reshape(-1, 2)

    def _write_state(self, number: int, modified: int | None = None, order: int | None = None) -> None:
        for column, value in enumerate((modified, order)):
            if value is not None:
                os.pwrite(self._states, np.int64(value).tobytes(), number * _ROW + column * 8)

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Exclude other threads and processes: an eviction must not interleave with a claim."""
        with self._mutex:
            _lock(self._locks, 0, wait=True)
            try:
                yield
            finally:
                self._unlock(0)

    @contextlib.contextmanager
    def _fetched_by_this_process(self, number: int, stop: threading.Event | None) -> Iterator[bool]:
        """Wait until no other process fetches a file, and prevent others from fetching it during the block.

        Yields False if `stop` is set before that.
        """
        # Polled: the kernel reports a deadlock (EDEADLK) if threads of two processes wait for each other's files.
        while not _lock(self._locks, 1 + 2 * number):
            time.sleep(_PAUSE)
            if stop is not None and stop.is_set():
                yield False
                return
        try:
            yield True
        finally:
            self._unlock(1 + 2 * number)

    def _unlock(self, byte: int) -> None:
        with contextlib.suppress(OSError):
            fcntl.lockf(self._locks, fcntl.LOCK_UN, 1, byte)


def _lock(descriptor: int, byte: int, exclusive: bool = True, wait: bool = False) -> bool:
    """Lock a byte of the open file `.locks` for this process. Returns False if another process holds it."""
    try:
        how = (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | (0 if wait else fcntl.LOCK_NB)
        fcntl.lockf(descriptor, how, 1, byte)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        if error.errno not in NO_LOCKS:
            raise
    return True


class _Prefetcher:
    """Threads that fetch the files of an iterator in the order of their first use.

    Args:
        files: The files. Their lock protects the attributes.
        uses: Number, first step and last step of each file.

    Attributes:
        claimed: The first and the last step of each file that is kept for this iterator.
    """

    def __init__(self, files: OnDemandFiles, uses: Iterator[tuple[int, int, int]]) -> None:
        self._files = files
        self._uses = uses
        self.claimed: dict[int, tuple[int, int]] = {}
        self._ends: list[tuple[int, int]] = []  # heap of the last step and number of each file, with outdated entries
        self._ahead: list[tuple[int, int]] = []  # heap of the first step and number of each file, likewise
        self._later: set[int] = set()  # the files of later steps
        self._bytes = self._later_bytes = 0
        self._step = 0
        self._process = os.getpid()
        self._taking = threading.Lock()
        self._stop = threading.Event()
        # Daemons: a process that ends does not wait for a server.
        self._threads = [threading.Thread(target=self._run, name="fetch", daemon=True) for _ in range(_THREADS)]

    @property
    def _is_inherited(self) -> bool:
        """Whether this process was forked meanwhile: it has neither the threads nor the claims."""
        return os.getpid() != self._process

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def advance(self, step: int) -> None:
        if self._is_inherited:
            return
        with self._files.changed:
            self._step = step
            while self._ahead and self._ahead[0][0] <= step:
                self._reach(heapq.heappop(self._ahead)[1])
            while self._ends and self._ends[0][0] < step:
                last, number = heapq.heappop(self._ends)
                if number in self.claimed and self.claimed[number][1] == last:
                    self.release(number, passed=True)
            self._files.changed.notify_all()

    def release(self, number: int, passed: bool = False) -> None:
        """Do not keep a file any more."""
        del self.claimed[number]
        self._reach(number)
        self._bytes -= self._files.size(number)
        self._files.drop(number, passed)

    def _reach(self, number: int) -> None:
        if number in self._later:
            self._later.remove(number)
            self._later_bytes -= self._files.size(number)

    def distance(self, number: int) -> int:
        """Return the first step of a kept file minus the current step."""
        return self.claimed[number][0] - self._step

    def close(self) -> None:
        """End the threads, and release all files."""
        if self._is_inherited:
            return
        self._stop.set()
        with self._files.changed:
            self._files.changed.notify_all()
        for thread in self._threads:
            thread.join()
        with self._files.changed:
            for number, (_, last) in list(self.claimed.items()):
                self.release(number, passed=last <= self._step)

    def _run(self) -> None:
        while (number := self._take()) is not None:
            pause = 0.0
            while not self._stop.wait(pause):
                with self._files.changed:
                    if number not in self.claimed:  # the step that needed it has fetched it, or its room was needed
                        break
                    self._files.claim(number)
                try:
                    if self._files.fetch(number, self._stop) is not None:
                        break
                    pause = _PAUSE
                except UserError as error:
                    log.debug("not fetched ahead: %s", error)
                    pause = _RETRY_PAUSE
                finally:
                    self._files.release(number)

    def _take(self) -> int | None:
        """Keep the next file when there is room for it; returns its number, None at the end."""
        with self._taking:
            for number, first, last in self._uses:
                with self._files.changed:
                    while not (self._stop.is_set() or last < self._step or self._has_room(number, first)):
                        self._files.changed.wait()
                    if self._stop.is_set():
                        return None
                    if last < self._step:  # its steps have read it meanwhile
                        continue
                    if number not in self.claimed:
                        self._keep(number, first, last)
                    begin, end = self.claimed[number]
                    self.claimed[number] = (begin, max(end, last))
                    heapq.heappush(self._ends, (self.claimed[number][1], number))
                    return number
            return None

    def _keep(self, number: int, first: int, last: int) -> None:
        size = self._files.size(number)
        self._files.keep(number)
        self.claimed[number] = (first, last)
        self._bytes += size
        if first > self._step:
            self._later.add(number)
            self._later_bytes += size
            heapq.heappush(self._ahead, (first, number))

    def _has_room(self, number: int, first: int) -> bool:
        if number in self.claimed:
            return True
        # Fetching further ahead would evict files that an earlier epoch has left in the cache.
        later_bytes = self._later_bytes + self._files.size(number)
        is_near = first <= self._step or later_bytes <= self._files.part // _LEAD
        return is_near and self._files.has_room_ahead(number, self._bytes)


def on_demand_files(directory: Path) -> OnDemandFiles | None:
    """Return the files of a directory, or of the directory above it, that are read on demand; None if they are not."""
    return _open.get(directory) or _open.get(directory.parent)


def register_on_demand(entry: Entry, storage: RemoteStorage, files: Sequence[RemoteFile], room: int) -> None:
    """Register files of a cache entry for `on_demand_files`, until this process ends."""
    known = _open.get(entry.content)
    if known is None:
        _open[entry.content] = OnDemandFiles(entry, storage, files, room)
    else:
        known.room = room


def select_on_demand(files: Sequence[RemoteFile]) -> list[RemoteFile]:
    """Return the files of a data set of version 3 that are not needed to open it: all but its arrays."""
    return [file for file in files if fcntl and not file.name.endswith((".npy", "zarr.json"))]


def is_read_on_demand(entry: Entry) -> bool:
    """Whether a process evicts files of a cache entry while others may need them."""
    if entry.content in _open:
        return True
    try:
        descriptor = os.open(entry.directory / ".locks", os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        return not _lock(descriptor, _LAST_BYTE)
    finally:
        os.close(descriptor)


def min_room(files: Sequence[RemoteFile]) -> int:
    """Return the least bytes of cache with which the processes of this host can read files on demand."""
    return 4 * _ranks() * max(file.bytes for file in files)


def _ranks() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _start_child() -> None:
    for files in _open.values():
        files._start_process()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_child)
