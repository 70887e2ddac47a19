"""Training without output, and a loader with a fixed number of steps."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Generator
from dataclasses import replace

from pipeline.loader import Batch
from trainer.checkpoint.run_dir import RunDirectory
from trainer.data.resolution_schedule import TrainingLoader
from trainer.evaluate.evaluator import Evaluation
from trainer.loop import engine
from trainer.loop.state import Training


class FixedStepLoader(TrainingLoader):
    """A loader whose epochs have a fixed number of steps, each continuing in the passes of the previous one."""

    def __init__(self, loader: TrainingLoader, steps: int) -> None:
        self._loader = loader
        self._steps = steps
        self.stages, self.window, self.window_of_shards = loader.stages, loader.window, loader.window_of_shards
        self.timed, self.samples = loader.timed, loader.samples

    def steps(self, epoch: int) -> int:
        return self._steps

    def batches(self, epoch: int = 0, first_step: int = 0) -> Generator[Batch, None, None]:
        steps_per_pass = self._loader.steps(0)
        step = first_step
        while step < self._steps:
            number, first = divmod(epoch * self._steps + step, steps_per_pass)
            last = min(self._steps, step + steps_per_pass - first)
            with contextlib.closing(self._loader.batches(number, first)) as batches:
                # `map` keeps no reference to a batch while the next one is made. With the range first, it does not take
                # a batch after the last step.
                yield from map(lambda step, batch: replace(batch, step=step), range(step, last), batches)
            step = last


def fit_and_test(training: Training, directory: RunDirectory) -> Evaluation:
    """Train in a run directory without output; return the test metrics of the epoch that was selected on validation."""
    with (
        directory.lock(),
        contextlib.redirect_stdout(io.StringIO()),
        engine.open_services(training, directory, loggers=[]) as services,
    ):
        engine.fit(training, services)
        return engine.evaluate_best(training, services)
