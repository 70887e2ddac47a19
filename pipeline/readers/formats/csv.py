"""CSV tables of images with a header line, separated by commas, semicolons or tabs."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pipeline.readers.archives.files import CorruptFileError
from pipeline.readers.naming import some_of
from shards.cli import plural
from shards.errors import UserError, printable

_SEPARATORS = ",;\t"
_NUMBER = re.compile(r"[+-]?[0-9.]+(e[+-]?[0-9]+)?")


@dataclass(frozen=True)
class CsvTable:
    """A table of texts.

    Attributes:
        path: The path of the file, for messages.
        columns: The column names.
        rows: The texts of each row, one per column.
        lines: The line of the file at which each row ends, from 1.
    """

    path: str
    columns: tuple[str, ...]
    rows: list[list[str]]
    lines: list[int]

    def line(self, row: int) -> str:
        """Return the path and line of a row, for messages."""
        return f"{self.path} line {self.lines[row]}"

    def headed(self, columns: tuple[str, ...]) -> CsvTable:
        """Return the table with these column names, and its present column names as the first row (line 1)."""
        rows, lines = [list(self.columns[: len(columns)]), *self.rows], [1, *self.lines]
        return CsvTable(self.path, columns, rows, lines)

    def column(
        self, names: Sequence[str], what: str, option: str = "", hint: str = "use the file as published"
    ) -> list[str]:
        """Return the values of a column.

        Args:
            names: Possible names in any case, the most likely first.
            what: The content of the column, for messages.
            option: The command-line option that names the column, for messages.
            hint: The hint of the message without such an option.

        Raises:
            UserError: If no column has one of the names.
        """
        columns = [column.lower() for column in self.columns]
        for name in names:
            if name.lower() in columns:
                number = columns.index(name.lower())
                return [row[number] for row in self.rows]
        raise UserError(
            found=f"{self.path}, with the columns {some_of(self.columns)}",
            expected=f"a column of {what}, named {' or '.join(names)}",
            hint=f"name it with {option}, or rename it in the first line" if option else hint,
        )


def read_csv(content: bytes, path: str) -> CsvTable:
    """Parse a table in UTF-8.

    Raises:
        CorruptFileError: If the content is not a table; the message names the line.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise CorruptFileError(f"line {line}: byte {content[error.start]:#04x}, which is not UTF-8") from None
    if "\0" in text:
        raise CorruptFileError(f"line {text[: text.index(chr(0))].count(chr(10)) + 1}: a zero byte")
    first = text.lstrip().partition("\n")[0]
    by_count = sorted(_SEPARATORS, key=first.count, reverse=True)
    if path.lower().endswith(".tsv"):
        by_count.sort(key="\t".__ne__)  # a tab first
    separators = [separator for separator in by_count if separator in first] or by_count[:1]
    faults = []
    for separator in separators:
        try:
            return _parse(text, separator, path)
        except CorruptFileError as fault:  # another separator may occur more often in the column names
            faults.append(fault)
    raise faults[0]


def _parse(text: str, separator: str, path: str) -> CsvTable:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    rows, lines = [], []
    try:
        for row in reader:
            if any(field.strip() for field in row):
                rows.append([field.strip() for field in row])
                lines.append(reader.line_num)
    except csv.Error as error:
        raise CorruptFileError(f"line {reader.line_num}: {error}") from None
    if len(rows) < 2:
        raise CorruptFileError("only one line in it" if rows else "it is empty")
    columns = [column.lower() for column in rows[0]]
    for number, column in enumerate(columns):
        if column in columns[:number]:
            raise CorruptFileError(f"line {lines[0]}: two columns named {printable(rows[0][number])!r}")
    for row, line in zip(rows, lines, strict=True):
        if len(row) != len(columns):
            fields = plural(len(row), "field")
            raise CorruptFileError(f"line {line}: {fields} where the first line has {len(columns)}")
    return CsvTable(path, tuple(rows[0]), rows[1:], lines[1:])


def format_csv(header: Sequence[object], rows: Iterable[Iterable[object]]) -> str:
    """Format a table as CSV. Texts that a spreadsheet would run as a formula get an apostrophe in front."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(map(_escape_formula, header))
    writer.writerows(map(_escape_formula, row) for row in rows)
    return text.getvalue()


def _escape_formula(value: object) -> object:
    is_formula = isinstance(value, str) and len(value) > 1 and value[0] in "=+-@\t\r" and not _NUMBER.fullmatch(value)
    return f"'{value}" if is_formula else value
