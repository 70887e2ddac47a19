"""The contents of `summary.json`."""

from __future__ import annotations

from typing import Any

from trainer.evaluate.evaluator import Evaluation
from trainer.loop.state import Training


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
        "validation": state.history[state.best_epoch - 1].get("validation"),
        "seconds": state.elapsed,
        "training_seconds": state.total.seconds,
        "images_per_second": state.total.images_per_second,
        "data_wait_share": state.total.wait_fraction,
        "resolution": training.config.data.final_resolution,
        "parameters": state.parameter_count,
        "model": training.config.model.name,
        "dataset": training.data.manifest.name,
    }
