"""NumtaDB: Bengali handwritten digits of several collections (Alam et al. 2018, https://arxiv.org/abs/1806.02452).

Published at https://www.kaggle.com/BengaliAI/numta, behind a login: download it there and name its directory, or the
zip, with --raw. A collection consists of a table, `training-a.csv`, and a directory of images, `training-a`. The
variants name the collections for training and testing: `abc-d` trains on a, b and c, and tests on d.

The images have many sizes; without --size they are stored at 48x48. The columns hold the `path` of each image, its
collection (`set`) and its original `database` (for instance for --stratify).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

from pipeline.datasets.base import DatasetSource
from pipeline.readers.archives.file_trees import FileTree
from pipeline.readers.image_splits import IMAGE_OPTIONS, image_splits, open_tree_of_images, split_of_tree
from pipeline.readers.layout import locate, read_table
from pipeline.readers.naming import number_labels
from pipeline.readers.raw_split import RawSplit, SourceOptions
from shards.errors import UserError
from shards.manifest import REQUIRED_SPLITS

_SIZE = (48, 48)
_DIGITS = frozenset("0123456789")
_PAGE = "https://www.kaggle.com/BengaliAI/numta"


def _load(options: SourceOptions) -> tuple[RawSplit, ...]:
    if not options.raw.exists():
        raise _missing(f"no such file or directory: {options.raw}")
    tree = open_tree_of_images(options)
    tables: dict[str, list[str]] = defaultdict(list)
    digits: dict[str, list[str]] = defaultdict(list)
    columns: dict[str, dict[str, list[str]]] = {split: defaultdict(list) for split in REQUIRED_SPLITS}
    for split, letters in zip(REQUIRED_SPLITS, options.variant.split("-"), strict=True):
        for letter in letters:
            tables[split].append(_find_table(tree, letter))
            names, digits_of_table, databases = _read(tree, tables[split][-1], letter)
            digits[split] += digits_of_table
            columns[split]["path"] += names
            columns[split]["database"] += databases
            columns[split]["set"] += [letter] * len(names)
    classes, labels = number_labels(digits, tree.path)
    splits = [
        split_of_tree(tree, split, labels[split], columns[split]["path"], tables[split], columns[split])
        for split in REQUIRED_SPLITS
    ]
    size = options.size or (None if options.encoded else _SIZE)
    return image_splits(splits, classes, replace(options, size=size))


def _find_table(tree: FileTree, letter: str) -> str:
    for name in tree.names:
        if name.rpartition("/")[2] == f"training-{letter}.csv":
            return name
    raise _missing(f"no training-{letter}.csv in {tree.path}")


def _read(tree: FileTree, table_name: str, letter: str) -> tuple[list[str], list[str], list[str]]:
    """The names, digits and original databases of the images of a table."""
    table = read_table(tree, table_name)
    digits = table.column(["digit"], "labels")
    for row, digit in enumerate(digits):
        if digit not in _DIGITS:
            raise UserError(
                found=f"{table.line(row)}: digit {digit!r}", expected="digits 0 .. 9", hint="use the file as published"
            )
    folder = table_name.removesuffix(".csv")
    # Some tools unpack the directory into another of the same name.
    folders = (f"{folder}/", f"{folder}/training-{letter}/")
    names = locate(tree, table, table.column(["filename"], "file names"), folders)
    return names, digits, table.column(["database name original"], "databases")


def _missing(found: str) -> UserError:
    return UserError(
        found=found,
        expected="the tables and directories of images of NumtaDB, as published",
        hint=f"download them from {_PAGE} and name the directory or zip with --raw",
    )


SOURCES = (
    DatasetSource(
        name="numtadb",
        description="NumtaDB, Bengali handwritten digits, stored at 48x48 unless --size is given",
        variants=("abc-d", "abc-e", "abce-d"),
        plan=lambda options: f"read the sets {' and '.join(options.variant.split('-'))} in {options.raw}",
        load=_load,
        options=IMAGE_OPTIONS,
        raw_file=True,
    ),
)
