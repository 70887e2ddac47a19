"""Comparison of several runs: learning curves, metrics, settings and classes."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import yaml

from shards.errors import UserError
from trainer.checkpoint.completed_run import CompletedRun
from trainer.config.schema import flatten
from trainer.evaluate.metrics import ClassificationMetrics
from trainer.report import html
from trainer.report.learning_curves import compared_curves, style
from trainer.report.run_page import MAX_CLASS_ROWS
from trainer.report.svg import MAX_SERIES, Line

# Name, path in summary.json, format, and whether higher (1) or lower (-1) is better.
_METRICS = [
    ("test accuracy", "accuracy", "{:.2%}", 1),
    ("test top-5 accuracy", "top5_accuracy", "{:.2%}", 1),
    ("test balanced accuracy", "balanced_accuracy", "{:.2%}", 1),
    ("test macro F1", "macro_f1", "{:.2%}", 1),
    ("test weighted F1", "weighted_f1", "{:.2%}", 1),
    ("calibration error", "calibration.ece", "{:.2%}", -1),
    ("cross-entropy", "calibration.nll", "{:.4f}", -1),
    ("validation accuracy", "validation.accuracy", "{:.2%}", 1),
    ("best epoch", "best_epoch", "{}", 0),
    ("training images/s", "images_per_second", "{:,.0f}", 1),
    ("data wait", "data_wait_share", "{:.2%}", -1),
    ("training time, seconds", "training_seconds", "{:,.0f}", -1),
    ("parameters", "parameters", "{:,}", 0),
]
_IGNORED = {"run.dir", "run.name", "resume", "command"}  # settings and environment that do not change the training


def render_page(runs: list[CompletedRun]) -> str:
    """Render the page. The first run is the baseline.

    Args:
        runs: 2 to 8 different runs.

    Raises:
        UserError: There are too many runs, or a run is repeated.
    """
    if len(runs) > MAX_SERIES:
        raise UserError(
            found=f"{len(runs)} runs",
            expected=f"up to {MAX_SERIES} runs",
            hint="compare fewer runs, for example the best",
        )
    if len({run.directory.path.resolve() for run in runs}) < len(runs):
        raise UserError(found="a run that is named twice", expected="different runs", hint="name each run once")
    names = _names(runs)
    predictions = [run.predictions for run in runs]
    same_classes = len({run.trained.classes for run in runs}) == 1
    same_set = len({run.trained.data_identity for run in runs}) == 1
    same_data = same_set and len({one["rows"].tobytes() for one in predictions}) == 1
    return html.render(
        "compare_page.html.j2",
        names=names,
        paths=[str(run.directory.path) for run in runs],
        keys=[Line(name, [], style(number)) for number, name in enumerate(names)],
        datasets=[run.summary["dataset"] for run in runs],
        same_set=same_set,
        same_data=same_data,
        metrics=_metric_rows([dict(flatten(run.summary)) for run in runs]),
        charts=compared_curves({name: run.history for name, run in zip(names, runs, strict=True)}),
        settings=_differences([dict(flatten(run.config.model_dump(mode="json"))) for run in runs]),
        environments=_differences([dict(flatten(run.environment)) for run in runs]),
        classes=_class_rows(predictions, runs[0].trained.classes) if same_classes else None,
        paired=_paired(predictions) if same_data else None,
    )


def _names(runs: list[CompletedRun]) -> list[str]:
    """The runs' names, with the part of their paths that differs if names are equal."""
    names = [run.config.run.name for run in runs]
    if len(set(names)) == len(names):
        return names
    paths = [run.directory.path.resolve() for run in runs]
    return [f"{name}/{path.relative_to(os.path.commonpath(paths))}" for name, path in zip(names, paths, strict=True)]


def _metric_rows(summaries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for name, path, form, direction in _METRICS:
        values = [summary.get(path) for summary in summaries]
        known = [value for value in values if value is not None]
        texts = ["-" if value is None else form.format(value) for value in values]
        best = max(known, key=lambda value: direction * value) if direction and len(set(texts)) > 1 and known else None
        if known:
            cells = [(text, best is not None and value == best) for text, value in zip(texts, values, strict=True)]
            rows.append({"name": name, "cells": cells})
    return rows


def _differences(contents: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """Name and values of each setting that differs between the runs."""
    rows = []
    for name in dict.fromkeys(name for content in contents for name in content):
        values = [yaml.safe_dump(each.get(name), default_flow_style=True).split("\n")[0] for each in contents]
        if len(set(values)) > 1 and name not in _IGNORED:
            rows.append((name, values))
    return rows


def _class_rows(predictions: list[Any], classes: tuple[str, ...]) -> list[dict[str, Any]]:
    """F1 of each class in each run, the largest differences first."""
    metrics = [ClassificationMetrics.of(each["labels"], each["predicted"], len(classes)) for each in predictions]
    f1 = np.stack([each.f1 for each in metrics])  # [runs, C]
    return [
        {
            "name": classes[label],
            "samples": int(metrics[0].support[label]),
            "f1": f1[:, label].tolist(),
            "gain": (f1[1:, label] - f1[0, label]).tolist(),
        }
        for label in np.argsort(-np.ptp(f1, axis=0), kind="stable")[:MAX_CLASS_ROWS]
    ]


def _paired(predictions: list[Any]) -> list[dict[str, int]]:
    """For each run except the baseline: test images that only the baseline or only this run classifies correctly."""
    # Of each run, bool [N] in the order of rows.
    first, *others = [(each["labels"] == each["predicted"])[np.argsort(each["rows"])] for each in predictions]
    return [{"first": int((first & ~other).sum()), "this": int((~first & other).sum())} for other in others]
