"""Self-contained HTML page of a resolution sweep, for light and dark screens, phones and print."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.sweep import text
from benchmarks.sweep.charts import ERROR_NOTE, accuracy_note, interpolation_panel, make_panels
from benchmarks.sweep.text import SweepResults
from shards.atomic import write_file
from trainer.report.html import render


def write_page(results: SweepResults, path: Path) -> None:
    """Render the page to a file."""
    groups = results.interpolations()
    accuracies, costs = make_panels(results)
    page = render(
        "page.html.j2",
        Path(__file__).parent,
        results=results,
        text=text,
        panels=[*accuracies, *costs],
        note=accuracy_note(results),
        error_note=ERROR_NOTE,
        interpolations=groups,
        interpolation_panel=interpolation_panel(groups) if groups else None,
        environment=json.dumps(results.first["environment"], indent=1),
        records="\n".join(json.dumps(record) for record in results.records),
    )
    write_file(path, page)
