"""What a data set has to tell so that it can be packed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pipeline.readers.raw_split import RawSplit, SourceOptions


@dataclass(frozen=True)
class DatasetSource:
    """A data set that can be packed.

    Attributes:
        name: As on the command line.
        plan: Returns a line that says what would be read or downloaded.
        load: Reads (downloads) and checks the splits: train and test, perhaps val; or `train` alone, where the files
            have no splits.
        splits: The names that `--split` accepts, the default first; empty if there is nothing to choose.
        raw_files: Whether it reads files from a directory (`--raw`).
        options: The further fields of `SourceOptions` that it uses.
        raw_file: Whether `--raw` may name an archive as well.
        generic: Whether it reads anyone's files, so that `--raw`, a directory or file, is required and names the set.
    """

    name: str
    description: str
    plan: Callable[[SourceOptions], str]
    load: Callable[[SourceOptions], tuple[RawSplit, ...]]
    splits: tuple[str, ...] = ()
    raw_files: bool = True
    options: tuple[str, ...] = ()
    raw_file: bool = False
    generic: bool = False
