"""The output of packing: a local directory, which appears complete by a rename, or a remote address."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeAlias

from pipeline.common.process_group import ProcessGroup
from pipeline.packing.journal import Journal
from shards.atomic import Replacement, replace_directory, staging_directory
from shards.errors import UserError
from shards.manifest import REQUIRED_SPLITS, SPLITS, Manifest, has_split, is_packed_dataset
from shards.remote.datasets import (
    check_upload,
    is_remote,
    remote_manifests,
    remove_manifests,
    resolve_dataset,
    upload_files,
    upload_manifests,
)


class LocalOutput:
    """A directory. All ranks write into one staging directory beside it, so they must share a file system."""

    is_shared = True
    """Whether all ranks write into one directory."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self._replacement: Replacement | None = None

    def manifests(self) -> tuple[Manifest, ...]:
        """Return the manifests of the complete pack in the directory, empty if there is none.

        Raises:
            UserError: If the directory holds something else, which is never replaced.
        """
        out = self._out
        if is_packed_dataset(out):
            return tuple(Manifest.read(out / split) for split in SPLITS if has_split(out, split))
        if not out.exists() or (out.is_dir() and not any(out.iterdir())):
            return ()
        raise UserError(
            found=f"{out}, which exists and is not a complete pack",
            expected="a new or empty directory, or a complete pack",
            hint="choose another --out, or remove it if nothing in it is needed",
        )

    def needs_recovery(self) -> bool:
        """Return whether a killed writer left files that the next pack removes."""
        return staging_directory(self._out).exists()

    @contextmanager
    def staging(self, group: ProcessGroup) -> Iterator[tuple[Path, Journal]]:
        """Yield the directory into which this rank writes its files, and the journal of what is complete there.

        Without `complete` they are removed, unless a later call can continue with them.
        """
        with ExitStack() as stack:
            self._replacement = replacement = group.run_on_main(
                lambda: stack.enter_context(replace_directory(self._out, resume=True))
            )
            group.barrier_run(lambda: _check_shared(replacement.path))
            journal = Journal(replacement)
            try:
                yield replacement.path, journal
            except BaseException:
                if group.is_main_process:
                    journal.keep(staging_directory(self._out))
                raise

    def complete(self, group: ProcessGroup, directory: Path, manifests: tuple[Manifest, ...]) -> None:
        """Replace the output by the files of all ranks; manifests are written last."""

        def commit() -> None:
            assert self._replacement is not None
            _write_manifests(directory, manifests)
            self._replacement.commit()

        group.run_on_main(commit)


class RemoteOutput:
    """An address that fsspec supports, such as s3://bucket/name. Every rank uploads its own files.

    The methods are those of `LocalOutput`.
    """

    is_shared = False

    def __init__(self, address: str) -> None:
        self._address = address

    def manifests(self) -> tuple[Manifest, ...]:
        manifests = remote_manifests(self._address)
        is_complete = set(REQUIRED_SPLITS) <= set(manifests)
        return tuple(manifests[split] for split in SPLITS if split in manifests) if is_complete else ()

    def needs_recovery(self) -> bool:
        return False  # a set without manifests is no pack, and its files are overwritten

    @contextmanager
    def staging(self, group: ProcessGroup) -> Iterator[tuple[Path, Journal]]:
        group.run_on_main(lambda: check_upload(self._address))  # before hours of packing
        with tempfile.TemporaryDirectory(prefix="inkstream-pack-") as directory:
            yield Path(directory), Journal(None)

    def complete(self, group: ProcessGroup, directory: Path, manifests: tuple[Manifest, ...]) -> None:
        def finish() -> None:
            _write_manifests(directory, manifests)
            upload_manifests(directory, self._address)

        group.run_on_main(lambda: remove_manifests(self._address))
        group.barrier_run(lambda: upload_files(directory, self._address))
        group.run_on_main(finish)


OutputLocation: TypeAlias = LocalOutput | RemoteOutput


def open_output(out: Path | str) -> OutputLocation:
    """Return the output at a directory or address."""
    return RemoteOutput(str(out)) if is_remote(out) else LocalOutput(resolve_dataset(out))


def _write_manifests(directory: Path, manifests: tuple[Manifest, ...]) -> None:
    for manifest in manifests:
        manifest.write(directory / manifest.split)


def _check_shared(path: Path) -> None:
    if not path.is_dir():
        raise UserError(
            found=f"no such directory: {path}, which rank 0 has created",
            expected="an --out on a file system that all ranks share",
            hint="use a shared directory, or a remote address: --out s3://bucket/name",
        )
