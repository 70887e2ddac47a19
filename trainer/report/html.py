"""How pages about runs are made of templates, and what those of one run and of several have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jinja2

from trainer.report.svg import Line, line_chart
from trainer.runtime.progress import duration

_TEMPLATES = Path(__file__).with_name("templates")
MOST_SERIES = 8  # lines of a chart, for which the style sheet has colours
History = list[dict[str, Any]]

# What may be drawn of an epoch's record (None where it has no such figure), and whether that is a share.
_FIGURES: dict[str, tuple[Callable[[dict[str, Any]], float | None], bool]] = {
    "training objective": (lambda record: record["train_loss"], False),
    "validation cross-entropy": (lambda record: record.get("validation", {}).get("loss"), False),
    "validation accuracy": (lambda record: record.get("validation", {}).get("accuracy"), True),
    "validation macro F1": (lambda record: record.get("validation", {}).get("macro_f1"), True),
    "learning rate": (lambda record: record["lr"], False),
    "images a second in training": (lambda record: record["images_per_second"], False),
    "data wait, of a step's time": (lambda record: record["data_wait_share"], True),
}
_FROM_ZERO = ("images a second in training", "data wait, of a step's time")
_OF_ONE_RUN = {
    "Loss": ("training objective", "validation cross-entropy"),
    "Validation": ("validation accuracy", "validation macro F1"),
}


def render(template: str, **content: Any) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([_TEMPLATES, _TEMPLATES.parents[1] / "tune"]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["duration"] = duration
    return environment.get_template(template).render(**content)


def percent(fraction: float, digits: int = 2) -> str:
    """A fraction as text, for instance `98.25 %`."""
    return f"{100 * fraction:.{digits}f} %"


def style(number: int) -> str:
    """The style sheet's class of series 0, 1, ..."""
    return f"series{number + 1}"


def curves(history: History) -> list[dict[str, Any]]:
    """Title, lines and SVG of each learning curve of a run."""
    charts = {}
    for figure in _FIGURES:
        title = next((title for title, figures in _OF_ONE_RUN.items() if figure in figures), _high(figure))
        charts.setdefault(title, []).append(figure)
    return _drawn({title: [(figure, figure, history) for figure in figures] for title, figures in charts.items()})


def compared_curves(histories: Mapping[str, History]) -> list[dict[str, Any]]:
    """Title, lines and SVG of each learning curve, a line for each run. histories: by the runs' names."""
    return _drawn(
        {_high(figure): [(name, figure, history) for name, history in histories.items()] for figure in _FIGURES}
    )


def _drawn(charts: dict[str, list[tuple[str, str, History]]]) -> list[dict[str, Any]]:
    """charts: by title, the name of each line, its figure and the run's history."""
    found = []
    for title, wanted in charts.items():
        lines, figure = [], wanted[0][1]
        for number, (name, of_line, history) in enumerate(wanted):
            values = [value for record in history if (value := _FIGURES[of_line][0](record)) is not None]
            if values:
                lines.append(Line(name, values, style(number)))
        if lines:
            percent = _FIGURES[figure][1]
            svg = line_chart(lines, f"{title} by epoch", percent, figure in _FROM_ZERO)
            found.append({"title": title, "lines": lines, "svg": svg})
    return found


def _high(figure: str) -> str:
    return figure[0].upper() + figure[1:]
