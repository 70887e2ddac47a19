"""`report.html`: the self-contained report of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.atomic import write_file
from shards.manifest import Manifest
from shards.stores.base import Store
from trainer.checkpoint import run_files
from trainer.checkpoint.run_dir import RunDirectory
from trainer.evaluate.calibration import reliability
from trainer.evaluate.metrics import ClassificationMetrics, confusion_matrix, most_confused
from trainer.report import html
from trainer.report.error_gallery import build_gallery, data_urls
from trainer.report.learning_curves import learning_curves, style
from trainer.report.svg import Bins, confusion_chart, distribution_chart, reliability_chart
from trainer.runtime.profiler import format_profile

MAX_CLASS_ROWS = 1000  # classes of a table
_MAX_MATRIX_CLASSES = 256  # classes of a confusion matrix; its memory and its area grow with their square
_PAIRS = 12  # most frequent confusions
_PICTURES = 8  # images of each pair
_MAX_SIDE = 128  # of an image, in pixels


def write(path: Path, train: Manifest, store: Store, summary: dict[str, Any], history: list[dict[str, Any]]) -> None:
    """Write the report into a run directory.

    Args:
        path: The run directory.
        train: Manifest of the training split.
        store: The test split, to which `predictions.npz` belongs.
        summary: Results, as in `summary.json`.
        history: Records of the epochs, as in `metrics.jsonl`.
    """
    directory = RunDirectory(path)
    classes = store.manifest.classes
    predictions = run_files.read_predictions(directory.predictions, len(classes), directory.hint, store)
    labels, predicted = predictions["labels"], predictions["predicted"]
    metrics = ClassificationMetrics.of(labels, predicted, len(classes))
    matrix = None
    if len(classes) <= _MAX_MATRIX_CLASSES:
        matrix = confusion_chart(confusion_matrix(labels, predicted, len(classes)), classes)
    rows = [row | {"train": count} for row, count in zip(metrics.class_metrics(classes), train.counts, strict=True)]
    if len(rows) > MAX_CLASS_ROWS:
        rows = sorted((row for row in rows if row["samples"]), key=lambda row: row["f1"])[:MAX_CLASS_ROWS]
    settings, config = directory.read_settings()
    profile = None
    if directory.profile.exists():
        parts = run_files.read_json(directory.profile, run_files.Profile, f"rm -rf {directory.profile}")
        profile = format_profile(parts)
    page = html.render(
        "run_page.html.j2",
        summary=summary,
        history=history,
        charts=learning_curves(history),
        calibration=_calibration(predictions, summary["calibration"]["temperature"]),
        confusion=matrix,
        matrix_limit=_MAX_MATRIX_CLASSES,
        gallery=build_gallery(store, predictions),
        distribution=distribution_chart(train.counts, classes),
        most=max(train.counts),
        least=min(train.counts),
        classes=rows,
        class_count=len(classes),
        pairs=_pair_rows(metrics, predictions, store),
        settings=settings,
        config=config,
        environment=run_files.read_json(directory.environment, run_files.Environment, directory.hint),
        profile=profile,
    )
    write_file(directory.report, page)


def _calibration(predictions: dict[str, NDArray], temperature: float) -> dict[str, Any]:
    """Reliability diagram with temperature scaling and, if T is not 1, without."""
    correct = predictions["predicted"] == predictions["labels"]
    names = {"confidence": f"T = {temperature:.2f}"}
    if temperature != 1:
        names["uncalibrated"] = "without temperature scaling"
    series = [
        Bins(name, reliability(predictions[column], correct), style(number))
        for number, (column, name) in enumerate(names.items())
    ]
    return {"series": series, "svg": reliability_chart(series, "Accuracy on the test split by bins of confidence")}


def _pair_rows(metrics: ClassificationMetrics, predictions: dict[str, NDArray], store: Store) -> list[dict[str, Any]]:
    """The most frequent confusions with images, the most confident first."""
    labels, predicted, confidence = predictions["labels"], predictions["predicted"], predictions["confidence"]
    classes = store.manifest.classes
    rows = []
    for true, wrong, count in most_confused(labels, predicted, _PAIRS):
        errors = np.flatnonzero((labels == true) & (predicted == wrong))
        errors = errors[np.argsort(-confidence[errors], kind="stable")][:_PICTURES]
        source_index = predictions["rows"][errors]
        urls = data_urls(store, source_index, _MAX_SIDE)
        pictures = list(zip(urls, confidence[errors].tolist(), source_index.tolist(), strict=True))
        rows.append(
            {"true": classes[true], "predicted": classes[wrong], "count": count, "pictures": pictures}
            | {"fraction": count / metrics.support[true]}
        )
    return rows
