"""NumtaDB: Bengali handwritten digits from several collections (Alam et al. 2018, https://arxiv.org/abs/1806.02452).

Published at https://www.kaggle.com/BengaliAI/numta, behind a login: download it there and name its directory,
or the zip as it comes, with --raw. Of a set there is a table, `training-a.csv`, and a directory of pictures,
`training-a`. The splits name the sets to train and to test on: `abc-d` trains on a, b and c, and tests on d.

The pictures have many sizes; without --size they are stored at 48x48. The columns keep, for each picture, its `path`,
its `set` and the original `database` (for instance to stratify by).
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from pipeline.datasets.base import DatasetSource
from pipeline.readers.archives.file_trees import FileTree
from pipeline.readers.formats.image import EXTENSIONS
from pipeline.readers.image_splits import IMAGE_OPTIONS, image_splits, open_tree_of_images, split_of_tree
from pipeline.readers.layout import extension, locate, read_table
from pipeline.readers.naming import number_labels
from pipeline.readers.raw_split import RawSplit, SourceOptions
from shards.errors import UserError
from shards.manifest import REQUIRED_SPLITS

_SIZE = (48, 48)
_DIGITS = frozenset("0123456789")
_PAGE = "https://www.kaggle.com/BengaliAI/numta"


def _plan(options: SourceOptions) -> str:
    return f"read the sets {' and '.join(options.split.split('-'))} in {options.raw}"


def _load(options: SourceOptions) -> tuple[RawSplit, ...]:
    if not options.raw.exists():
        raise _absent(f"no {options.raw}")
    tree = open_tree_of_images(options.raw)
    listings = {
        part: [_read_set(tree, letter) for letter in letters]
        for part, letters in zip(REQUIRED_SPLITS, options.split.split("-"), strict=True)
    }
    classes, labels = number_labels(
        {part: [digit for one in sets for digit in one.digits] for part, sets in listings.items()}, tree.place
    )
    pictures = [
        split_of_tree(
            tree,
            part,
            labels[part],
            names=[name for one in sets for name in one.names],
            tables=[one.table for one in sets],
            columns={
                "database": [database for one in sets for database in one.databases],
                "set": [one.letter for one in sets for _ in one.names],
            },
        )
        for part, sets in listings.items()
    ]
    size = options.size or (None if options.encoded else _SIZE)
    return image_splits(pictures, classes, replace(options, size=size))


class _Set(NamedTuple):
    """A set of NumtaDB: its table, and name, digit and original database of each picture."""

    letter: str
    table: str
    names: list[str]
    digits: list[str]
    databases: list[str]


def _read_set(tree: FileTree, letter: str) -> _Set:
    table_name = next((name for name in tree.names if name.rpartition("/")[2] == f"training-{letter}.csv"), None)
    if table_name is None:
        raise _absent(f"no training-{letter}.csv in {tree.place}")
    table = read_table(tree, table_name)
    digits = table.column(["digit"], "labels")
    if wrong := [row for row, digit in enumerate(digits) if digit not in _DIGITS]:
        raise UserError(
            found=f"{table.place_of(wrong[0])}: digit {digits[wrong[0]]!r}",
            expected="digits 0 .. 9",
            hint="use the file as published",
        )
    folder = table_name.removesuffix(".csv")
    known = frozenset(name for name in tree.names if extension(name) in EXTENSIONS)
    # Unpacked by some tools, the directory comes twice, one in the other.
    folders = (f"{folder}/", f"{folder}/training-{letter}/")
    names = locate(table, table.column(["filename"], "file names"), known, folders)
    return _Set(letter, table_name, names, digits, table.column(["database name original"], "databases"))


def _absent(found: str) -> UserError:
    return UserError(
        found=found,
        expected="the tables and directories of pictures of NumtaDB, as published",
        hint=f"download them from {_PAGE} and name the directory or zip with --raw",
    )


SOURCES = (
    DatasetSource(
        name="numtadb",
        description="NumtaDB, Bengali handwritten digits, stored at 48x48 unless --size says otherwise",
        splits=("abc-d", "abc-e", "abce-d"),
        plan=_plan,
        load=_load,
        options=IMAGE_OPTIONS,
        raw_file=True,
    ),
)
