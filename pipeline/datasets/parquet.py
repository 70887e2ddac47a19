"""Tables of images in Parquet files, as the Hugging Face Hub stores them.

`--raw` names a file, which is the train split, or a directory of files. The names of the files, or of their
directories, hold the split: `train-00000-of-00002.parquet`, `data/birds-test.parquet`, `validation/0000.parquet`. If no
name holds a split, all files are the train split.

The image column holds the bytes of PNG, JPEG, WebP, BMP, GIF or TIFF files, a struct with them in a field `bytes`, or
lists of integers 0 .. 255: [H][W], [H][W][C] or a square gray image. It is named image or img, or is the only one of
its kind, or --image-column names it. Labels are texts, booleans or whole numbers of any type in a column label, labels,
fine_label, class or target, or --label-column. The class names are those of the data set's metadata in the file
(`huggingface`), or the texts, or the numbers. Further columns of texts and numbers are kept.

The files are read once, some rows at a time (at least a page of the file, usually megabytes), and the images are kept
in a temporary file (TMPDIR), from which they are decoded in the order of the pack. Needs pyarrow:
pip install -e ".[parquet]"

`hf NAME` reads the tables into which the Hub converts its data sets (branch refs/convert/parquet, files
`CONFIG/SPLIT/0000.parquet`); `--split CONFIG` selects a configuration.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path, PurePath

from pipeline.datasets.base import DatasetSource
from pipeline.readers.archives.file_trees import DirectoryTree
from pipeline.readers.image_splits import TABLE_OPTIONS, image_splits
from pipeline.readers.naming import TRAIN, in_split_order, natural_order, some_of
from pipeline.readers.raw_split import RawSplit, SourceOptions
from shards.errors import UserError, quote
from shards.manifest import split_named, splits_in
from shards.remote.backends import open_storage
from shards.remote.base import retry

_ENDINGS = (".parquet", ".parq", ".pq")
_HUB_HINT = "python -m pipeline.shard hf"
_PARTIAL = "partial-"  # begins the directory of a split of which the Hub has converted only the first gigabytes


def _load(options: SourceOptions) -> tuple[RawSplit, ...]:
    try:
        from pipeline.readers.parquet import read_splits
    except ModuleNotFoundError as error:
        if error.name != "pyarrow":
            raise
        raise UserError(
            found="no pyarrow in this environment",
            expected="the package that reads Parquet files",
            hint='pip install -e ".[parquet]"',
        ) from None
    splits, classes = read_splits(
        _find_files(options.raw), options.image_column, options.label_column, options.skip_bad
    )
    return image_splits(splits, classes, options)


def _find_files(raw: Path) -> dict[str, list[Path]]:
    """The files of each split in natural order; `train` is one of the splits."""
    if not raw.is_dir():
        if raw.exists():
            return {TRAIN: [raw]}
        raise _unclear(f"no such file or directory: {raw}")
    names = [name for name in DirectoryTree(raw).names if PurePath(name).suffix.lower() in _ENDINGS]
    if not names:
        raise _unclear(f"no {_ENDINGS[0]} file in {raw}")
    files: dict[str, list[Path]] = {}
    data_sets = set()
    for name in names:
        *directories, file = name.split("/")
        splits = splits_in(Path(file).stem)
        if len(splits) > 1:
            raise _unclear(f"{raw / name}, named after the splits {' and '.join(sorted(splits))}")
        split = next(iter(splits), "")
        if not split and directories and (split := split_named(directories[-1]) or ""):
            directories.pop()
        files.setdefault(split, []).append(raw / name)
        data_sets.add("/".join(directories) or ".")
    if len(data_sets) > 1:
        raise _unclear(f"the tables of several data sets in {raw}: {some_of(natural_order(data_sets))}")
    if "" in files and len(files) > 1:
        raise _unclear(
            f"{files[''][0]}, which is named after no split, beside {some_of(sorted(files.keys() - {''}))} files"
        )
    if "" in files:
        files[TRAIN] = files.pop("")
    if TRAIN not in files:
        raise _unclear(f"only {', '.join(files)} files in {raw}")
    return {split: files[split] for split in in_split_order(files)}


def _unclear(found: str) -> UserError:
    return UserError(
        found=found,
        expected="train-*.parquet and test-*.parquet of one data set, or a single file",
        hint="name the directory of one data set, or one file, with --raw",
    )


def _hub_address(name: str, config: str) -> str:
    """The address of the tables of a configuration of a data set on the Hub; by default the only one, or `default`."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(
            found=f"the name {name!r}", expected="a data set on the Hub, USER/NAME", hint=f"{_HUB_HINT} ylecun/mnist"
        )
    root = f"hf://datasets/{name}@refs/convert/parquet"
    files = [file.split("/") for file in retry(open_storage(root).find) if file.count("/") == 2]
    configs = natural_order({directories[0] for directories in files})
    chosen = config or (configs[0] if len(configs) == 1 else "default")
    if chosen not in configs:
        raise UserError(
            found=f"{name} with the configurations {some_of(configs)}" if configs else f"{name}, which has no tables",
            expected=f"the configuration {config}" if config else "one configuration",
            hint=f"{_HUB_HINT} {name} --split {quote(configs[0])}"
            if configs
            else f"https://huggingface.co/datasets/{name}",
        )
    if any(directories[0] == chosen and directories[1].startswith(_PARTIAL) for directories in files):
        raise UserError(
            found=f"{name}, {chosen}, of which the Hub has converted only a part",
            expected="tables with all images",
            hint=f"if its own files are tables: python -m pipeline.shard parquet --raw hf://datasets/{name}",
        )
    return f"{root}/{chosen}"


_PARQUET = DatasetSource(
    name="parquet",
    description="images in Parquet tables, as on the Hugging Face Hub (needs pyarrow)",
    plan=lambda options: f"read the tables in {options.raw}",
    load=_load,
    options=TABLE_OPTIONS,
    generic=True,
)
_HUB = replace(
    _PARQUET,
    name="hf",
    description="hf NAME, a data set of images on the Hugging Face Hub (needs pyarrow)",
    address=_hub_address,
)
SOURCES = (_PARQUET, _HUB)
