"""Results of the device check: JSON lines and Markdown, complete after every record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.harness import write_lines
from benchmarks.common.text import bullets, markdown_table
from shards.atomic import write_file


class Results:
    """Records of a check. Both files are replaced atomically at every record, so a kill leaves complete ones.

    Args:
        path: Path without suffix of the .jsonl and .md files.
        environment: Machine, versions and revision.
    """

    def __init__(self, path: Path, environment: Mapping[str, Any]) -> None:
        self._path = path
        self.records: list[dict[str, Any]] = []
        self.add({"section": "environment", **environment})

    def add(self, record: Mapping[str, Any]) -> None:
        """Store and print a record."""
        self.records.append({"name": "device_check", **record})
        write_lines(self._path.with_suffix(".jsonl"), self.records)
        write_file(self._path.with_suffix(".md"), format_report(self.records))
        if record["section"] != "kernels":
            print(", ".join(f"{key} {format_value(value)}" for key, value in record.items()), flush=True)


def format_report(records: Sequence[Mapping[str, Any]]) -> str:
    """Format all records in Markdown: the environment, a table for each section, and what is missing."""
    environment, *measured = records
    parts = [f"# Device check: {environment['device']}", bullets(f"{key}: {environment[key]}" for key in environment)]
    for section in dict.fromkeys(record["section"] for record in measured):
        rows = [record for record in measured if record["section"] == section]
        complete = [record for record in rows if not {"error", "skipped"} & set(record)]
        parts.append(f"## {section}")
        if complete:
            columns = [
                key for key in dict.fromkeys(key for row in complete for key in row) if key not in ("name", "section")
            ]
            head = [key.replace("_", " ") for key in columns]
            parts.append(markdown_table(head, [[format_value(row.get(key)) for key in columns] for row in complete]))
        missing = [row for row in rows if row not in complete]
        if missing:
            parts.append(bullets(f"{row['case']}: {row.get('error') or row['skipped']}" for row in missing))
    return "\n\n".join(parts) + "\n"


def format_value(value: Any) -> str:
    """Format a cell: numbers with four significant digits, or without decimals from 1,000 on."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, int | float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value).replace("\n", " ")
