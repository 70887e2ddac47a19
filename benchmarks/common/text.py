"""Text of all reports: number formats and the Markdown table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from benchmarks.common.harness import Spread
from shards.cli import plural

Table = tuple[list[str], list[list[str]]]
"""Column titles, and the cells of each row."""

_T = TypeVar("_T")


def tabulate(columns: Mapping[str, Callable[[_T], str]], items: Iterable[_T]) -> Table:
    """Build a table with one row per item.

    Args:
        columns: For each column title the function that formats the cell of an item.
        items: What the rows show.
    """
    return list(columns), [[cell(item) for cell in columns.values()] for item in items]


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table: first column left-aligned, the others right-aligned, padded to equal widths.

    `|` within a cell is escaped.
    """
    head, *rows = ([cell.replace("|", "\\|") for cell in cells] for cells in (head, *rows))
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = [f"{'-' * (width - 1)}{'-' if column == 0 else ':'}" for column, width in enumerate(widths)]
    return "\n".join([line(head), line(rule), *map(line, rows)])


def bullets(lines: Iterable[str]) -> str:
    """Format a Markdown list."""
    return "\n".join(f"- {line}" for line in lines)


def format_percent(fraction: float, std: float | None = None, sign: str = "") -> str:
    """Format a fraction as `83.12%`, or with its standard deviation or error as `83.12 ± 0.48%`."""
    spread = "" if std is None else f" ± {100 * std:.2f}"
    return f"{100 * fraction:{sign}.2f}{spread}%"


def format_spread(spread: Spread | Mapping[str, float], spec: str = ",.0f") -> str:
    """Format a median with its range as `1,234 (1,200 .. 1,300)`.

    Args:
        spread: The measurements, or their JSON form.
        spec: Format specification of the numbers.
    """
    values = spread.to_json() if isinstance(spread, Spread) else spread
    return f"{values['median']:{spec}} ({values['low']:{spec}} .. {values['high']:{spec}})"


def format_bytes(count: float) -> str:
    """Format a number of bytes as `12.3 MB` (powers of 1,000)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1000
    raise AssertionError


def format_machine(environment: Mapping[str, object]) -> str:
    """Format the hardware of a record: `2 cores of NAME`, and the GPU if there is one."""
    gpu = "" if environment["device"] == "cpu" else f", {environment['device']}"
    return f"{plural(int(str(environment['cores'])), 'core')} of {environment['processor']}{gpu}"
