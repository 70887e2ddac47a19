"""The journal of a pack in preparation: its complete shards, with which a later call continues.

It is stored beside the prepared directory until that is renamed into place. `pack.json` identifies the pack. Each
attempt to pack a split has a directory with a file per complete shard, written after the shard is on disk. A later call
compares a shard with its checksums before it uses it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.common.process_group import ProcessGroup
from shards.atomic import Replacement, read_json, sync_directory, write_file, write_json
from shards.cli import plural
from shards.errors import quote
from shards.manifest import RawFile, Shard
from shards.stores.base import WrittenShard
from shards.stores.sample_arrays import BLOCK_DTYPE, numbers_crc32

_PACK = "pack.json"
_UNREADABLE = "unreadable.json"
_PACKAGES = ("pipeline", "shards")


class Journal:
    """The journal of a data set.

    Args:
        replacement: The prepared directory; None if nothing is continued.
    """

    def __init__(self, replacement: Replacement | None) -> None:
        self._replacement = replacement
        self._adds = False

    def start(self, group: ProcessGroup, identity: Mapping[str, Any] | None) -> None:
        """Start a pack, or continue the one that is described here. Every rank calls it.

        Args:
            group: The ranks.
            identity: What determines the bytes of the pack; None if it is not known, so that it cannot be continued.
        """
        self._adds = self._replacement is not None and identity is not None
        group.run_on_main(lambda: self._open(json.dumps(identity, sort_keys=True)))

    def _open(self, identity: str) -> None:
        if self._replacement is None:
            return
        path = self._replacement.journal / _PACK
        if not (self._adds and path.is_file() and path.read_text(encoding="utf-8") == identity):
            self._replacement.clear()
            write_file(path, identity)
        elif shards := self._complete_shards():
            print(f"continuing with {plural(shards, 'complete shard')} of a stopped call", file=sys.stderr)

    def discard(self) -> None:
        """Remove what is complete, so that the next call starts from the beginning."""
        if self._replacement is not None:
            self._replacement.clear()

    def keep(self, staging: Path) -> None:
        """Keep what is complete for the next call, and print how to remove it. Called on rank 0 at an exception."""
        if self._replacement is not None and (shards := self._complete_shards()):
            self._replacement.keep = True
            print(
                f"{plural(shards, 'complete shard')} kept in {staging}: the same command continues with them; "
                f"to remove them: rm -r {quote(staging)}",
                file=sys.stderr,
            )

    def attempt(self, split: Path, samples: int) -> SplitJournal:
        """Return the journal of an attempt to pack a split with a number of samples."""
        if self._replacement is None or not self._adds:
            return SplitJournal(split, None)
        return SplitJournal(split, self._replacement.journal / f"{split.name}-{samples}")

    def _complete_shards(self) -> int:
        assert self._replacement is not None
        return sum(1 for path in self._replacement.journal.glob("*/*.json") if path.name != _UNREADABLE)


class SplitJournal:
    """The journal of an attempt to pack a split: of all its images, or of those that are readable.

    Args:
        split: The directory of the split.
        directory: That of the journal; None if nothing is continued.
    """

    def __init__(self, split: Path, directory: Path | None) -> None:
        self._split = split
        self._directory = directory

    @property
    def is_new(self) -> bool:
        """Whether no earlier call has started this attempt."""
        return self._directory is None or not self._directory.is_dir()

    def start(self) -> None:
        """Start the attempt: its files are the only ones in the directory of the split."""
        if self._directory is not None:
            self._directory.mkdir(exist_ok=True)
            sync_directory(self._directory.parent)

    def add(self, number: int, written: WrittenShard) -> None:
        """Add a shard that is complete on disk."""
        shard, files, blocks, pixel_sums = written
        self._write(
            f"{number:05d}.json",
            {
                "shard": shard.model_dump(),
                "files": [file.model_dump() for file in files],
                "blocks": blocks.tolist(),
                "pixel_sums": None if pixel_sums is None else pixel_sums.tolist(),
            },
        )

    def find(self, number: int, labels: NDArray[np.int64], rows: NDArray[np.int64], size: int) -> WrittenShard | None:
        """Return a complete shard; None unless its files have their checksums, and its samples these numbers.

        Args:
            number: The number of the shard.
            labels: The labels of its samples, int64 [n].
            rows: Their rows, int64 [n].
            size: The samples of a block.
        """
        fields = self._read(f"{number:05d}.json")
        if not fields:
            return None
        shard, files = Shard(**fields["shard"]), tuple(RawFile(**file) for file in fields["files"])
        blocks = np.array([tuple(block) for block in fields["blocks"]], BLOCK_DTYPE)
        starts = range(0, len(labels), size)
        numbers = [numbers_crc32(labels[start : start + size], rows[start : start + size]) for start in starts]
        expected: list[Shard | RawFile] = [shard, *files]
        try:
            found = [RawFile.of(self._split, file.name) for file in expected]
        except OSError:
            return None
        same = [file.sha256 for file in found] == [file.sha256 for file in expected]
        if not same or numbers != blocks["numbers_crc32"].tolist():
            return None
        sums = fields["pixel_sums"]
        return WrittenShard(shard, files, blocks, None if sums is None else np.array(sums))

    def add_unreadable(self, reasons: Mapping[int, str]) -> None:
        """Add the result of an attempt that has found unreadable images."""
        self._write(_UNREADABLE, {"reasons": list(reasons.items())})

    def find_unreadable(self) -> dict[int, str] | None:
        """Return the unreadable images that an earlier call has found; None if it has not read all images."""
        fields = self._read(_UNREADABLE)
        return dict(fields["reasons"]) if fields else None

    def _write(self, name: str, fields: dict[str, Any]) -> None:
        if self._directory is not None:
            write_json(self._directory / name, fields)

    def _read(self, name: str) -> dict[str, Any]:
        """The fields of a file, empty if it is missing or was damaged by a failure of the machine."""
        return {} if self._directory is None else read_json(self._directory / name)


@functools.cache
def code_digest() -> str:
    """Return a SHA-256 (hex) of the code that packs."""
    digest = hashlib.sha256()
    for package in _PACKAGES:
        root = Path(sys.modules[package].__file__ or "").parent
        for path in sorted(root.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()
