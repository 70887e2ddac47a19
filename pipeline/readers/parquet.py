"""Images and labels from Parquet files, which are read sequentially into a temporary file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import pyarrow as arrow
from numpy.typing import NDArray
from pyarrow import parquet, types

from pipeline.readers.archives.files import CorruptFileError, StoredFile, TempFile, max_expanded_bytes, record_file
from pipeline.readers.image_splits import ImageSplit
from pipeline.readers.naming import class_name, number_labels, printable, some_of, text_column
from shards.errors import UserError, first_line
from shards.stores.image_header import MAX_BYTES

_IMAGE_COLUMNS = ("image", "img")
_LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target")
_MAX_ROWS = 256  # per batch
_BATCH_BYTES = 16 << 20  # of images per batch, according to the sizes in the file
_BUFFER = 1 << 20  # bytes of a column that are read at a time
_MISSING = -1  # size of an image that is null


class _Columns(NamedTuple):
    """The columns in use, and the class names in the order of the labels if the file has them."""

    image: str
    label: str
    class_names: tuple[str, ...]


@dataclass
class _Rows:
    """The rows of a split.

    Attributes:
        labels: The class name of each row.
        paths: The path of each image, or an empty text.
        offsets: The offset of each image in the temporary file.
        sizes: The size of each image in bytes.
        files: The files, each with its first row.
    """

    labels: list[str] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    files: list[tuple[Path, int]] = field(default_factory=list)

    def path_of(self, row: int) -> str:
        path, first = next((path, first) for path, first in reversed(self.files) if first <= row)
        name = f" ({printable(self.paths[row])})" if self.paths[row] else ""
        return f"{path} row {row - first}{name}"


def read_splits(
    files: Mapping[str, Sequence[Path]], image_column: str, label_column: str
) -> tuple[list[ImageSplit], tuple[str, ...]]:
    """Read the images of each split, and the class names.

    Args:
        files: The files of each split; `train` is one of the splits.
        image_column: The column of images; empty to detect it.
        label_column: The column of labels; empty to detect it.

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
            class_names.add(_read_file(path, image_column, label_column, rows, content))
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
    return [_image_split(split, rows, labels[split], stored) for split, rows in rows_of.items()], classes


def _image_split(split: str, rows: _Rows, labels: NDArray, content: StoredFile) -> ImageSplit:
    def read(row: int) -> bytes:
        if rows.sizes[row] == _MISSING:
            raise CorruptFileError("no bytes of an image")
        return content.read(rows.offsets[row], rows.sizes[row])

    columns = {"path": text_column(rows.paths)} if any(rows.paths) else {}
    records = tuple(record_file(path) for path, _ in rows.files)
    return ImageSplit(split, labels, read, rows.path_of, records, columns=columns)


def _read_file(path: Path, image_column: str, label_column: str, rows: _Rows, content: TempFile) -> tuple[str, ...]:
    """Append the rows of a file, and return its class names."""
    try:
        table = parquet.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER, page_checksum_verification=True)
        columns = _find_columns(table.schema_arrow, path, image_column, label_column)
        groups = [table.metadata.row_group(number) for number in range(table.num_row_groups)]
        row_bytes = max((group.total_byte_size / max(1, group.num_rows) for group in groups), default=1)
        batch_rows = min(_MAX_ROWS, max(1, int(_BATCH_BYTES / max(1, row_bytes))))
        for batch in table.iter_batches(batch_rows, columns=[columns.image, columns.label], use_threads=False):
            _append(batch, columns, rows, content)
    # For a damaged file pyarrow raises any of these.
    except (arrow.ArrowException, CorruptFileError, OSError, ValueError, OverflowError) as error:
        raise UserError(
            found=f"{path} row {len(rows.labels) - rows.files[-1][1]}: {first_line(error)}",
            expected="a complete Parquet file, a label in every row",
            hint="get the file again, or name another column with --image-column or --label-column",
        ) from None
    return columns.class_names


def _append(batch: arrow.RecordBatch, columns: _Columns, rows: _Rows, content: TempFile) -> None:
    images, labels = batch.column(columns.image), batch.column(columns.label)
    paths: list[str | None] = [None] * len(batch)
    if types.is_struct(images.type):
        fields = dict(zip((each.name for each in images.type), images.flatten(), strict=True))
        images = fields["bytes"]
        paths = fields["path"].to_pylist() if "path" in fields else paths
    for image, label, path in zip(images, labels.to_pylist(), paths, strict=True):
        name = class_name(label, columns.class_names)
        buffer = image.as_buffer()
        if buffer is not None and buffer.size > MAX_BYTES:
            raise CorruptFileError(f"an image of {buffer.size:,} bytes; the limit is {MAX_BYTES:,}")
        rows.offsets.append(content.size)
        rows.sizes.append(_MISSING if buffer is None else buffer.size)
        if buffer is not None:
            content.write(buffer)
        rows.paths.append(path or "")
        rows.labels.append(name)


def _find_columns(schema: arrow.Schema, path: Path, image_column: str, label_column: str) -> _Columns:
    images = [each.name for each in schema if _holds_bytes(each.type)]
    labels = [each.name for each in schema if _is_label(each.type)]
    usual = images if len(images) == 1 else _IMAGE_COLUMNS
    found = []
    for columns, requested, names, what, option in (
        (images, image_column, usual, "images as bytes", "--image-column"),
        (labels, label_column, _LABEL_COLUMNS, "labels, integers or texts", "--label-column"),
    ):
        matching = [name for name in ((requested,) if requested else names) if columns.count(name) == 1]
        if not matching:
            raise UserError(
                found=f"{path}, with the columns {some_of([f'{each.name} ({each.type})' for each in schema])}",
                expected=f"a column of {what}" + (f" named {requested}" if requested else ""),
                hint=f"name it with {option}",
            )
        found.append(matching[0])
    image, label = found
    return _Columns(image, label, _class_names(schema, label))


def _holds_bytes(kind: arrow.DataType) -> bool:
    if types.is_struct(kind):
        return any(each.name == "bytes" and _holds_bytes(each.type) for each in kind)
    return types.is_binary(kind) or types.is_large_binary(kind)


def _is_label(kind: arrow.DataType) -> bool:
    if types.is_dictionary(kind):
        kind = kind.value_type
    return types.is_integer(kind) or types.is_string(kind) or types.is_large_string(kind)


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
