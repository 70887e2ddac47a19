"""Pictures and labels out of Parquet files, read front to back into a temporary file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import pyarrow as arrow
from numpy.typing import NDArray
from pyarrow import parquet, types

from pipeline.readers.archives.files import CorruptFileError, StoredFile, TempFile, max_expanded_bytes, record_file
from pipeline.readers.image_splits import ImageSplit
from pipeline.readers.naming import number_labels, printable, some_of, text_column
from shards.errors import UserError, first_line
from shards.stores.image_header import MAX_BYTES

_IMAGE_COLUMNS = ("image", "img")
_LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target")
_MOST_ROWS = 256  # at a time
_BATCH_BYTES = 16 << 20  # of pictures at a time, as far as the file tells the truth of their sizes
_BUFFER = 1 << 20  # bytes of a column that are read at a time
_MISSING = -1  # in place of the size of a picture that is not there


class _Columns(NamedTuple):
    """The columns in use. names: of the classes, in the order of the labels, where the file tells them."""

    image: str
    label: str
    names: tuple[str, ...]


@dataclass
class _Rows:
    """What is read of a part. labels: names of classes; paths: of the picture files, where the table tells; offsets,
    sizes: of the pictures in the temporary file; files: each with the row of the part that is its first."""

    labels: list[str] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    files: list[tuple[Path, int]] = field(default_factory=list)

    def place(self, row: int) -> str:
        path, first = next((path, first) for path, first in reversed(self.files) if first <= row)
        name = f" ({printable(self.paths[row])})" if self.paths[row] else ""
        return f"{path} row {row - first}{name}"


def read_parts(
    files: Mapping[str, Sequence[Path]], image_column: str, label_column: str
) -> tuple[list[ImageSplit], tuple[str, ...]]:
    """The pictures of each part, and the class names.

    files: of each part, `train` among them. Raises `UserError`, naming file and row, for anything unfit; pictures that
    are absent or cannot be decoded are left for `RawSplit.read` to report.
    """
    paths = [path for of_part in files.values() for path in of_part]
    spool = TempFile(
        f"the pictures of {paths[0].parent}", sum(max_expanded_bytes(path.stat().st_size) for path in paths)
    )
    names: set[tuple[str, ...]] = set()
    rows_of: dict[str, _Rows] = {}
    for part, of_part in files.items():
        rows = rows_of.setdefault(part, _Rows())
        for path in of_part:
            rows.files.append((path, len(rows.labels)))
            with _errors_of(path, rows):
                table = parquet.ParquetFile(
                    path, pre_buffer=False, buffer_size=_BUFFER, page_checksum_verification=True
                )
                columns = _find_columns(table.schema_arrow, path, image_column, label_column)
                names.add(columns.names)
                used = [columns.image, columns.label]
                for batch in table.iter_batches(_batch_rows(table.metadata), columns=used, use_threads=False):
                    _take(batch, columns, rows, spool)
    if len(names) > 1:
        raise UserError(
            found=f"files of {paths[0].parent} that name the classes differently",
            expected="files of one data set",
            hint="name the directory of one data set, or one file, with --raw",
        )
    classes, labels = number_labels(
        {part: rows.labels for part, rows in rows_of.items()}, paths[0].parent, next(iter(names))
    )
    content = spool.finish()
    return [_picture_set(part, rows, labels[part], content) for part, rows in rows_of.items()], classes


def _picture_set(part: str, rows: _Rows, labels: NDArray, content: StoredFile) -> ImageSplit:
    def read(row: int) -> bytes:
        if rows.sizes[row] == _MISSING:
            raise CorruptFileError("no bytes of a picture")
        return content.read(rows.offsets[row], rows.sizes[row])

    columns = {"path": text_column(rows.paths)} if any(rows.paths) else {}
    records = tuple(record_file(path) for path, _ in rows.files)
    return ImageSplit(part, labels, read, rows.place, records, columns=columns)


def _batch_rows(metadata: parquet.FileMetaData) -> int:
    """How many rows to read at a time."""
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    row_bytes = max((group.total_byte_size / max(1, group.num_rows) for group in groups), default=1)
    return min(_MOST_ROWS, max(1, int(_BATCH_BYTES / max(1, row_bytes))))


def _take(batch: arrow.RecordBatch, columns: _Columns, rows: _Rows, spool: TempFile) -> None:
    """Add the rows of a batch."""
    images, labels = batch.column(columns.image), batch.column(columns.label)
    paths: list[str | None] = [None] * len(batch)
    if types.is_struct(images.type):
        fields = dict(zip((one.name for one in images.type), images.flatten(), strict=True))
        images = fields["bytes"]
        paths = fields["path"].to_pylist() if "path" in fields else paths
    for image, label, path in zip(images, labels.to_pylist(), paths, strict=True):
        if label is None or (columns.names and not 0 <= label < len(columns.names)):
            expected = f", where 0 .. {len(columns.names) - 1} have names" if columns.names else ""
            raise CorruptFileError(f"label {label}{expected}")
        content = image.as_buffer()
        if content is not None and content.size > MAX_BYTES:
            raise CorruptFileError(f"a picture of {content.size:,} bytes; it may have {MAX_BYTES:,}")
        rows.offsets.append(spool.size)
        rows.sizes.append(_MISSING if content is None else content.size)
        if content is not None:
            spool.write(content)
        rows.paths.append(path or "")
        rows.labels.append(columns.names[label] if columns.names else str(label))


def _find_columns(schema: arrow.Schema, path: Path, image_column: str, label_column: str) -> _Columns:
    pictures = [one.name for one in schema if _holds_bytes(one.type)]
    numbers = [one.name for one in schema if _is_label(one.type)]
    image = _choose(pictures, image_column, _IMAGE_COLUMNS) or (pictures[0] if len(pictures) == 1 else None)
    label = _choose(numbers, label_column, _LABEL_COLUMNS)
    for chosen, asked, what, option in (
        (image, image_column, "pictures as bytes", "--image-column"),
        (label, label_column, "labels, whole numbers or texts", "--label-column"),
    ):
        if chosen is None or (asked and chosen != asked):
            columns = [f"{one.name} ({one.type})" for one in schema]
            raise UserError(
                found=f"{path}, with the columns {some_of(columns)}",
                expected=f"a column of {what}" + (f" named {asked}" if asked else ""),
                hint=f"name it with {option}",
            )
    return _Columns(image, label, _class_names(schema, label))


def _choose(columns: Sequence[str], asked: str, usual: Sequence[str]) -> str | None:
    return next((name for name in ((asked,) if asked else usual) if columns.count(name) == 1), None)


def _holds_bytes(kind: arrow.DataType) -> bool:
    if types.is_struct(kind):
        return any(one.name == "bytes" and _holds_bytes(one.type) for one in kind)
    return types.is_binary(kind) or types.is_large_binary(kind)


def _is_label(kind: arrow.DataType) -> bool:
    if types.is_dictionary(kind):
        kind = kind.value_type
    return types.is_integer(kind) or types.is_string(kind) or types.is_large_string(kind)


def _class_names(schema: arrow.Schema, label: str) -> tuple[str, ...]:
    """The names of the classes in the description that the hub's library writes; none if there are none."""
    try:
        names = json.loads(schema.metadata[b"huggingface"])["info"]["features"][label]["names"]
    # No metadata at all, none of the hub's, or of another form: the labels have to do.
    except (TypeError, KeyError, ValueError):
        return ()
    whole = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return (
        tuple(names) if whole and len(set(names)) == len(names) and types.is_integer(schema.field(label).type) else ()
    )


@contextmanager
def _errors_of(path: Path, rows: _Rows) -> Iterator[None]:
    """Whatever a damaged file makes pyarrow raise, as a message that names the file and how far it could be read."""
    try:
        yield
    except (arrow.ArrowException, CorruptFileError, OSError, ValueError, OverflowError) as error:
        row = len(rows.labels) - rows.files[-1][1]
        raise UserError(
            found=f"{path} row {row}: {first_line(error)}",
            expected="a whole Parquet file, a label in every row",
            hint="get the file again, or name another column with --image-column or --label-column",
        ) from None
