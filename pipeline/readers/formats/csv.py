"""A table of pictures as people write it: CSV with a header line, separated by commas, semicolons or tabs."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.readers.naming import printable, some_of
from shards.errors import UserError

_SEPARATORS = ",;\t"


@dataclass(frozen=True)
class CsvTable:
    """place: of the file. columns: their names in the file. rows: the texts of each row, one a column.

    lines: where each row ends in the file, from 1.
    """

    place: str
    columns: tuple[str, ...]
    rows: list[list[str]]
    lines: list[int]

    def place_of(self, row: int) -> str:
        return f"{self.place} line {self.lines[row]}"

    def column(self, names: Sequence[str], what: str, option: str = "") -> list[str]:
        """The column that has one of these names, whatever their case; the first name counts most.

        what: what it holds, option: the setting that names it, for the message. Raises `UserError` if there is none.
        """
        found = [column.lower() for column in self.columns]
        for name in names:
            if name.lower() in found:
                number = found.index(name.lower())
                return [row[number] for row in self.rows]
        raise UserError(
            found=f"{self.place}, with the columns {some_of(self.columns)}",
            expected=f"a column of {what}, named {' or '.join(names)}",
            hint=f"name it with {option}, or rename it in the first line" if option else "use the file as published",
        )


def read_csv(content: bytes, place: str) -> CsvTable:
    """Parse a table in UTF-8. Raises `UserError`, with the line, for anything else."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise _bad(f"{place} line {line}", f"byte {content[error.start]:#04x}, which is not UTF-8") from None
    if "\0" in text:
        raise _bad(f"{place} line {text[: text.index(chr(0))].count(chr(10)) + 1}", "a zero byte")
    first = text.lstrip().partition("\n")[0]
    separator = max(_SEPARATORS, key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    rows, lines = [], []
    try:
        for row in reader:
            if any(field.strip() for field in row):
                rows.append([field.strip() for field in row])
                lines.append(reader.line_num)
    except csv.Error as error:
        raise _bad(f"{place} line {reader.line_num}", str(error)) from None
    if len(rows) < 2:
        raise _bad(place, f"{'only one line' if rows else 'nothing'} in it")
    columns = tuple(rows[0])
    for number, column in enumerate(columns):
        if column.lower() in (earlier.lower() for earlier in columns[:number]):
            raise _bad(f"{place} line {lines[0]}", f"two columns named {printable(column)!r}")
    for row, line in zip(rows, lines, strict=True):
        if len(row) != len(columns):
            raise _bad(f"{place} line {line}", f"{len(row)} fields where the first line has {len(columns)}")
    return CsvTable(place, columns, rows[1:], lines[1:])


def _bad(place: str, what: str) -> UserError:
    return UserError(
        found=f"{place}: {what}",
        expected="a CSV file in UTF-8: a line of column names, then a line for each picture",
        hint="save the table again as CSV (UTF-8)",
    )
