"""Detect the split and class of each image, from directories or from CSV tables."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from pipeline.readers.archives.file_trees import FileTree, inner_name
from pipeline.readers.archives.files import corrupt_as_user_error
from pipeline.readers.formats.csv import CsvTable, read_csv
from pipeline.readers.formats.image import EXTENSIONS, KINDS, OTHER_EXTENSIONS
from pipeline.readers.naming import TRAIN, in_split_order, natural_order, printable, some_of, split_named
from shards.errors import UserError

LAYOUTS = "one directory per class, inside train/, test/ and val/ if any, or train.csv, test.csv or labels.csv"
_PATH_COLUMNS = ("path", "file", "filename", "image")
_LABEL_COLUMNS = ("label", "class", "target")
_MAX_WRAPPERS = 8  # nested directories that are skipped
_LONE_TABLE = "labels"  # holds all images, where train.csv and test.csv hold one split each


@dataclass
class Listing:
    """The images of a split.

    Attributes:
        names: Their names in the tree.
        labels: The class name of each.
        tables: The names of the CSV files that list them.
    """

    names: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)


def find_images(tree: FileTree, image_column: str = "", label_column: str = "") -> dict[str, Listing]:
    """Return the images of each split of a tree; `train` is one of the splits.

    A directory that contains everything else, as in many archives, is skipped. The tables count if a CSV file `train`
    (with `test`, `val`) or `labels` is at the top; otherwise the directories count.

    Args:
        tree: The directory or archive.
        image_column: The column of paths in a table; empty to detect it.
        label_column: The column of labels in a table; empty to detect it.

    Raises:
        UserError: If the layout is not clear.
    """
    relevant = [name for name in tree.names if is_image(name) or _split_of_table(PurePosixPath(name).name)]
    top = _skip_wrappers(relevant)
    tables: dict[str, str] = {}
    for name in relevant:
        inner = name.removeprefix(top)
        if name.startswith(top) and "/" not in inner and (split := _split_of_table(inner)):
            if split in tables:
                both = f"{printable(tables[split])} and {printable(name)}"
                raise _unclear(f"two tables of the {split} split, {both}", "one table")
            tables[split] = name
    if tables:
        return _by_tables(tree, top, tables, image_column, label_column)
    if image_column or label_column:
        raise UserError(
            found=f"{tree.path}, without a CSV table",
            expected=f"train.csv (with test.csv, val.csv) or {_LONE_TABLE}.csv with these columns",
            hint="omit --image-column and --label-column if there is one directory per class",
        )
    return _by_directories(tree, top)


def _extension(name: str) -> str:
    return PurePosixPath(name).suffix.lower()[1:]


def is_image(name: str) -> bool:
    """Return whether a file has the extension of a supported image format."""
    return _extension(name) in EXTENSIONS


def read_table(tree: FileTree, name: str) -> CsvTable:
    """Read a CSV file of a tree; raises `UserError`."""
    path = tree.path_of(name)
    with corrupt_as_user_error(
        path,
        expected="a CSV file in UTF-8: a line of column names, then one line per image",
        hint="save the table again as CSV (UTF-8)",
    ):
        return read_csv(tree.read(name), path)


def locate(tree: FileTree, table: CsvTable, paths: Iterable[str], directories: Iterable[str]) -> list[str]:
    """Return the names in a tree of the paths in a table.

    Args:
        tree: The directory or archive.
        table: The table, for messages.
        paths: One path per row.
        directories: The directories (`""`, `a/`) in which a path is looked up, in this order.

    Raises:
        UserError: If a path points outside, is not an image, or occurs twice.
    """
    images = frozenset(filter(is_image, tree.names))
    seen: dict[str, int] = {}
    for row, path in enumerate(paths):
        inner = inner_name(path)
        if inner is None:
            raise _wrong_row(table, row, f"the path {printable(path)!r}, which leads out of the directory")
        name = next((directory + inner for directory in directories if directory + inner in images), None)
        if name is None:
            raise _wrong_row(table, row, f"the path {printable(path)!r}, where no image is")
        if name in seen:
            raise _wrong_row(table, row, f"{printable(path)!r} again, after line {table.lines[seen[name]]}")
        seen[name] = row
    return list(seen)


def _wrong_row(table: CsvTable, row: int, what: str) -> UserError:
    return UserError(
        found=f"{table.line(row)}: {what}",
        expected=f"a label and the path of a {KINDS} image, relative to the directory of the table, each path once",
        hint="fix that line",
    )


def _skip_wrappers(names: list[str]) -> str:
    """The directory, `a/` or `a/b/`, that contains all splits and classes; empty if there is none above them."""
    top = ""
    for _ in range(_MAX_WRAPPERS):
        firsts, rests = (
            zip(*(name[len(top) :].partition("/")[::2] for name in names), strict=True) if names else ((), ())
        )
        if len(set(firsts)) != 1 or not all(rests) or split_named(firsts[0]):
            break
        # Something below must distinguish the classes: directories or a table.
        if not any("/" in rest or _split_of_table(rest) for rest in rests):
            break
        top += f"{firsts[0]}/"
    return top


def _split_of_table(name: str) -> str | None:
    """The split that a CSV file of this name lists; `train` for a lone table."""
    stem = PurePosixPath(name).stem
    if _extension(name) != "csv":
        return None
    return TRAIN if stem.lower() == _LONE_TABLE else split_named(stem)


def _by_tables(
    tree: FileTree, top: str, tables: dict[str, str], image_column: str, label_column: str
) -> dict[str, Listing]:
    if TRAIN not in tables:
        raise _unclear(f"{some_of(list(tables.values()))} without a train.csv in {tree.path}", "a table for training")
    listings: dict[str, Listing] = {}
    split_of: dict[str, str] = {}
    for split in in_split_order(tables):
        table = read_table(tree, tables[split])
        paths = table.column([image_column] if image_column else _PATH_COLUMNS, "paths", "--image-column")
        labels = table.column([label_column] if label_column else _LABEL_COLUMNS, "labels", "--label-column")
        # Images of train.csv often are in train/.
        names = locate(tree, table, paths, (top, f"{top}{PurePosixPath(tables[split]).stem}/"))
        for row, (name, label) in enumerate(zip(names, labels, strict=True)):
            if not label:
                raise _wrong_row(table, row, f"no label for {printable(paths[row])!r}")
            if (other := split_of.setdefault(name, split)) != split:
                raise _wrong_row(table, row, f"{printable(paths[row])!r}, which {tables[other]} lists as well")
        listings[split] = Listing(names, labels, [tables[split]])
    return listings


def _by_directories(tree: FileTree, top: str) -> dict[str, Listing]:
    names = list(filter(is_image, tree.names))
    if others := [name for name in tree.names if _extension(name) in OTHER_EXTENSIONS]:
        raise UserError(
            found=f"{len(others):,} image{'s' if len(others) > 1 else ''} of an unsupported format: {some_of(others)}",
            expected=KINDS,
            hint="convert them, for instance with: mogrify -format png FILES",
        )
    if not names:
        kinds = natural_order({f".{_extension(name)}" if _extension(name) else printable(name) for name in tree.names})
        content = f"no image in {tree.path}, only {len(tree.names):,} files ({some_of(kinds)})"
        raise _unclear(content if kinds else f"{tree.path}, which is empty", f"{KINDS} files")
    firsts = natural_order({name[len(top) :].partition("/")[0] for name in names})
    split_of = {first: split for first in firsts if (split := split_named(first))}
    prefixes = {top: TRAIN}
    if TRAIN in split_of.values() and _hold_directories(names, top, split_of):
        if len(split_of) < len(firsts):
            stray = [first for first in firsts if first not in split_of]
            raise _unclear(f"{some_of(stray)} beside {some_of(list(split_of))} in {tree.path}", "only splits there")
        if len(set(split_of.values())) < len(split_of):
            raise _unclear(f"{some_of(list(split_of))} in {tree.path}", "one directory per split")
        prefixes = {f"{top}{first}/": split for first, split in split_of.items()}
    listings: dict[str, Listing] = defaultdict(Listing)
    for name in names:
        prefix = next(prefix for prefix in prefixes if name.startswith(prefix))
        label, _, rest = name[len(prefix) :].partition("/")
        if not rest:
            raise _unclear(f"{tree.path_of(name)}, an image outside any class", "every image in a class directory")
        listings[prefixes[prefix]].names.append(name)
        listings[prefixes[prefix]].labels.append(label)
    return dict(listings)


def _hold_directories(names: list[str], top: str, firsts: Iterable[str]) -> bool:
    """Whether there are directories in these directories: a class may be named `train`."""
    prefixes = tuple(f"{top}{first}/" for first in firsts)
    return any(name.startswith(prefixes) and name[len(top) :].count("/") > 1 for name in names)


def _unclear(found: str, expected: str) -> UserError:
    return UserError(found=found, expected=f"{expected}: {LAYOUTS}", hint="arrange the files so, or name another --raw")
