"""Learning curves of a run, or of several runs in the same charts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from trainer.config.schema import flatten
from trainer.report.svg import Line, line_chart

History = list[dict[str, Any]]


class _Curve(NamedTuple):
    """A metric by epoch: its path in a record, format, start of the axis, title of its chart."""

    path: str
    is_percent: bool = False
    from_zero: bool = False
    title: str = ""


_CURVES = {
    "training loss": _Curve("train_loss", title="Loss"),
    "validation cross-entropy": _Curve("validation.loss", title="Loss"),
    "validation accuracy": _Curve("validation.accuracy", True, title="Accuracy"),
    "training accuracy": _Curve("train_accuracy", True, title="Accuracy"),
    "validation macro F1": _Curve("validation.macro_f1", True, title="Macro F1"),
    "training macro F1": _Curve("train_macro_f1", True, title="Macro F1"),
    "learning rate": _Curve("lr"),
    "training images/s": _Curve("images_per_second", from_zero=True),
    "data wait, fraction of the step": _Curve("data_wait_share", True, True),
}


def style(number: int) -> str:
    """Class of the style sheet for series 0, 1, ..."""
    return f"series{number + 1}"


def learning_curves(history: History) -> list[dict[str, Any]]:
    """Draw the learning curves of a run.

    Args:
        history: Records of the epochs, as in `metrics.jsonl`.

    Returns:
        Title, lines and SVG of each chart.
    """
    charts: dict[str, dict[str, tuple[_Curve, History]]] = {}
    for name, curve in _CURVES.items():
        charts.setdefault(curve.title or _capitalize(name), {})[name] = (curve, history)
    return _draw(charts)


def compared_curves(histories: Mapping[str, History]) -> list[dict[str, Any]]:
    """Draw the learning curves of several runs, a chart for each metric. Histories are by run name."""
    return _draw(
        {
            _capitalize(name): {run: (curve, history) for run, history in histories.items()}
            for name, curve in _CURVES.items()
        }
    )


def _draw(charts: dict[str, dict[str, tuple[_Curve, History]]]) -> list[dict[str, Any]]:
    drawn = []
    for title, series in charts.items():
        lines = []
        for number, (name, (curve, history)) in enumerate(series.items()):
            found = [dict(flatten(record)).get(curve.path) for record in history]
            values = [math.nan if value is None else value for value in found]
            if any(map(math.isfinite, values)):
                lines.append(Line(name, values, style(number)))
        if lines:
            svg = line_chart(lines, f"{title} by epoch", curve.is_percent, curve.from_zero)
            drawn.append({"title": title, "lines": lines, "svg": svg})
    return drawn


def _capitalize(name: str) -> str:
    return name[0].upper() + name[1:]
