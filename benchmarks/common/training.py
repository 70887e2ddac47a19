"""Training without output."""

from __future__ import annotations

import contextlib
import io

from trainer.checkpoint.run_dir import RunDirectory
from trainer.evaluate.evaluator import Evaluation
from trainer.loop import engine
from trainer.loop.state import Training


def fit_and_test(training: Training, directory: RunDirectory) -> Evaluation:
    """Train in a run directory without output; return the test metrics of the epoch that was selected on validation."""
    with (
        directory.lock(),
        contextlib.redirect_stdout(io.StringIO()),
        engine.open_services(training, directory, loggers=[]) as services,
    ):
        engine.fit(training, services)
        return engine.evaluate_best(training, services)
