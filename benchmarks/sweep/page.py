"""Self-contained HTML page of a resolution sweep, for light and dark screens, phones and print."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.sweep.charts import TRADE_NOTE, interpolation_chart, page_charts
from benchmarks.sweep.text import (
    SweepResults,
    accuracy_table,
    cost_table,
    format_estimate,
    growth_lines,
    interpolation_table,
    interpolation_title,
    notes,
    recommendation_text,
    run_name,
)
from shards.atomic import write_file
from trainer.report.html import render


def write_page(results: SweepResults, path: Path) -> None:
    """Render the page to a file."""
    choices = [choice for run in results.runs if (choice := results.main.recommend(run))]
    groups = results.interpolations()
    page = render(
        "page.html.j2",
        Path(__file__).parent,
        first=results.first,
        main=results.main,
        headline=[
            {
                "after": run_name(choice.run, results.first),
                "resolution": choice.chosen.resolution,
                "accuracy": format_estimate(choice.chosen.metric(choice.run, "accuracy")),
                "throughput": choice.chosen.throughput,
            }
            for choice in choices
        ],
        charts=page_charts(results),
        trade_note=TRADE_NOTE,
        series=[
            {
                "title": series.title,
                "text": recommendation_text(series),
                "growth": growth_lines(series),
                "costs": cost_table(series),
                "accuracies": [(run_name(run, results.first), accuracy_table(series, run)) for run in results.runs],
            }
            for series in results.series
        ],
        interpolation={
            "title": interpolation_title(groups),
            "chart": interpolation_chart(groups),
            "table": interpolation_table(groups),
        }
        if groups
        else None,
        notes=notes(results),
        environment=json.dumps(results.first["environment"], indent=1),
        records="\n".join(json.dumps(record) for record in results.records),
    )
    write_file(path, page)
