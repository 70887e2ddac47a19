"""The results of a run: metrics, predictions, report and time profile."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from shards.atomic import replace_file, write_file
from trainer.checkpoint.run_dir import RunDirectory
from trainer.checkpoint.trained_model import TrainedModel
from trainer.evaluate.evaluator import Evaluation, loader_for, to_pixels
from trainer.evaluate.metrics import confusion_matrix
from trainer.loop.state import Training
from trainer.report import run_page
from trainer.report.contact_sheet import prediction_sheet
from trainer.report.error_gallery import find_samples
from trainer.runtime.distributed import World
from trainer.runtime.loggers.base import PredictedImage, PredictionImages
from trainer.runtime.profiler import TimeProfile, format_profile

_ERRORS = 48  # most confident errors for loggers
_MAX_DRAWN_CLASSES = 100  # of a confusion matrix for loggers, an image of 0.22 inches per class; a page draws on demand


def write_results(training: Training, evaluation: Evaluation, run_dir: RunDirectory) -> dict[str, Any]:
    """Write predictions, report and, last, the summary, which marks a run as complete.

    Args:
        training: A completed training.
        evaluation: The best epoch on the test split.
        run_dir: The run directory.

    Returns:
        The contents of `summary.json`.
    """
    summary = summarize(training, evaluation)
    arrays = dict(vars(evaluation.predictions))
    if training.posthoc is not None and training.posthoc.confusion is not None:
        arrays["validation_confusion"] = training.posthoc.confusion
    with replace_file(run_dir.predictions) as file:
        np.savez_compressed(file, **arrays)
    data = training.data
    run_page.write(run_dir.path, data.manifest, data.test_store, summary, training.state.history)
    run_dir.write_summary(summary)
    return summary


def prediction_images(training: Training, evaluation: Evaluation, trained: TrainedModel) -> PredictionImages:
    """Draw the confusion matrix and the most confident errors of the test split for loggers."""
    store, predictions = training.data.test_store, evaluation.predictions
    classes, labels, predicted = store.manifest.classes, predictions.labels, predictions.predicted
    errors = np.flatnonzero(labels != predicted)
    errors = errors[np.argsort(-predictions.confidence[errors], kind="stable")][:_ERRORS]
    loader = loader_for(store, trained, World(), find_samples(store, predictions.rows[errors]))
    pixels = [image for batch in loader.batches() for image in to_pixels(batch.images, trained).numpy()]
    pictures = [
        PredictedImage(
            image,
            classes[predicted[error]],
            float(predictions.confidence[error]),
            classes[labels[error]],
            int(predictions.rows[error]),
        )
        for image, error in zip(pixels, errors, strict=True)
    ]
    matrix = None
    if len(classes) <= _MAX_DRAWN_CLASSES:
        matrix = draw_confusion(confusion_matrix(labels, predicted, len(classes)), classes)
    return PredictionImages(
        classes=classes,
        labels=labels,
        predicted=predicted,
        confidence=predictions.confidence,
        confusion=matrix,
        errors=pictures,
        sheet=prediction_sheet(pictures, "most confident errors of the test split") if pictures else None,
    )


def draw_confusion(counts: NDArray[np.int64], classes: tuple[str, ...]) -> Image.Image:
    """Draw a confusion matrix [C, C] with the fraction of each row, whose square root is shown by opacity."""
    side = 3 + 0.22 * len(classes)
    figure = Figure((side, side), layout="constrained")
    axes = figure.add_subplot(xlabel="predicted", ylabel="true")
    axes.imshow(np.sqrt(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)), cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(classes)), classes, rotation=90)
    axes.set_yticks(range(len(classes)), classes)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return Image.open(content).convert("RGB")


def write_profile(training: Training, run_dir: RunDirectory) -> None:
    """Write and print the time profile, if there is one."""
    if isinstance(training.profile, TimeProfile):
        records = training.profile.summary()
        write_file(run_dir.profile, json.dumps(records, indent=1) + "\n")
        print(format_profile(records), flush=True)


def summarize(training: Training, evaluation: Evaluation) -> dict[str, Any]:
    """Return the metrics of the test split, and those of the validation split in the best epoch.

    Args:
        training: A completed training.
        evaluation: The best epoch on the test split.
    """
    state = training.state
    return {
        **evaluation.summary(),
        "calibration": evaluation.calibration(),
        "decision": training.posthoc.summary() if training.posthoc else None,
        "epochs": state.epoch,
        "best_epoch": state.best_epoch,
        "stopped_by": training.stopped_by or "epochs",
        "validation": state.history[state.best_epoch - 1].get("validation"),
        "seconds": state.elapsed,
        "training_seconds": state.total.seconds,
        "images_per_second": state.total.images_per_second,
        "data_wait_share": state.total.wait_fraction,
        "resolution": training.config.data.final_resolution,
        "parameters": state.parameter_count,
        "class_counts": training.data.counts.tolist(),
        "model": training.config.model.name,
        "dataset": training.data.manifest.name,
    }
