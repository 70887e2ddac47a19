"""The description of a data set that can be packed."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.readers.download import Download
from pipeline.readers.raw_split import RawSplit, SourceOptions


@dataclass(frozen=True)
class DatasetSource:
    """A data set that can be packed.

    Attributes:
        name: Its name on the command line.
        description: One line for `--help`.
        plan: Returns a line that describes what would be read or downloaded.
        load: Reads (downloads) and checks the splits: train and test, and val if any; or train alone, if the files
            have no splits.
        variants: The values of `--split`, the default first; empty if there is nothing to choose.
        raw_files: Whether it reads files from a directory (`--raw`).
        options: The fields of `SourceOptions` that it uses besides `raw` and `variant`.
        raw_file: Whether `--raw` may also name an archive.
        generic: Whether it reads any files of a format. Then `--raw`, a directory or file, is required and names the
            packed set.
        address: Returns the address of the files of a data set, from its name on the command line and its variant, any
            text. Then no `--raw` is required.
        has_test: False if the data set has no test split; `--test-fraction` is then required.
    """

    name: str
    description: str
    plan: Callable[[SourceOptions], str]
    load: Callable[[SourceOptions], tuple[RawSplit, ...]]
    variants: tuple[str, ...] = ()
    raw_files: bool = True
    options: tuple[str, ...] = ()
    raw_file: bool = False
    generic: bool = False
    address: Callable[[str, str], str] | None = None
    has_test: bool = True


@functools.cache
def published(name: str) -> dict[str, Any]:
    """Return the names, sizes and hashes of the files of a data set, and more of it, in `published.json`."""
    return json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))[name]


def published_archive(name: str) -> Download:
    """Return the archive of a data set that is published as one file."""
    fields = published(name)
    return Download(**fields | {"mirrors": tuple(fields.get("mirrors", ()))})
