"""The description of a data set that can be packed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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
