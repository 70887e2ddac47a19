"""`report.html`: the self-contained report of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.atomic import write_file
from shards.errors import errors_as_corrupt
from shards.manifest import Manifest
from shards.stores.base import Store
from trainer.checkpoint import run_files
from trainer.checkpoint.run_dir import RunDirectory
from trainer.checkpoint.trained_model import TrainedModel, load_trained_model
from trainer.evaluate.calibration import reliability
from trainer.evaluate.metrics import MAX_MATRIX_CLASSES, ClassificationMetrics, confusion_matrix, most_confused
from trainer.report import html
from trainer.report.error_gallery import build_gallery, data_urls, find_samples
from trainer.report.grad_cam import grad_cam_pictures
from trainer.report.learning_curves import learning_curves, style
from trainer.report.svg import Bins, Line, confusion_chart, distribution_chart, line_chart, reliability_chart
from trainer.runtime.profiler import format_profile

MAX_CLASS_ROWS = 1000  # classes of a table
_PAIRS = 12  # most frequent confusions
_PICTURES = 8  # images of each pair
_MAX_SIDE = 128  # of an image, in pixels


def write(path: Path, train: Manifest, store: Store, summary: dict[str, Any], history: list[dict[str, Any]]) -> None:
    """Write the report into a run directory.

    Args:
        path: The run directory.
        train: Manifest of the training split.
        store: The split to which `predictions.npz` belongs: test, or train for a fold (`data.fold`).
        summary: Results, as in `summary.json`.
        history: Records of the epochs, as in `metrics.jsonl`.
    """
    directory = RunDirectory(path)
    classes = store.manifest.classes
    predictions = run_files.read_predictions(directory.predictions, len(classes), directory.hint, store)
    labels, predicted = predictions["labels"], predictions["predicted"]
    metrics = ClassificationMetrics.of(labels, predicted, len(classes))
    matrix = None
    if len(classes) <= MAX_MATRIX_CLASSES:
        matrix = confusion_chart(confusion_matrix(labels, predicted, len(classes)), classes)
    validation = predictions.get("validation_confusion")
    counts = summary.get("class_counts") or train.counts
    with errors_as_corrupt(directory.summary_path, directory.hint):
        distribution = distribution_chart(counts, classes)
        rows = [row | {"train": count} for row, count in zip(metrics.class_metrics(classes), counts, strict=True)]
    if len(rows) > MAX_CLASS_ROWS:
        rows = sorted((row for row in rows if row["samples"]), key=lambda row: row["f1"])[:MAX_CLASS_ROWS]
    settings, config = directory.read_settings()
    profile = None
    if directory.profile.exists():
        parts = run_files.read_json(directory.profile, run_files.Profile, f"rm -rf {directory.profile}")
        profile = format_profile(parts)
    pairs, has_heat = _pair_rows(metrics, predictions, store, load_trained_model(path))
    page = html.render(
        "run_page.html.j2",
        summary=summary,
        history=history,
        charts=learning_curves(history),
        trade_off=_trade_off(summary),
        calibration=_calibration(predictions, summary["calibration"]["temperature"], config.data.evaluated),
        confusion=matrix,
        matrix_limit=MAX_MATRIX_CLASSES,
        validation_confusion=None if validation is None else confusion_chart(validation, classes),
        gallery=build_gallery(store, predictions),
        distribution=distribution,
        most=max(counts),
        least=min(counts),
        classes=rows,
        class_count=len(classes),
        pairs=pairs,
        has_heat=has_heat,
        settings=settings,
        config=config,
        environment=run_files.read_json(directory.environment, run_files.Environment, directory.hint),
        profile=profile,
    )
    write_file(directory.report, page)


def _trade_off(summary: dict[str, Any]) -> dict[str, Any] | None:
    """Accuracy and macro F1 of the validation split by tau; None without a validation split."""
    curve = (summary.get("decision") or {}).get("curve")
    if not curve:
        return None
    names = {"accuracy": "accuracy", "macro_f1": "macro F1"}
    lines = [Line(name, [point[key] for point in curve], style(at)) for at, (key, name) in enumerate(names.items())]
    label = "Accuracy and macro F1 on the validation split by tau"
    svg = line_chart(lines, label, is_percent=True, axis="τ", places=[point["tau"] for point in curve])
    return {"lines": lines, "svg": svg}


def _calibration(predictions: dict[str, NDArray], temperature: float, evaluated: str) -> dict[str, Any]:
    """Reliability diagram with temperature scaling and, if T is not 1, without."""
    correct = predictions["predicted"] == predictions["labels"]
    names = {"confidence": f"T = {temperature:.2f}"}
    if temperature != 1:
        names["uncalibrated"] = "without temperature scaling"
    series = [
        Bins(name, reliability(predictions[column], correct), style(number))
        for number, (column, name) in enumerate(names.items())
    ]
    return {"series": series, "svg": reliability_chart(series, f"Accuracy on the {evaluated} by bins of confidence")}


def _pair_rows(
    metrics: ClassificationMetrics, predictions: dict[str, NDArray], store: Store, trained: TrainedModel
) -> tuple[list[dict[str, Any]], bool]:
    """The most frequent confusions with images, the most confident first; and whether there are maps of Grad-CAM."""
    labels, predicted, confidence = predictions["labels"], predictions["predicted"], predictions["confidence"]
    classes = store.manifest.classes
    pairs = most_confused(labels, predicted, _PAIRS)
    selected = []
    for true, wrong, _ in pairs:
        errors = np.flatnonzero((labels == true) & (predicted == wrong))
        selected.append(errors[np.argsort(-confidence[errors], kind="stable")][:_PICTURES])
    shown = np.concatenate([*selected, np.zeros(0, np.int64)]).astype(np.int64)
    samples = find_samples(store, predictions["rows"][shown])
    heat = grad_cam_pictures(store, trained, samples, predicted[shown]) if len(shown) else None
    heat_urls = iter([None] * len(shown) if heat is None else map(html.image_url, heat))
    rows = []
    for (true, wrong, count), errors in zip(pairs, selected, strict=True):
        source_index = predictions["rows"][errors]
        urls = data_urls(store, source_index, _MAX_SIDE)
        columns = urls, confidence[errors].tolist(), source_index.tolist(), [next(heat_urls) for _ in errors]
        rows.append(
            {"true": classes[true], "predicted": classes[wrong], "count": count}
            | {"pictures": list(zip(*columns, strict=True)), "fraction": count / metrics.support[true]}
        )
    return rows, heat is not None
