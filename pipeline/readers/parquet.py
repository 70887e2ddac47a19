"""Images and labels from Parquet files, which are read sequentially into a temporary file."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as arrow
from numpy.typing import NDArray
from pyarrow import parquet, types

from pipeline.readers.archives.files import CorruptFileError, StoredFile, TempFile, max_expanded_bytes
from pipeline.readers.formats.image import encode_png, is_image_file
from pipeline.readers.image_splits import ImageSplit
from pipeline.readers.naming import (
    SPLIT_COLUMN,
    TRAIN,
    class_name,
    in_split_order,
    number_labels,
    some_of,
    text_column,
    warn,
)
from shards.cli import plural
from shards.errors import UserError, first_line, printable
from shards.manifest import RawFile, split_named
from shards.stores.image_header import MAX_BYTES

_IMAGE_COLUMNS = ("image", "img")
_LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target")
_MAX_ROWS = 256  # per batch
_BATCH_BYTES = 16 << 20  # of images per batch, according to the sizes in the file
_BUFFER = 1 << 20  # bytes of a column that are read at a time
_MISSING = -1  # size of an image that is null


class _Columns(NamedTuple):
    """The columns in use, the class names in the order of the labels if the file has them, and further columns."""

    image: str
    label: str
    class_names: tuple[str, ...]
    others: tuple[str, ...]


@dataclass
class _Rows:
    """The rows of a split.

    Attributes:
        labels: The class name of each row.
        paths: The path of each image, or an empty text.
        offsets: The offset of each image in the temporary file.
        sizes: The size of each image in bytes.
        files: The files, each with the number of kept rows before it.
        numbers: The number of each kept row in its file, from 0.
        others: The values of further columns.
        read: Rows of the current file that have been read.
        skipped: Rows that were skipped because of their labels.
        first_skipped: The file and row of the first of them, and why.
    """

    labels: list[str] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    files: list[tuple[Path, int]] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    others: dict[str, list[str]] = field(default_factory=dict)
    read: int = 0
    skipped: int = 0
    first_skipped: str = ""

    def path_of(self, row: int) -> str:
        path = next(path for path, first in reversed(self.files) if first <= row)
        name = f" ({printable(self.paths[row])})" if self.paths[row] else ""
        return f"{path} row {self.numbers[row]}{name}"


def read_splits(
    files: Mapping[str, Sequence[Path]], image_column: str, label_column: str, skip_bad: bool = False
) -> tuple[list[ImageSplit], tuple[str, ...]]:
    """Read the images of each split, and the class names.

    Args:
        files: The files of each split; `train` is one of the splits.
        image_column: The column of images; empty to detect it.
        label_column: The column of labels; empty to detect it.
        skip_bad: Whether rows without a label, or with one that is no class, are skipped with a warning.

    Raises:
        UserError: If a file is damaged or a label is missing; the message names file and row. Images that are missing
            or cannot be decoded are reported by `RawSplit.read`.
    """
    paths = [path for paths_of_split in files.values() for path in paths_of_split]
    directory = paths[0].parent
    content = TempFile(f"the images of {directory}", sum(max_expanded_bytes(path.stat().st_size) for path in paths))
    class_names: set[tuple[str, ...]] = set()
    rows_of: dict[str, _Rows] = {split: _Rows() for split in files}
    for split, rows in rows_of.items():
        for path in files[split]:
            rows.files.append((path, len(rows.labels)))
            class_names.add(_read_file(path, image_column, label_column, rows, content, skip_bad))
        if rows.skipped:
            warn(
                f"skipped {plural(rows.skipped, 'row')} of the {split} split because of their labels, the first: "
                f"{rows.first_skipped}"
            )
    for split in [split for split, rows in rows_of.items() if split != TRAIN and rows.skipped and not rows.labels]:
        warn(f"not used: the {split} split, in which no row has a valid label")
        del rows_of[split]
    if len(class_names) > 1:
        raise UserError(
            found=f"files of {directory} with different class names",
            expected="files of one data set",
            hint="name the directory of one data set, or one file, with --raw",
        )
    classes, labels = number_labels(
        {split: rows.labels for split, rows in rows_of.items()}, directory, class_names.pop()
    )
    stored = content.finish()
    splits = [_image_split(split, rows, labels[split], stored) for split, rows in rows_of.items()]
    if len(splits) == 1:
        splits = _divide(splits[0])
        number_labels({split.name: [classes[label] for label in split.labels] for split in splits}, directory, classes)
    return splits, classes


def _image_split(split: str, rows: _Rows, labels: NDArray, content: StoredFile) -> ImageSplit:
    def read(row: int) -> bytes:
        if rows.sizes[row] == _MISSING:
            raise CorruptFileError("no bytes of an image")
        return content.read(rows.offsets[row], rows.sizes[row])

    columns = {"path": text_column(rows.paths)} if any(rows.paths) else {}
    # Those that all files have.
    columns |= {
        printable(name): text_column(values) for name, values in rows.others.items() if len(values) == len(rows.labels)
    }
    records = tuple(RawFile.of(path.parent, path.name) for path, _ in rows.files)
    return ImageSplit(split, labels, read, rows.path_of, records, columns=columns)


def _divide(images: ImageSplit) -> list[ImageSplit]:
    """Divide the rows of the only split by their column `split`, if there is one."""
    name = next((name for name in images.columns if name.lower() == SPLIT_COLUMN), None)
    if name is None:
        return [images]
    values, number_of = np.unique(images.columns[name], return_inverse=True)
    splits = [split_named(value) for value in values.tolist()]
    if None in splits or TRAIN not in splits:
        raise UserError(
            found=f"{images.path_of(0).partition(' row ')[0]}, whose column {name} holds {some_of(values.tolist())}",
            expected="train, and test or val",
            hint="rename these values, or the column if it says something else",
        )
    split_of = np.array(splits)[number_of]

    def select(split: str) -> ImageSplit:
        rows = np.flatnonzero(split_of == split)
        return replace(
            images,
            name=split,
            labels=images.labels[rows],
            read=lambda row: images.read(int(rows[row])),
            path_of=lambda row: images.path_of(int(rows[row])),
            columns={column: values[rows] for column, values in images.columns.items() if column != name},
        )

    return [select(split) for split in in_split_order(set(split_of.tolist()))]


class _LabelError(ValueError):
    """A label that is missing or no class."""


def _read_file(
    path: Path, image_column: str, label_column: str, rows: _Rows, content: TempFile, skip_bad: bool
) -> tuple[str, ...]:
    """Append the rows of a file, and return its class names."""
    rows.read = 0
    try:
        table = parquet.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER, page_checksum_verification=True)
        columns = _find_columns(table.schema_arrow, path, image_column, label_column)
        groups = [table.metadata.row_group(number) for number in range(table.num_row_groups)]
        row_bytes = max((group.total_byte_size / max(1, group.num_rows) for group in groups), default=1)
        batch_rows = min(_MAX_ROWS, max(1, int(_BATCH_BYTES / max(1, row_bytes))))
        for batch in table.iter_batches(
            batch_rows, columns=[columns.image, columns.label, *columns.others], use_threads=False
        ):
            _append(batch, columns, rows, content, skip_bad)
    # For a damaged file pyarrow raises any of these.
    except (arrow.ArrowException, CorruptFileError, OSError, ValueError, OverflowError) as error:
        is_label = isinstance(error, _LabelError)
        raise UserError(
            found=f"{path} row {rows.read}: {first_line(error)}",
            expected="a complete Parquet file, a label in every row",
            hint="name another column with --label-column, or skip such rows with --skip-bad"
            if is_label
            else "get the file again, or name another column with --image-column or --label-column",
        ) from None
    return columns.class_names


def _append(batch: arrow.RecordBatch, columns: _Columns, rows: _Rows, content: TempFile, skip_bad: bool) -> None:
    images, paths = _image_files(batch.column(columns.image))
    labels = _plain(batch.column(columns.label)).to_pylist()
    kept = []
    for number, (image, label, path) in enumerate(zip(images, labels, paths, strict=True)):
        try:
            name = class_name(_label(label), columns.class_names)
        except ValueError as error:
            if not skip_bad:
                raise _LabelError(str(error)) from None
            rows.first_skipped = rows.first_skipped or f"{rows.files[-1][0]} row {rows.read}, {error}"
            rows.skipped += 1
            rows.read += 1
            continue
        kept.append(number)
        if image is not None and len(image) > MAX_BYTES:
            raise CorruptFileError(f"an image of {len(image):,} bytes; the limit is {MAX_BYTES:,}")
        rows.offsets.append(content.size)
        rows.sizes.append(_MISSING if image is None else len(image))
        if image is not None:
            content.write(image)
        rows.paths.append(path or "")
        rows.labels.append(name)
        rows.numbers.append(rows.read)
        rows.read += 1
    for column in columns.others:
        values = _plain(batch.column(column)).to_pylist()
        rows.others.setdefault(column, []).extend(
            "" if values[number] is None else str(values[number]) for number in kept
        )


def _plain(array: arrow.Array) -> arrow.Array:
    """The values of a dictionary or extension array."""
    if isinstance(array, arrow.ExtensionArray):
        return _plain(array.storage)
    return array.dictionary_decode() if types.is_dictionary(array.type) else array


def _image_files(array: arrow.Array) -> tuple[Iterable[Any], list[str | None]]:
    """The bytes of each image file, None for null, and its path if there is one."""
    array = _plain(array)
    if types.is_struct(array.type):
        fields = dict(zip((each.name for each in array.type), array.flatten(), strict=True))
        name = next(each.name for each in _byte_fields(array.type))
        files, paths = _image_files(fields[name])
        return files, fields["path"].to_pylist() if "path" in fields else paths
    if _is_list(array.type):
        files = (None if value is None else _encode_pixels(value) for value in array.to_pylist())
    else:
        files = (value.as_buffer() for value in array.cast(arrow.large_binary()))
    return files, [None] * len(array)


def _encode_pixels(value: list) -> bytes:
    """An image file from lists of integers: pixels [H, W] or [H, W, C], a square gray image, or the bytes of a file."""
    pixels = np.array(value)
    if pixels.dtype.kind not in "iu" or not pixels.size or not 0 <= pixels.min() <= pixels.max() <= 255:
        raise ValueError(
            f"an image of {pixels.dtype} {list(pixels.shape)}, not of integers 0 .. 255 in lists of one length"
        )
    pixels = pixels.astype(np.uint8)
    side = math.isqrt(pixels.size)
    if pixels.ndim == 1 and side * side == pixels.size and not is_image_file(pixels.tobytes()):
        pixels = pixels.reshape(side, side)
    if pixels.ndim == 1:
        return pixels.tobytes()
    if pixels.ndim > 3 or pixels.shape[2:] not in ((), (1,), (3,)):
        raise ValueError(f"pixels {list(pixels.shape)}, not [H, W], [H, W, 1] or [H, W, 3]")
    return encode_png(pixels)


def _label(value: Any) -> int | str | None:
    """A label as an integer or a text."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, bool | float | Decimal):
        if value != int(value):
            raise ValueError(f"label {value}, which is no integer")
        return int(value)
    return value


def _find_columns(schema: arrow.Schema, path: Path, image_column: str, label_column: str) -> _Columns:
    images = [each.name for each in schema if _holds_bytes(each.type)]
    images = images or [each.name for each in schema if _is_list(each.type)]
    labels = [
        each.name
        for each in schema
        if _is_scalar(each.type) or (_holds_bytes(each.type) and each.name in _LABEL_COLUMNS and len(images) > 1)
    ]
    usual = images if len(images) == 1 else _IMAGE_COLUMNS
    classes = [name for name in labels if _class_names(schema, name)]
    usual_labels = (*_LABEL_COLUMNS, *(classes if len(classes) == 1 else ()))
    unique = {name for name in schema.names if schema.names.count(name) == 1}
    found = []
    for columns, requested, names, what, option in (
        (images, image_column, usual, "images as bytes", "--image-column"),
        (labels, label_column, usual_labels, "labels, integers or texts", "--label-column"),
    ):
        matching = [name for name in ((requested,) if requested else names) if name in unique.intersection(columns)]
        if not matching:
            raise UserError(
                found=f"{path}, with the columns {some_of([f'{each.name} ({each.type})' for each in schema])}",
                expected=f"a column of {what}" + (f" named {requested}" if requested else ""),
                hint=f"name it with {option}",
            )
        found.append(matching[0])
    image, label = found
    usable = unique - {label, "row", "path"}
    others = tuple(each.name for each in schema if _is_scalar(each.type) and each.name in usable)
    return _Columns(image, label, _class_names(schema, label), others)


def _value_type(kind: arrow.DataType) -> arrow.DataType:
    """The type of the values of a dictionary or extension type."""
    if isinstance(kind, arrow.BaseExtensionType):
        return _value_type(kind.storage_type)
    return _value_type(kind.value_type) if types.is_dictionary(kind) else kind


def _byte_fields(kind: arrow.StructType) -> list[arrow.Field]:
    """The fields of a struct that hold image files, `bytes` first."""
    return sorted((each for each in kind if _holds_bytes(each.type)), key=lambda each: each.name != "bytes")


def _holds_bytes(kind: arrow.DataType) -> bool:
    kind = _value_type(kind)
    if types.is_struct(kind):
        return bool(_byte_fields(kind))
    checks = (types.is_binary, types.is_large_binary, types.is_binary_view, types.is_fixed_size_binary)
    return any(check(kind) for check in checks)


def _is_list(kind: arrow.DataType) -> bool:
    """Whether a type is a list, or nested lists, of integers."""
    kind = _value_type(kind)
    checks = (
        types.is_list,
        types.is_large_list,
        types.is_list_view,
        types.is_large_list_view,
        types.is_fixed_size_list,
    )
    if any(check(kind) for check in checks):
        return types.is_integer(_value_type(kind.value_type)) or _is_list(kind.value_type)
    return False


def _is_scalar(kind: arrow.DataType) -> bool:
    kind = _value_type(kind)
    checks = (types.is_string, types.is_large_string, types.is_string_view, types.is_boolean)
    numbers = (types.is_integer, types.is_floating, types.is_decimal)
    return any(check(kind) for check in (*checks, *numbers))


def _class_names(schema: arrow.Schema, label: str) -> tuple[str, ...]:
    """The class names in the metadata that the library of the Hugging Face Hub writes; empty if there are none."""
    try:
        names = json.loads(schema.metadata[b"huggingface"])["info"]["features"][label]["names"]
    # No metadata, or metadata of another form: the labels are the names.
    except (TypeError, KeyError, ValueError):
        return ()
    is_list_of_texts = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if is_list_of_texts and len(set(names)) == len(names) and types.is_integer(schema.field(label).type):
        return tuple(names)
    return ()
