"""Files of a packed split: each stays the one that was opened first, and only some are open at a time."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import itertools
import mmap
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shards.atomic import FileIdentity, file_identity, replaced_error
from shards.cli import USER_ERROR_STATUS
from shards.errors import CorruptError, UserError, as_user_error, corrupt_shard
from shards.manifest import Manifest
from shards.remote.cache import mark_unchecked
from shards.remote.on_demand import on_demand_files

_MAX_OPEN_FILES = 64  # files of a split
_CHUNK = 1 << 20  # bytes hashed at a time
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)
_FLAGS = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)  # does not wait for a pipe
_MAP_FIXED = 0x10  # not in the module mmap; the same on Linux, macOS and BSD
_libc = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None


def max_open_files() -> int:
    """Return how many files of a split may be open: a small part of what the process may open (`ulimit -n`)."""
    try:
        import resource  # not available on Windows
    except ImportError:
        return _MAX_OPEN_FILES
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MAX_OPEN_FILES if soft == resource.RLIM_INFINITY else max(1, min(_MAX_OPEN_FILES, soft // 16))


class OpenFile:
    """A file that several threads, and processes forked later, may read. It is closed when nobody refers to it."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: str) -> OpenFile:
        """Open a file; raise OSError if that fails."""
        return cls(os.open(path, _FLAGS))

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # at exit the module `os` may be gone
        close(self.descriptor)

    def read(self, offset: int, size: int) -> bytes:
        """Read up to `size` bytes at a byte offset."""
        if hasattr(os, "pread"):
            return os.pread(self.descriptor, size, offset)
        with self._lock:  # Windows
            os.lseek(self.descriptor, offset, os.SEEK_SET)
            return os.read(self.descriptor, size)

    def read_into(self, offset: int, out: NDArray[np.uint8]) -> int:
        """Read bytes at an offset into a contiguous buffer. Returns their number."""
        if hasattr(os, "preadv"):
            return os.preadv(self.descriptor, [out.data], offset)
        content = self.read(offset, out.nbytes)
        out.reshape(-1)[: len(content)] = np.frombuffer(content, np.uint8)
        return len(content)


class ForkLock:
    """A lock that is free in a forked process, even if another thread held it during the fork."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        _fork_locks.add(self)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *exception: object) -> None:
        self._lock.release()

    def start_process(self) -> None:
        """Replace the lock in a forked process."""
        self._lock = threading.Lock()


_fork_locks: weakref.WeakSet[ForkLock] = weakref.WeakSet()


def _start_child() -> None:
    for lock in list(_fork_locks):
        lock.start_process()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_child)


class SplitFiles:
    """The files of a split, by their names in the manifest.

    A path may name another file later: a data set is replaced, a cache entry is fetched again, a file is truncated or
    overwritten. Every read makes sure that the file is the one that was opened first.

    Args:
        directory: The directory of the split.
        manifest: Its manifest, which tells the size and the SHA-256 of each file.
    """

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory = directory
        self._absolute = str(directory.absolute())  # files are opened later, perhaps in another working directory
        self._entries = {file.name: file for file in manifest.everything}
        self._identities: dict[str, FileIdentity] = {}
        self._mapped: list[tuple[str, str, FileIdentity]] = []  # path, name, identity
        self._in_turn: Iterator[tuple[str, str, FileIdentity]] = iter(())  # cycles through the mapped files
        self.on_demand = on_demand_files(directory)
        """Fetches files when they are opened; None if all files are in the directory."""
        # A file that stays open would occupy the disk after it was evicted.
        self._open = OpenFile.open if self.on_demand else lru_cache(max_open_files())(OpenFile.open)

    @contextmanager
    def open(self, name: str) -> Iterator[OpenFile]:
        """Open a file to read in the block.

        Raises:
            CorruptError: If it is missing, cannot be read, or does not have the size of the manifest.
            MismatchError: If it is not the file that was opened first, or was changed since.
            UserError: If it is fetched on demand, and that fails.
        """
        with nullcontext() if self.on_demand is None else self.on_demand.held(self.path(name)) as identity:
            if identity is not None:  # a file that was evicted and fetched again has another one
                self._identities[name] = identity
            try:
                file = self._open(self.path(name))
                self._check(name, os.fstat(file.descriptor))
                yield file
            except OSError as error:
                if name in self._identities and error.errno in _GONE:
                    raise replaced_error(self.path(name)) from None
                raise corrupt_shard(self.path(name), error.strerror or str(error)) from None
            except CorruptError:
                self._check(name, os.fstat(file.descriptor))  # the error may be due to a change
                mark_unchecked(Path(self.path(name)))  # a remote data set is downloaded again
                raise
            self._check(name, os.fstat(file.descriptor))

    def size(self, name: str) -> int:
        """Return the size in bytes of a file of the manifest."""
        return self._entries[name].bytes

    def check_present(self, names: Iterable[str]) -> None:
        """Raise as `open` does unless each file has the size of the manifest. A file replaced later is refused.

        For stores that open files only when they need them. Files fetched on demand are checked on arrival.
        """
        for name in names if self.on_demand is None else ():
            try:
                self._check(name, os.stat(self.path(name)))
            except OSError as error:
                raise corrupt_shard(self.path(name), error.strerror or str(error)) from None

    def path(self, name: str) -> str:
        """Return the path of a file."""
        return f"{self._absolute}{os.sep}{name}"

    def _check(self, name: str, status: os.stat_result) -> None:
        """Record the identity of a file that is new, and compare it otherwise."""
        found = file_identity(status)
        known = self._identities.get(name)
        if known is None:
            entry = self._entries.get(name)  # version 1 does not list the indices
            if entry is not None and entry.bytes != status.st_size:
                reason = f"{status.st_size:,} bytes, the manifest says {entry.bytes:,}"
                raise corrupt_shard(self.path(name), reason)
            known = self._identities.setdefault(name, found)
        if known != found:
            raise replaced_error(self.path(name))

    def read_all(self, name: str) -> bytes:
        """Return the content of a small file; raise as `open` does, or CorruptError if its SHA-256 differs."""
        with self.open(name) as file:
            content = file.read(0, os.fstat(file.descriptor).st_size)
            entry = self._entries.get(name)
            if entry is not None and hashlib.sha256(content).hexdigest() != entry.sha256:
                raise corrupt_shard(self.path(name), "it was changed (SHA-256 differs)")
            return content

    def check_sha256(self, name: str) -> None:
        """Compare the SHA-256 of a file with the manifest, in little memory; raise as `read_all` does."""
        digest = hashlib.sha256()
        with self.open(name) as file:
            size = os.fstat(file.descriptor).st_size
            for start in range(0, size, _CHUNK):
                digest.update(file.read(start, min(_CHUNK, size - start)))
            if digest.hexdigest() != self._entries[name].sha256:
                raise corrupt_shard(self.path(name), "it was changed (SHA-256 differs)")

    def map(self, names: Sequence[str]) -> tuple[mmap.mmap | bytearray, NDArray[np.int64]]:
        """Map files into one piece of memory, one after the other, without keeping them open.

        A Python `mmap` would keep a descriptor for each.

        Returns:
            The memory, read-only, and the byte at which each file begins, int64 [files].

        Raises:
            UserError: As `open` does, and if the system does not map the files.
        """
        sizes = [self._entries[name].bytes for name in names]
        pages = [-(-size // mmap.PAGESIZE) * mmap.PAGESIZE for size in sizes]
        *starts, total = itertools.accumulate(pages, initial=0)
        if _libc is None:  # Windows cannot map a file at a given address: it is read
            memory = bytearray(total)
            for name, start, size in zip(names, starts, sizes, strict=True):
                with self.open(name) as file:
                    file.read_into(0, np.frombuffer(memory, np.uint8)[start : start + size])
            return memory, np.array(starts)
        region = mmap.mmap(-1, total, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, mmap.PROT_READ)
        address = np.frombuffer(region, np.uint8).ctypes.data
        for name, start, size in zip(names, starts, sizes, strict=True):
            with self.open(name) as file:
                # Private: FUSE with direct_io has no shared maps. Pages that are only read are shared in either case.
                arguments = (size, mmap.PROT_READ, mmap.MAP_PRIVATE | _MAP_FIXED, file.descriptor)
                if _mmap(_libc)(address + start, *arguments, 0) != address + start:
                    raise _no_map(self.path(name), ctypes.get_errno())
            report_bus_errors(self.path(name), size)
        self._mapped += [(self.path(name), name, self._identities[name]) for name in names]
        self._in_turn = itertools.cycle(self._mapped)
        return region, np.array(starts)

    def check_mapped(self) -> None:
        """Check that a mapped file was not changed, another one at each call.

        A map keeps the file that it maps. If the path names another file, or none, that file is unchanged.
        """
        for path, name, (device, inode, *_) in itertools.islice(self._in_turn, 1):
            try:
                status = os.stat(path)
            except OSError:
                return
            if status.st_ino == inode and status.st_dev == device:
                self._check(name, status)


def read_ahead(memory: mmap.mmap | bytearray, start: int, size: int) -> None:
    """Let the system read bytes of a map (`SplitFiles.map`) from disk at once, where it supports that.

    Page faults read them page by page. For a block of 400 KB that is not in the page cache, this takes about six times
    the CPU time.
    """
    if isinstance(memory, mmap.mmap) and hasattr(mmap, "MADV_WILLNEED"):
        before = start % mmap.PAGESIZE
        memory.madvise(mmap.MADV_WILLNEED, start - before, before + size)


def _no_map(path: str, number: int) -> UserError:
    error = OSError(number, os.strerror(number))
    if number != errno.ENODEV:
        return as_user_error(error, path)
    return UserError(
        found=f"{path} on a file system that does not map files into memory ({error.strerror})",
        expected="a data set on a file system with memory maps",
        hint="copy the data set to a disk of this machine, and read the copy",
    )


def _mmap(libc: ctypes.CDLL) -> Callable[..., int]:
    numbers = (ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64)
    return ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, *numbers, use_errno=True)(("mmap", libc))


_sizes: dict[str, int] = {}
"""Bytes of each file that was mapped, by its path."""


def _describe_bus_error() -> UserError:
    for path, size in _sizes.items():
        if os.path.exists(path) and os.path.getsize(path) < size:
            return replaced_error(path)
    return UserError(
        found="a memory-mapped file that cannot be read (SIGBUS)",
        expected="files on a disk without errors that stay as they are while they are read",
        hint="check the disk (dmesg) and the space in /dev/shm (df -h), then python -m shards.verify DIR",
    )


def _end_with_message(number: int) -> None:
    try:
        os.write(2, f"{_describe_bus_error()}\n".encode())
    finally:
        os._exit(USER_ERROR_STATUS)


_handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(_end_with_message)


def report_bus_errors(path: str, size: int) -> None:
    """End the process with a message instead of SIGBUS, which the access to a truncated map raises.

    A handler of the module `signal` would never run: Python calls it after the access, which never ends.

    Args:
        path: The file that was mapped.
        size: Its bytes.
    """
    _sizes[path] = size
    if _libc is not None:
        _libc.signal(signal.SIGBUS, _handler)
