"""Runs side by side: their curves, figures, settings, and what one recognises that another does not."""

from __future__ import annotations

from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from shards.errors import UserError
from trainer.checkpoint.completed_run import CompletedRun
from trainer.evaluate.metrics import Confusion
from trainer.report import html
from trainer.report.svg import Line

# Of a summary: name, where it stands, how it is written, and whether more (1) or less (-1) of it is better.
_FIGURES = [
    ("test accuracy", ("accuracy",), "{:.2%}", 1),
    ("test macro F1", ("macro_f1",), "{:.2%}", 1),
    ("test weighted F1", ("weighted_f1",), "{:.2%}", 1),
    ("calibration error", ("calibration", "ece"), "{:.2%}", -1),
    ("cross-entropy", ("calibration", "nll"), "{:.4f}", -1),
    ("validation accuracy", ("validation", "accuracy"), "{:.2%}", 1),
    ("best epoch", ("best_epoch",), "{}", 0),
    ("images a second in training", ("images_per_second",), "{:,.0f}", 1),
    ("data wait", ("data_wait_share",), "{:.1%}", -1),
    ("training time, seconds", ("training_seconds",), "{:,.0f}", -1),
    ("parameters", ("parameters",), "{:,}", 0),
]
_OF_THE_PLACE = ("run.dir", "run.name", "resume")  # settings that say nothing about what was trained


def page(runs: list[CompletedRun]) -> str:
    """The page that compares some runs, the first of them the one that others are held against.

    Raises `UserError` for more of them than can be told apart, or the same one twice.
    """
    if len(runs) > html.MOST_SERIES:
        raise UserError(
            found=f"{len(runs)} runs",
            expected=f"up to {html.MOST_SERIES}, whose lines can be told apart",
            hint="compare the best of them",
        )
    if len({run.directory.path.resolve() for run in runs}) < len(runs):
        raise UserError(found="a run that is named twice", expected="different runs", hint="name each run once")
    names = _names(runs)
    alike = [run.trained.classes == runs[0].trained.classes for run in runs]
    same_data = [run.trained.data_digest == runs[0].trained.data_digest for run in runs]
    return html.render(
        "compare_page.html.j2",
        names=names,
        paths=[str(run.directory.path) for run in runs],
        keys=[Line(name, [], html.style(number)) for number, name in enumerate(names)],
        datasets=[run.summary["dataset"] for run in runs],
        same_data=all(same_data),
        figures=_figure_rows(runs),
        charts=html.compared_curves({name: run.history for name, run in zip(names, runs, strict=True)}),
        settings=_setting_rows(runs),
        environments=_differing([_flat(_comparable(run.environment)) for run in runs]),
        classes=_class_rows(runs) if all(alike) else None,
        paired=_paired(runs) if all(same_data) else None,
    )


def _names(runs: list[CompletedRun]) -> list[str]:
    """A name for each: the run's own, with as much of its place as tells it from the others."""
    for depth in range(3):
        names = [
            "/".join([run.config.run.name, *run.directory.path.resolve().parts[-depth:]][: depth + 1]) for run in runs
        ]
        if len(set(names)) == len(names):
            return names
    return [str(run.directory.path) for run in runs]


def _figure_rows(runs: list[CompletedRun]) -> list[dict[str, Any]]:
    rows = []
    for name, place, form, better in _FIGURES:
        values = [_at(run.summary, place) for run in runs]
        known = [value for value in values if value is not None]
        texts = ["none" if value is None else form.format(value).replace("%", " %") for value in values]
        best = (max(known) if better > 0 else min(known)) if known and better and len(set(texts)) > 1 else None
        cells = [
            {"text": text, "best": best is not None and value == best}
            for text, value in zip(texts, values, strict=True)
        ]
        if known:
            rows.append({"name": name, "cells": cells})
    return rows


def _at(summary: dict[str, Any], place: tuple[str, ...]) -> float | None:
    value: Any = summary
    for name in place:
        value = (value or {}).get(name)
    return value


def _setting_rows(runs: list[CompletedRun]) -> list[tuple[str, list[str]]]:
    return _differing([_flat(run.config.model_dump(mode="json")) for run in runs])


def _comparable(environment: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in environment.items() if name != "command"}


def _differing(flat: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """Name and values of everything that is not the same everywhere."""
    names = dict.fromkeys(name for each in flat for name in each)
    found = []
    for name in names:
        values = [yaml.safe_dump(each.get(name), default_flow_style=True).split("\n")[0] for each in flat]
        if len(set(values)) > 1 and name not in _OF_THE_PLACE:
            found.append((name, values))
    return found


def _flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in content.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def _class_rows(runs: list[CompletedRun]) -> list[dict[str, Any]]:
    """F1 of each class in each run, those that differ most first."""
    confusions = [_confusion(run) for run in runs]
    f1 = np.stack([confusion.f1 for confusion in confusions])  # [runs, C]
    order = np.argsort(-np.ptp(f1, axis=0), kind="stable")
    return [
        {
            "name": runs[0].trained.classes[label],
            "samples": int(confusions[0].support[label]),
            "f1": f1[:, label].tolist(),
            "gain": (f1[1:, label] - f1[0, label]).tolist(),
        }
        for label in order
    ]


def _confusion(run: CompletedRun) -> Confusion:
    predictions = np.load(run.directory.predictions)
    return Confusion.of(predictions["labels"], predictions["predicted"], len(run.trained.classes))


def _paired(runs: list[CompletedRun]) -> list[dict[str, int]]:
    """For each run but the first: test images that only the first recognises, and that only this one does."""
    first, *others = [_right(run) for run in runs]
    return [{"first": int((first & ~other).sum()), "this": int((~first & other).sum())} for other in others]


def _right(run: CompletedRun) -> NDArray[np.bool_]:
    """[N], in the order of rows."""
    predictions = np.load(run.directory.predictions)
    return (predictions["labels"] == predictions["predicted"])[np.argsort(predictions["rows"])]
