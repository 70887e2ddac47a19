"""Which picture belongs to which part and class: by directories or by CSV tables."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from pipeline.readers.archives.file_trees import FileTree, inner_name
from pipeline.readers.archives.files import CorruptFileError
from pipeline.readers.formats.csv import CsvTable, read_csv
from pipeline.readers.formats.image import EXTENSIONS, OTHER_EXTENSIONS
from pipeline.readers.naming import TRAIN, in_split_order, natural_order, printable, some_of, split_named
from shards.errors import UserError

LAYOUTS = "a directory for each class, those perhaps in train/, test/ and val/, or train.csv, test.csv or labels.csv"
_PATH_COLUMNS = ("path", "file", "filename", "image")
_LABEL_COLUMNS = ("label", "class", "target")
_MOST_TOPS = 8  # directories in each other that are passed over
_LONE_TABLE = "labels"  # holds one part, where train.csv and test.csv hold one each


@dataclass
class Listing:
    """The pictures of a part: names in the tree, and the class of each. tables: the CSV files that told, by name."""

    names: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)


def find_pictures(tree: FileTree, image_column: str = "", label_column: str = "") -> dict[str, Listing]:
    """The pictures of each part of a tree, a part `train` always among them.

    A directory that holds all the others, as archives have it, is passed over. Where a CSV table `train` (with `test`,
    `val`) or `labels` lies at the top, the tables count; else the directories. Raises `UserError` for anything unclear.
    """
    telling = [name for name in tree.names if extension(name) in EXTENSIONS or _table_part(PurePosixPath(name).name)]
    top = _top(telling)
    tables = _tables(telling, top)
    if tables:
        return _by_tables(tree, top, tables, image_column, label_column)
    if image_column or label_column:
        raise UserError(
            found=f"{tree.place}, without a CSV table",
            expected=f"train.csv (with test.csv, val.csv) or {_LONE_TABLE}.csv, to look for the columns in",
            hint="leave --image-column and --label-column out, where directories tell the classes",
        )
    return _by_directories(tree, top)


def extension(name: str) -> str:
    return PurePosixPath(name).suffix.lower()[1:]


def read_table(tree: FileTree, name: str) -> CsvTable:
    """A CSV file of a tree; raises `UserError`."""
    place = tree.place_of(name)
    try:
        return read_csv(tree.read(name), place)
    except CorruptFileError as error:
        raise UserError(found=f"{place}: {error}", expected="a CSV table", hint="get the file again") from None


def locate(table: CsvTable, paths: Iterable[str], known: frozenset[str], directories: Iterable[str]) -> list[str]:
    """The names in a tree that paths of a table mean, each looked for in these directories (`""`, `a/`) in turn.

    Raises `UserError` for those that lead outside, are not there or come twice.
    """
    seen: dict[str, int] = {}
    for row, path in enumerate(paths):
        inner = inner_name(path)
        if inner is None:
            raise _wrong_path(table, row, f"the path {printable(path)!r}, which leads out of the directory")
        name = next((directory + inner for directory in directories if directory + inner in known), None)
        if name is None:
            raise _wrong_path(table, row, f"the path {printable(path)!r}, where no picture is")
        if name in seen:
            raise _wrong_path(table, row, f"{printable(path)!r} again, after line {table.lines[seen[name]]}")
        seen[name] = row
    return list(seen)


def _wrong_path(table: CsvTable, row: int, what: str) -> UserError:
    return UserError(
        found=f"{table.place_of(row)}: {what}",
        expected="paths of pictures (PNG, JPEG, WebP, BMP, GIF) from the directory of the table, each once",
        hint="mend that line",
    )


def _top(names: list[str]) -> str:
    """The directory that holds everything, `a/` or `a/b/`, if there is one above the parts and classes; else ``."""
    top = ""
    for _ in range(_MOST_TOPS):
        inner = {name[len(top) :].partition("/")[::2] for name in names}
        directory = next(iter(inner))[0] if inner else ""
        alone = all(first == directory and rest for first, rest in inner)
        # Below what is passed over there must be something that can tell classes apart.
        if not alone or not inner or split_named(directory) or not _is_told_below(rest for _, rest in inner):
            break
        top += f"{directory}/"
    return top


def _is_told_below(names: Iterable[str]) -> bool:
    return any("/" in name or _table_part(name) for name in names)


def _table_part(name: str) -> str | None:
    """The part that a CSV file of this name lists; `train` for a lone table."""
    stem = PurePosixPath(name).stem
    if extension(name) != "csv":
        return None
    return TRAIN if stem.lower() == _LONE_TABLE else split_named(stem)


def _tables(names: list[str], top: str) -> dict[str, str]:
    """The CSV files at the top, by part."""
    tables: dict[str, str] = {}
    for name in names:
        part = _table_part(name[len(top) :]) if name.startswith(top) and "/" not in name[len(top) :] else None
        if part and part in tables:
            raise _unclear(f"two tables of the {part} part, {printable(tables[part])} and {printable(name)}", "one")
        if part:
            tables[part] = name
    return tables


def _by_tables(
    tree: FileTree, top: str, tables: dict[str, str], image_column: str, label_column: str
) -> dict[str, Listing]:
    if TRAIN not in tables:
        raise _unclear(f"{some_of(list(tables.values()))} without a train.csv in {tree.place}", "a table for training")
    known = frozenset(name for name in tree.names if extension(name) in EXTENSIONS)
    parts: dict[str, Listing] = {}
    part_of: dict[str, str] = {}
    for part in in_split_order(tables):
        table_name = tables[part]
        table = read_table(tree, table_name)
        paths = table.column([image_column] if image_column else _PATH_COLUMNS, "paths", "--image-column")
        labels = table.column([label_column] if label_column else _LABEL_COLUMNS, "labels", "--label-column")
        for row, label in enumerate(labels):
            if not label:
                raise _wrong_path(table, row, f"no label for {printable(paths[row])!r}")
        # Pictures of train.csv often lie in train/.
        names = locate(table, paths, known, (top, f"{top}{PurePosixPath(table_name).stem}/"))
        for row, name in enumerate(names):
            if (other := part_of.setdefault(name, part)) != part:
                raise _wrong_path(table, row, f"{printable(paths[row])!r}, which {tables[other]} lists as well")
        parts[part] = Listing(names, labels, [table_name])
    return parts


def _by_directories(tree: FileTree, top: str) -> dict[str, Listing]:
    names = [name for name in tree.names if extension(name) in EXTENSIONS]
    if others := [name for name in tree.names if extension(name) in OTHER_EXTENSIONS]:
        raise UserError(
            found=f"{len(others):,} pictures of a kind that is not read: {some_of(others)}",
            expected="PNG, JPEG, WebP, BMP or GIF",
            hint="convert them, for instance with: mogrify -format png FILES",
        )
    if not names:
        kinds = natural_order({f".{extension(name)}" if extension(name) else printable(name) for name in tree.names})
        found = f"{len(tree.names):,} files ({some_of(kinds)})" if tree.names else "nothing"
        raise _unclear(f"no picture in {tree.place}, but {found}", "PNG, JPEG, WebP, BMP or GIF files")
    firsts = natural_order({name[len(top) :].partition("/")[0] for name in names})
    in_parts = [first for first in firsts if split_named(first)]
    if any(split_named(first) == TRAIN for first in in_parts) and _hold_directories(names, top, in_parts):
        if in_parts != firsts:
            stray = [first for first in firsts if first not in in_parts]
            raise _unclear(f"{some_of(stray)} beside {some_of(in_parts)} in {tree.place}", "nothing but parts there")
        if len({split_named(first) for first in in_parts}) < len(in_parts):
            raise _unclear(f"{some_of(in_parts)} in {tree.place}", "one directory for each part")
        prefixes = {f"{top}{first}/": str(split_named(first)) for first in in_parts}
    else:
        prefixes = {top: TRAIN}
    parts: dict[str, Listing] = defaultdict(Listing)
    for name in names:
        prefix = next(prefix for prefix in prefixes if name.startswith(prefix))
        label, _, rest = name[len(prefix) :].partition("/")
        if not rest:
            raise _unclear(f"{tree.place_of(name)}, a picture outside any class", "every picture in that of its class")
        parts[prefixes[prefix]].names.append(name)
        parts[prefixes[prefix]].labels.append(label)
    return dict(parts)


def _hold_directories(names: list[str], top: str, firsts: list[str]) -> bool:
    """Whether there are directories in those: a class may well be called `train`."""
    prefixes = tuple(f"{top}{first}/" for first in firsts)
    return any(name.startswith(prefixes) and name[len(top) :].count("/") > 1 for name in names)


def _unclear(found: str, expected: str) -> UserError:
    return UserError(found=found, expected=f"{expected}: {LAYOUTS}", hint="arrange the files so, or name another --raw")
