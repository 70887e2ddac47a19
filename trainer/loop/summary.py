"""The results of a run: metrics, predictions, report and time profile."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from shards.atomic import replace_file, write_file
from trainer.checkpoint.run_dir import RunDirectory
from trainer.evaluate.evaluator import Evaluation
from trainer.loop.state import Training
from trainer.report import run_page
from trainer.runtime.profiler import TimeProfile, format_profile


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
    with replace_file(run_dir.predictions) as file:
        np.savez_compressed(file, **vars(evaluation.predictions))
    data = training.data
    run_page.write(run_dir.path, data.manifest, data.test_store, summary, training.state.history)
    run_dir.write_summary(summary)
    return summary


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
        "model": training.config.model.name,
        "dataset": training.data.manifest.name,
    }
