"""A disk that is full: from the n-th write, flush or rename below a directory on, every one fails."""

from __future__ import annotations

import builtins
import errno
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock


class FullDisk:
    """Counts the operations below a directory, and fails those from number `first` on."""

    def __init__(self, root: Path, first: int, code: int = errno.ENOSPC) -> None:
        self.count = 0
        self._root = os.path.realpath(root)
        self._first = first
        self._code = code

    def use(self, path: Any) -> None:
        """Count an operation on a path or descriptor, and raise if the disk is full."""
        real = os.path.realpath(f"/proc/self/fd/{path}" if isinstance(path, int) else path)
        if real.startswith(f"{self._root}{os.sep}"):
            self.count += 1
            if self.count > self._first:
                # The system names the path of a call that has one.
                raise OSError(self._code, os.strerror(self._code), *([] if isinstance(path, int) else [path]))


class _Raw(io.FileIO):
    """An unbuffered file on a full disk."""

    def __init__(self, disk: FullDisk, path: Any, mode: str) -> None:
        super().__init__(path, mode)
        self._disk = disk

    def write(self, content: Any) -> int:
        self._disk.use(self.fileno())
        return super().write(content)


@contextmanager
def full_disk(root: Path, first: int, code: int = errno.ENOSPC) -> Iterator[FullDisk]:
    """Let what Python code writes below `root` fail from operation `first` on, of which the first has number 0."""
    disk = FullDisk(root, first, code)
    plain_open, os_mkdir = io.open, os.mkdir

    def opened(file: Any, mode: str = "r", buffering: int = -1, *rest: Any, **options: Any) -> Any:
        if isinstance(file, int) or not set(mode) & set("wax"):
            return plain_open(file, mode, buffering, *rest, **options)
        raw = _Raw(disk, file, mode.replace("b", "").replace("t", ""))
        if buffering == 0:
            return raw
        binary = io.BufferedWriter(raw, 1 << 16)
        if "b" in mode:
            return binary
        return io.TextIOWrapper(binary, *rest, **options, line_buffering=buffering == 1)

    def counted(function: Callable[..., Any], position: int) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if function is not os_mkdir or not os.path.isdir(arguments[position]):  # an existing one needs no space
                disk.use(arguments[position])
            return function(*arguments, **options)

        return call

    with (
        mock.patch.object(builtins, "open", opened),
        mock.patch.object(io, "open", opened),
        mock.patch.object(os, "fsync", counted(os.fsync, 0)),
        mock.patch.object(os, "replace", counted(os.replace, 1)),
        mock.patch.object(os, "rename", counted(os.rename, 1)),
        mock.patch.object(os, "symlink", counted(os.symlink, 1)),
        mock.patch.object(os, "mkdir", counted(os.mkdir, 0)),
        mock.patch.object(os, "sendfile", counted(os.sendfile, 0)),
    ):
        yield disk
