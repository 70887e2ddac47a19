"""Where a pack goes: a local directory, which appears whole by a rename, or a remote place."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

from pipeline.packing.ranks import ProcessGroup
from shards.atomic import Replacement, replace_directory, staging_directory
from shards.errors import UserError
from shards.manifest import REQUIRED_SPLITS, SPLITS, Manifest, has_split, is_packed_dataset
from shards.remote.sets import (
    check_upload,
    is_remote,
    remote_manifests,
    remove_manifests,
    resolve_dataset,
    upload_files,
    upload_manifests,
)


class OutputLocation(Protocol):
    """A place for a packed set."""

    def manifests(self) -> tuple[Manifest, ...]:
        """Those of the complete pack that stands there, none if there is none.

        Raises `UserError` if something else stands there, which is never replaced.
        """
        ...

    def needs_recovery(self) -> bool:
        """Whether a killed writer left something behind that the next pack has to clean up."""
        ...

    def staging(self, group: ProcessGroup) -> AbstractContextManager[Path]:
        """The directory in which this rank writes its files; nothing of it stays."""
        ...

    def complete(self, group: ProcessGroup, directory: Path, manifests: tuple[Manifest, ...]) -> None:
        """Let what all ranks have written take the place of what stood there, manifests last."""
        ...


def open_output(out: Path | str) -> OutputLocation:
    return RemoteOutput(str(out)) if is_remote(out) else LocalOutput(resolve_dataset(out))


class LocalOutput:
    """A directory. All ranks write into one staging directory beside it, so they have to share a file system."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self._replacement: Replacement | None = None

    def manifests(self) -> tuple[Manifest, ...]:
        out = self._out
        if is_packed_dataset(out):
            return tuple(Manifest.read(out / part) for part in SPLITS if has_split(out, part))
        if not out.exists() or (out.is_dir() and not any(out.iterdir())):
            return ()
        raise UserError(
            found=f"{out}, which exists and is not a complete pack",
            expected="a new or empty directory, or a complete pack",
            hint="choose another --out, or remove it if nothing in it is needed",
        )

    def needs_recovery(self) -> bool:
        return staging_directory(self._out).exists()

    @contextmanager
    def staging(self, group: ProcessGroup) -> Iterator[Path]:
        with ExitStack() as stack:
            self._replacement = group.rank0(lambda: stack.enter_context(replace_directory(self._out)))
            path = self._replacement.path
            group.barrier_run(lambda: _check_shared(path))
            yield path

    def complete(self, group: ProcessGroup, directory: Path, manifests: tuple[Manifest, ...]) -> None:
        def commit() -> None:
            assert self._replacement is not None
            _write_manifests(directory, manifests)
            self._replacement.commit()

        group.rank0(commit)


class RemoteOutput:
    """An address that fsspec knows, such as s3://bucket/name. Every rank uploads what it has packed."""

    def __init__(self, address: str) -> None:
        self._address = address

    def manifests(self) -> tuple[Manifest, ...]:
        found = remote_manifests(self._address)
        return tuple(found[part] for part in SPLITS if part in found) if set(REQUIRED_SPLITS) <= set(found) else ()

    def needs_recovery(self) -> bool:
        return False  # without manifests it is no pack, and files are overwritten

    @contextmanager
    def staging(self, group: ProcessGroup) -> Iterator[Path]:
        group.rank0(lambda: check_upload(self._address))  # now, not after hours of packing
        with tempfile.TemporaryDirectory(prefix="inkstream-pack-") as directory:
            yield Path(directory)

    def complete(self, group: ProcessGroup, directory: Path, manifests: tuple[Manifest, ...]) -> None:
        def finish() -> None:
            _write_manifests(directory, manifests)
            upload_manifests(directory, self._address)

        group.rank0(lambda: remove_manifests(self._address))
        group.barrier_run(lambda: upload_files(directory, self._address))
        group.rank0(finish)


def _write_manifests(directory: Path, manifests: tuple[Manifest, ...]) -> None:
    for manifest in manifests:
        manifest.write(directory / manifest.split)


def _check_shared(path: Path) -> None:
    if not path.is_dir():
        raise UserError(
            found=f"no such directory: {path}, which rank 0 has made",
            expected="an --out on a file system that all ranks share",
            hint="name a shared directory, or a remote place: --out s3://bucket/name",
        )
