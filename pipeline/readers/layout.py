"""Detect the split and class of each image, from directories or from CSV tables."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import PurePosixPath

import numpy as np

from pipeline.readers.archives.file_trees import FileTree, inner_name
from pipeline.readers.archives.files import CorruptFileError, corrupt_as_user_error
from pipeline.readers.formats.csv import CsvTable, read_csv
from pipeline.readers.formats.image import EXTENSIONS, KINDS, OTHER_EXTENSIONS, is_image_file
from pipeline.readers.naming import SPLIT_COLUMN, TRAIN, composed, in_split_order, natural_order, some_of, warn
from shards.cli import plural
from shards.errors import UserError, printable, quote
from shards.manifest import split_named, splits_in

LAYOUTS = "one directory per class, inside train/, test/ and val/ if any, or a CSV table of images and labels"
PATH_COLUMNS = (
    "path",
    "file",
    "filename",
    "file_name",
    "filepath",
    "image",
    "image_path",
    "image_name",
    "image_id",
    "id",
)
LABEL_COLUMNS = ("label", "class", "target", "category")
_RESERVED = ("row", "path")  # names of columns of a pack
_TEXTS = frozenset({"csv", "tsv", "txt", "md", "json", "xml", "html", "yaml", "yml", "log", "npy", "zip", "tar", "gz"})
_MAX_SNIFFED = 1000  # files without the extension of an image whose content is looked at
_MAX_ROWS = 5  # named in a message
_SAMPLED_ROWS = 1000  # of a table, evenly spaced, that decide which column names the images
_MAX_WRAPPERS = 8  # nested directories that are skipped
_LONE_TABLE = "labels"  # holds all images, where train.csv and test.csv hold one split each


@dataclass
class Listing:
    """The images of a split.

    Attributes:
        names: Their names in the tree.
        labels: The class name of each.
        tables: The names of the CSV files that list them.
        columns: Further columns of the table.
    """

    names: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    columns: dict[str, list[str]] = field(default_factory=dict)


def find_images(
    tree: FileTree, image_column: str = "", label_column: str = "", skip_bad: bool = False
) -> dict[str, Listing]:
    """Return the images of each split of a tree; `train` is one of the splits.

    A directory that contains everything else, as in many archives, is skipped. A CSV table of any name counts if it is
    at the top, or at the top of the directory of a split, and has a column of images and one of labels. Without such a
    table the directories count. A table beside class directories is ignored if it may describe the classes: its paths
    have no image extension, and it has fewer than half as many rows as there are images. If there are directories
    `train/CLASS`, it is ignored if it lists no image in `train`: it may hold predictions. Names such as `train.csv` and
    `labels.csv`, or the options, make it a table of images.

    Args:
        tree: The directory or archive.
        image_column: The column of paths in a table; empty to detect it.
        label_column: The column of labels in a table; empty to detect it.
        skip_bad: Whether rows, files and directories that cannot be used are skipped with a warning.

    Raises:
        UserError: If the layout is not clear.
    """
    relevant = [name for name in tree.names if is_image(name) or _is_table(name)]
    top = _skip_wrappers(relevant)
    index = _ImageIndex(tree)
    candidates: list[tuple[bool, str, str]] = []  # whether the name says nothing, the split, the name
    unused: list[str] = []
    for name in filter(_is_table, relevant if index.images else ()):
        *directories, file = name.removeprefix(top).split("/")
        stem = PurePosixPath(file).stem
        splits = {split_named(directories[0])} if len(directories) == 1 else splits_in(stem)
        if not name.startswith(top) or len(directories) > 1 or None in splits:
            unused.append(name)
        else:
            split = next(iter(splits)) if len(splits) == 1 else None
            candidates.append((split is None and stem.lower() != _LONE_TABLE, split or TRAIN, name))
    tables: dict[str, _Labels] = {}
    for is_unnamed, split, name in sorted(candidates):
        if is_unnamed and tables:
            unused.append(name)
            continue
        if split in tables:
            both = f"{printable(tables[split].name)} and {printable(name)}"
            raise _unclear(f"two tables of the {split} split, {both}", "one table")
        try:
            labels = _read_labels(index, name, image_column, label_column)
            if is_unnamed and not (image_column or label_column) and _is_not_of_images(labels, index, top):
                unused.append(name)
            else:
                tables[split] = labels
        except UserError:
            if (split == TRAIN and not is_unnamed) or image_column or label_column:
                raise
            unused.append(name)
    if (image_column or label_column) and not tables:
        raise UserError(
            found=f"{tree.path}, without a CSV table",
            expected=f"train.csv (with test.csv, val.csv) or {_LONE_TABLE}.csv with these columns",
            hint="omit --image-column and --label-column if there is one directory per class",
        )
    listings = _by_tables(index, top, tables, skip_bad) if tables else _by_directories(tree, top, skip_bad)
    listed = {name for listing in listings.values() for name in listing.names}
    not_used = some_of(natural_order(unused))
    if unused and len(set(listings[TRAIN].labels)) < 2:
        only = printable(listings[TRAIN].labels[0])
        raise _unclear(
            f"{tree.path}: one class, {only!r}, and {not_used} without a column of image files and one of labels",
            "a table whose columns are named by --image-column and --label-column, or at least two classes",
        )
    if unused:
        warn(f"not used as tables of the images: {not_used}")
    if tables and (rest := [name for name in index.images.values() if name not in listed]):
        warn(f"not used: {len(rest):,} images that no table lists ({some_of(rest)})")
    return listings


@dataclass(frozen=True)
class _Labels:
    """A table of images and labels: its name in the tree and the columns of both."""

    name: str
    table: CsvTable
    image: str
    label: str


class _ImageIndex:
    """The images of a tree by their names, with and without directories and extensions."""

    def __init__(self, tree: FileTree) -> None:
        self.tree = tree
        absolute = tree.path.absolute()
        roots = (absolute, os.path.normpath(absolute), os.path.realpath(absolute))
        self._roots = [f"{root}/".replace("\\", "/") for root in roots]
        self.images = {composed(name): name for name in filter(is_image, tree.names)}
        self._by_base: dict[str, list[str]] = defaultdict(list)
        for name in self.images:
            base = name.rpartition("/")[2]
            self._by_base[base].append(name)
            self._by_base[base.rpartition(".")[0]].append(name)

    def find(self, path: str, directories: Iterable[str]) -> list[str]:
        """Return the images that a path of a table may mean, with or without extension: one if it is clear.

        Raises:
            ValueError: If the path leads out of the tree.
        """
        path = path.replace("\\", "/")  # Windows
        for root in self._roots:
            path = path.removeprefix(root)
        inner = inner_name(composed(path))
        if inner is None:
            raise ValueError(path)
        return [self.images[name] for name in self._find(inner, [composed(directory) for directory in directories])]

    def _find(self, inner: str, directories: Sequence[str]) -> list[str]:
        for directory in directories:
            if directory + inner in self.images:
                return [directory + inner]
        similar = {name: f"/{name}" for name in self._by_base.get(inner.rpartition("/")[2], [])}
        for directory in directories:
            if found := [name for name in similar if name.rpartition(".")[0] == directory + inner]:
                return found
        end = f"/{inner}"
        return [
            name for name, full in similar.items() if end in (full[-len(end) :], full.rpartition(".")[0][-len(end) :])
        ]


def _read_labels(index: _ImageIndex, name: str, image_column: str, label_column: str) -> _Labels:
    """Read a table and detect its columns; raises `UserError` if it has not both."""
    table = _with_header(index, read_table(index.tree, name), name)
    lower = [column.lower() for column in table.columns]
    found = [] if image_column else _find_image_column(index, table, name)
    table.column([image_column] if image_column else found or PATH_COLUMNS[:4], "paths", "--image-column")
    image = image_column.lower() or found[0]
    usual = [column for column in LABEL_COLUMNS if column in lower]
    rest = [column for column in lower if column not in (image, SPLIT_COLUMN)]
    usual = usual or (rest if len(rest) == 1 else [])
    table.column([label_column] if label_column else usual or LABEL_COLUMNS[:3], "labels", "--label-column")
    return _Labels(name, table, image, label_column.lower() or usual[0])


def _with_header(index: _ImageIndex, table: CsvTable, name: str) -> CsvTable:
    """Return the table.

    If its first line is a path and a label, that line becomes a row, and the columns are named `file` and `label`.
    """
    number = next((number for number, field in enumerate(table.columns) if is_image(field)), None)
    if number is None or not _find_or_none(index, table.columns[number], name):
        return table
    if len(table.columns) > 2:
        raise UserError(
            found=f"{table.path} line 1: the path of an image, {printable(table.columns[number])!r}",
            expected="a first line of column names",
            hint="insert one: a name per column, file for the paths and label for the labels",
        )
    return table.headed(("file", "label") if number == 0 else ("label", "file"))


def _find_image_column(index: _ImageIndex, table: CsvTable, name: str) -> list[str]:
    """Return the column, in lower case, that names the images; an empty list if there is none.

    A column of paths with an image extension is preferred to one of stems: row numbers may equal the stems of numbered
    files.
    """
    lower = [column.lower() for column in table.columns]
    rows = [table.rows[row] for row in np.linspace(0, len(table.rows) - 1, _SAMPLED_ROWS).astype(int).tolist()]
    rows = rows if len(rows) < len(table.rows) else table.rows
    kinds: dict[bool, dict[str, list[str | None]]] = {True: {}, False: {}}
    for number, column in enumerate(lower):
        found = [_find_or_none(index, row[number], name) for row in rows]
        # Most rows must name an image of their own: paths are distinct, labels repeat.
        if column not in LABEL_COLUMNS and 2 * len(set(found) - {None}) > len(rows):
            kinds[any(is_image(row[number]) for row in rows)][column] = found
    columns = kinds[True] or kinds[False]
    usual = [column for column in PATH_COLUMNS if column in lower]
    known = [column for column in usual if column in columns]
    if known and (kinds[True] or len(lower) == 2):
        return known[:1]
    if len({tuple(found) for found in columns.values()}) > 1:
        names = [table.columns[lower.index(column)] for column in columns]
        raise UserError(
            found=f"{table.path}, whose columns {some_of(names)} name different images",
            expected="one column of paths",
            hint=f"choose one: --image-column {quote(names[0])}",
        )
    return list(columns)[:1] or usual[:1]


def _find_or_none(index: _ImageIndex, path: str, name: str) -> str | None:
    """Return the image that a path in a table of this name means; None if there is none or it is not clear."""
    try:
        found = index.find(path, _directories_of(name))
    except ValueError:
        return None
    return found[0] if len(found) == 1 else None


def _is_not_of_images(labels: _Labels, index: _ImageIndex, top: str) -> bool:
    """Whether a table beside class directories probably describes the classes or holds predictions.

    `find_images` states the rules.
    """
    paths = labels.table.column([labels.image], "")
    images = list(index.images.values())
    trains = {name.removeprefix(top).partition("/")[0] for name in images}
    in_train = tuple(f"{top}{first}/" for first in trains if split_named(first) == TRAIN)
    if any(name.startswith(in_train) and name[len(top) :].count("/") > 1 for name in images):
        found = (_find_or_none(index, path, labels.name) for path in paths)
        return not any(name and name.startswith(in_train) for name in found)
    directories = {name.rpartition("/")[0] for name in images}
    in_directories = len(directories) > 1 and top.rstrip("/") not in directories
    return in_directories and 2 * len(paths) < len(images) and not any(map(is_image, paths))


def _directories_of(name: str) -> tuple[str, ...]:
    """The directories in which the paths of a table are looked up: its own, and those named after it and its split."""
    path = PurePosixPath(name)
    own = f"{path.parent}/" if path.parent.name else ""
    return (own, f"{own}{path.stem}/", *(f"{own}{split}/" for split in sorted(splits_in(path.stem))))


def _extension(name: str) -> str:
    return PurePosixPath(name).suffix.lower()[1:]


def _is_table(name: str) -> bool:
    return _extension(name) in ("csv", "tsv")


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
    images = {composed(name): name for name in filter(is_image, tree.names)}
    seen: dict[str, int] = {}
    problems: list[tuple[int, str]] = []
    for row, path in enumerate(paths):
        quoted, inner = repr(printable(path)), inner_name(composed(path))
        name = inner and next(
            (images[each] for directory in directories if (each := directory + inner) in images), None
        )
        if inner is None:
            problems.append((row, _unusable_path(path)))
        elif name is None:
            problems.append((row, f"the path {quoted}, where no image is"))
        elif name in seen:
            problems.append((row, f"{quoted} again, after line {table.lines[seen[name]]}"))
        else:
            seen[name] = row
    _report_rows(table, problems)
    return list(seen)


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
        if not any("/" in rest or _is_table(rest) for rest in rests):
            break
        top += f"{firsts[0]}/"
    return top


def _by_tables(index: _ImageIndex, top: str, tables: dict[str, _Labels], skip_bad: bool) -> dict[str, Listing]:
    if TRAIN not in tables:
        raise _unclear(f"{some_of(list(tables))} without a train.csv in {index.tree.path}", "a table for training")
    listings: dict[str, Listing] = {}
    line_of: dict[str, str] = {}
    for split in in_split_order(tables):
        labels, problems = tables[split], list[tuple[int, str]]()
        table = labels.table
        columns = {column: table.column([column], "") for column in table.columns}
        by_lower = {column.lower(): values for column, values in columns.items()}
        paths, classes = by_lower[labels.image], by_lower[labels.label]
        splits = by_lower.get(SPLIT_COLUMN, []) if len(tables) == 1 else []
        kept = [
            column
            for column in columns
            if column.lower() not in (labels.image, labels.label, SPLIT_COLUMN if splits else "", *_RESERVED)
        ]
        for row, (path, label) in enumerate(zip(paths, classes, strict=True)):
            quoted = repr(printable(path))
            try:
                found = index.find(path, (*_directories_of(labels.name), top))
            except ValueError:
                problems.append((row, _unusable_path(path)))
                continue
            of_row = split_named(splits[row]) if splits else split
            if not found:
                problems.append((row, f"the path {quoted}, where no image is"))
            elif len(found) > 1:
                problems.append((row, f"{quoted}, which may be {' or '.join(map(printable, found[:2]))}"))
            elif found[0] in line_of:
                problems.append((row, f"{quoted} again, after {line_of[found[0]]}"))
            elif not label:
                problems.append((row, f"no label for {quoted}"))
            elif of_row is None:
                problems.append((row, f"the split {printable(splits[row])!r}, not train, test or val"))
            else:
                line_of[found[0]] = table.line(row)
                listing = listings.setdefault(of_row, Listing(tables=[labels.name]))
                listing.names.append(found[0])
                listing.labels.append(label)
                for column in kept:
                    listing.columns.setdefault(printable(column), []).append(columns[column][row])
        _report_rows(table, problems, skip_bad)
    if TRAIN not in listings:
        raise _unclear(f"no row of the train split in {index.tree.path}", "rows for training")
    return listings


def _unusable_path(path: str) -> str:
    return f"the path {printable(path)!r}, which leads out of the directory" if path else "no path"


def _report_rows(table: CsvTable, problems: list[tuple[int, str]], skip_bad: bool | None = None) -> None:
    """Refuse rows that cannot be used, or warn that they are skipped; `skip_bad` is None if no row can be skipped."""
    if not problems:
        return
    lines = [f"{table.line(row)}: {what}" for row, what in problems[:_MAX_ROWS]]
    more = f"\n       and {len(problems) - _MAX_ROWS:,} more rows" if len(problems) > _MAX_ROWS else ""
    if not skip_bad:
        raise UserError(
            found="\n       ".join(lines) + more,
            expected=f"a label and the path of a {KINDS} image, relative to the directory of the table, each path once",
            hint="fix these lines" if skip_bad is None else "fix these lines, or skip them with --skip-bad",
        )
    warn(f"skipped {len(problems):,} rows of {table.path}: {lines[0]}")


def _by_directories(tree: FileTree, top: str, skip_bad: bool) -> dict[str, Listing]:
    names = list(filter(is_image, tree.names))
    others = [name for name in tree.names if _extension(name) in OTHER_EXTENSIONS]
    unnamed = (name for name in tree.names if not is_image(name) and _extension(name) not in OTHER_EXTENSIONS | _TEXTS)
    others += [name for name in islice(unnamed, _MAX_SNIFFED) if _holds_image(tree, name)]
    if others:
        found = f"{plural(len(others), 'image')} of an unsupported format or name: {some_of(others)} in {tree.path}"
        if not skip_bad:
            raise UserError(
                found=found,
                expected=f"{KINDS} files with the extension of their format",
                hint="convert them (mogrify -format png FILES), rename them, or skip them with --skip-bad",
            )
        warn(f"skipped {found}")
    if not names:
        kinds = natural_order({f".{_extension(name)}" if _extension(name) else printable(name) for name in tree.names})
        content = f"no image in {tree.path}, only {len(tree.names):,} files ({some_of(kinds)})"
        raise _unclear(content if kinds else f"{tree.path}, which is empty", f"{KINDS} files")
    firsts = natural_order({name[len(top) :].partition("/")[0] for name in names})
    split_of = {first: split for first in firsts if (split := split_named(first))}
    by_words = {first: splits.pop() for first in firsts if len(splits := splits_in(first)) == 1}
    if not split_of and len(set(by_words.values())) > 1:  # such as seg_train and seg_test
        split_of = by_words
    is_divided = _hold_directories(names, top, split_of)
    prefixes = {top: TRAIN}
    if TRAIN in split_of.values() and is_divided:
        if stray := [first for first in firsts if first not in split_of]:
            found = f"{some_of(stray)} beside {some_of(list(split_of))} in {tree.path}"
            if not skip_bad:
                raise _unclear(
                    found, "only train/, test/ and val/ there", "move them elsewhere, or skip them with --skip-bad"
                )
            warn(f"skipped: {found}")
        if len(set(split_of.values())) < len(split_of):
            raise _unclear(f"{some_of(list(split_of))} in {tree.path}", "one directory per split")
        prefixes = {_skip_repetition(names, f"{top}{first}/"): split for first, split in split_of.items()}
    elif len(by_words) == len(firsts) and {TRAIN} < set(by_words.values()):
        raise _unclear(f"no directories of classes in {some_of(firsts)} of {tree.path}", "the class of each image")
    listings: dict[str, Listing] = defaultdict(Listing)
    for name in names:
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
        if prefix is None:
            continue  # skipped
        label, _, rest = name[len(prefix) :].partition("/")
        if not rest:
            raise _unclear(f"{tree.path_of(name)}, an image outside any class", "every image in a class directory")
        listings[prefixes[prefix]].names.append(name)
        listings[prefixes[prefix]].labels.append(label)
    train = next(prefix for prefix, split in prefixes.items() if split == TRAIN)
    directories = {name[len(train) :].split("/")[0] for name in tree.directories if name.startswith(train)}
    if empty := natural_order(directories - {"", *split_of, *listings[TRAIN].labels}):
        found = f"no image in {some_of([f'{tree.path}/{train}{name}' for name in empty])}"
        if not skip_bad:
            raise UserError(
                found=found,
                expected="images in the directory of each class",
                hint="remove the directory, or skip it with --skip-bad",
            )
        warn(f"skipped: {found}")
    return dict(listings)


def _skip_repetition(names: list[str], prefix: str) -> str:
    """Return `train/train/` if `train/` holds nothing else, as in some archives; otherwise `train/`."""
    repeated = f"{prefix}{prefix.split('/')[-2]}/"
    return repeated if all(name.startswith(repeated) for name in names if name.startswith(prefix)) else prefix


def _holds_image(tree: FileTree, name: str) -> bool:
    try:
        return is_image_file(tree.read(name))
    except CorruptFileError:
        return False


def _hold_directories(names: list[str], top: str, firsts: Iterable[str]) -> bool:
    """Whether there are directories in these directories; without any, `train` is the name of a class."""
    prefixes = tuple(f"{top}{first}/" for first in firsts)
    return any(name.startswith(prefixes) and name[len(top) :].count("/") > 1 for name in names)


def _unclear(found: str, expected: str, hint: str = "arrange the files so, or name another --raw") -> UserError:
    return UserError(found=found, expected=f"{expected}: {LAYOUTS}", hint=hint)
