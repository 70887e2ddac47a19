"""Tables of pictures in Parquet files, as data-set hubs store them.

`--raw` names a file, which is a train part, or a directory of files whose names, or those of their directories, begin
with the part: `train-00000-of-00002.parquet`, `data/test-00000-of-00001.parquet`, `validation/0000.parquet`. Files
that name no part are the train part.

The column of pictures holds the bytes of PNG, JPEG, WebP, BMP or GIF files, or a struct with them in a field `bytes`;
it is called image or img, or is the only one of its kind, or --image-column names it. Labels are whole numbers or texts
in a column label, labels, fine_label, class or target, or --label-column. The names of the classes come from the
description of the data set in the file (`huggingface`), from the texts, or are the numbers.

The files are read once, some rows at a time (at least a page of the file, which writers keep to megabytes), and the
pictures kept in a temporary file (TMPDIR), from which they are decoded in the order of the pack. Needs pyarrow:
pip install 'inkstream[parquet]'
"""

from __future__ import annotations

from pathlib import Path

from pipeline.datasets.base import DatasetSource
from pipeline.readers.image_splits import TABLE_OPTIONS, image_splits
from pipeline.readers.naming import TRAIN, in_split_order, natural_order, some_of, split_named
from pipeline.readers.raw_split import RawSplit, SourceOptions
from shards.errors import UserError

_ENDING = ".parquet"


def _plan(options: SourceOptions) -> str:
    return f"read the tables in {options.raw}"


def _load(options: SourceOptions) -> tuple[RawSplit, ...]:
    try:
        from pipeline.readers.parquet import read_parts
    except ModuleNotFoundError as error:
        if error.name != "pyarrow":
            raise
        raise UserError(
            found="no pyarrow in this environment",
            expected="the package that reads Parquet files",
            hint="pip install 'inkstream[parquet]'",
        ) from None
    files = _files(options.raw)
    sets, classes = read_parts(
        {part: files[part] for part in in_split_order(files)}, options.image_column, options.label_column
    )
    return image_splits(sets, classes, options)


def _files(raw: Path) -> dict[str, list[Path]]:
    """The files of each part, `train` among them, in natural order."""
    if not raw.is_dir():
        if raw.exists():
            return {TRAIN: [raw]}
        raise _unclear(f"no {raw}")
    names = natural_order(path.relative_to(raw).as_posix() for path in raw.rglob(f"*{_ENDING}") if path.is_file())
    if not names:
        raise _unclear(f"no {_ENDING} file in {raw}")
    parts: dict[str, list[Path]] = {}
    tables = set()
    for name in names:
        part, table = _meaning(name)
        parts.setdefault(part or TRAIN, []).append(raw / name)
        tables.add(table)
    if len(tables) > 1:
        raise _unclear(f"the tables of several data sets in {raw}: {some_of(natural_order(tables))}")
    if TRAIN not in parts:
        raise _unclear(f"only {', '.join(parts)} files in {raw}")
    return parts


def _meaning(name: str) -> tuple[str | None, str]:
    """The part that a path tells, if any, and the directory of the data set to which it belongs."""
    *directories, file = name.split("/")
    part = split_named(file.removesuffix(_ENDING).partition("-")[0])
    if part is None and directories and (part := split_named(directories[-1])):
        directories.pop()
    return part, "/".join(directories) or "."


def _unclear(found: str) -> UserError:
    return UserError(
        found=found,
        expected="train-*.parquet and test-*.parquet of one data set, or a single file",
        hint="name the directory of one data set, or one file, with --raw",
    )


SOURCES = (
    DatasetSource(
        name="parquet",
        description="pictures in Parquet tables, as on data-set hubs (needs pyarrow)",
        plan=_plan,
        load=_load,
        options=TABLE_OPTIONS,
        generic=True,
    ),
)
