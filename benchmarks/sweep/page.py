"""`resolution_sweep.html`: the study as one self-contained page, light and dark, that can be printed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2

from benchmarks.sweep.charts import COLOURS, svgs
from benchmarks.sweep.stats import BY_EPOCHS, BY_TIME, Choice
from benchmarks.sweep.text import (
    RUNS,
    Findings,
    cost_rows,
    gain_rows,
    growth_lines,
    interpolation_rows,
    notes,
    percent,
    recommendation,
    run_name,
)
from shards.atomic import write_file

_TEMPLATE = Path(__file__).with_name("page.html.j2")


def write_page(findings: Findings, path: Path) -> None:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATE.parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    compared = findings.interpolations()
    runs = [run for run in RUNS if findings.main.choice(run) is not None]
    page = environment.get_template(_TEMPLATE.name).render(
        first=findings.first,
        colours=COLOURS,
        main=findings.main,
        headline=[_headline(findings.main.choice(run)) for run in runs],
        charts=svgs(findings),
        alternatives=_alternatives(findings),
        panels=[
            {
                "title": panel.title,
                "words": recommendation(panel),
                "growth": growth_lines(panel),
                "costs": cost_rows(panel),
                "gains": [(run_name(run, findings.first), gain_rows(panel, [run])) for run in runs],
            }
            for panel in findings.panels
        ],
        interpolation={
            "side": compared[0].resolution,
            "model": compared[0].model,
            "after": run_name(BY_EPOCHS, compared[0].records[0]),
            "table": interpolation_rows(compared),
        }
        if compared
        else None,
        notes=notes(findings),
        environment=json.dumps(findings.first["environment"], indent=1),
        records="\n".join(json.dumps(record) for record in findings.records),
    )
    write_file(path, page)


def _headline(choice: Choice | None) -> dict[str, Any]:
    assert choice is not None
    return {
        "after": run_name(choice.run, choice.chosen.records[0]),
        "side": choice.chosen.resolution,
        "accuracy": percent(choice.chosen.figure(choice.run, "accuracy")),
        "rate": choice.chosen.throughput,
    }


def _alternatives(findings: Findings) -> dict[str, str]:
    """What each chart shows, for those who cannot see it."""
    trade = []
    for panel in findings.panels:
        for run in (BY_EPOCHS, BY_TIME):
            figures = [
                f"{cell.resolution}: {100 * found.mean:.1f} % at {cell.throughput:,.0f} images/s"
                for cell in panel.cells
                if (found := cell.figure(run, "accuracy"))
            ]
            if figures:
                trade.append(f"{panel.title}, after {run_name(run, findings.first)}: {'; '.join(figures)}")
    costs = [f"{panel.title}: {'; '.join(growth_lines(panel))}" for panel in findings.panels]
    largest = findings.main.cells[-1]
    record = largest.records[0]
    times = record["bytes_pre_resized_uint8"] / record["bytes_at_rest"]
    compared = [
        f"{cell.interpolation}: {percent(cell.figure(BY_EPOCHS, 'accuracy'))}" for cell in findings.interpolations()
    ]
    return {
        "trade": "Test accuracy against training throughput by resolution. " + ". ".join(trade),
        "costs": "Milliseconds an image by its pixels. " + ". ".join(costs),
        "sizes": "Megabytes on disk by resolution: constant at rest; resized beforehand to "
        f"{largest.resolution}x{largest.resolution} as uint8 {times:.3g} times as many, as float32 four times that",
        "interpolation": "Test accuracy by interpolation. " + "; ".join(compared),
    }
