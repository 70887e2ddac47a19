"""A trial of a search: the same settings trained some times, judged on the validation part, never on the test part."""

from __future__ import annotations

import contextlib
import gc
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch

from shards.errors import UserError
from trainer import checkpoint, config, engine, resume, run_directory
from trainer.arithmetic import with_precision
from trainer.data import TrainingData, open_data
from trainer.distributed import World
from trainer.nan_guard import NonFiniteLossError
from trainer.runtime.env_info import environment
from trainer.runtime.loggers import Sink
from trainer.settings import Config
from trainer.state import make_training
from trainer.tune.search_space import Search
from trainer.tune.study import Study, Trial


class GivenUp(Exception):
    """The trial is behind the others."""


class OutOfTime(Exception):
    """The trial is to be left as it is; another process goes on with it."""


class Reports:
    """A sink that tells the study each epoch's validation figure, and ends the training if it is to end."""

    def __init__(
        self, trial: Trial, earlier: list[list[float]], settings: Config, repeats: int, is_over: Callable[[], bool]
    ) -> None:
        """earlier: figures by epoch of the repeats before this one. is_over: whether the time is up."""
        self._trial = trial
        self._earlier = earlier
        self._settings = settings.trainer
        self._repeats = repeats
        self._is_over = is_over
        self._out: TextIO = sys.stdout

    def epoch(self, record: dict[str, Any]) -> None:
        """Report the mean of the repeats at this epoch. Raises `GivenUp` or `OutOfTime`."""
        epoch, figure = record["epoch"], record["validation"][self._settings.monitor]
        epochs, repeat = self._settings.epochs, len(self._earlier)
        of_repeats = f", repeat {repeat + 1}/{self._repeats}" if self._repeats > 1 else ""
        print(
            f"trial {self._trial.number}{of_repeats}, epoch {epoch}/{epochs}: {self._settings.monitor} {figure:.2%}",
            file=self._out,
            flush=True,
        )
        mean = float(np.mean([*(before[epoch - 1] for before in self._earlier), figure]))
        if self._trial.report(repeat * epochs + epoch, mean):
            raise GivenUp
        if self._is_over():
            raise OutOfTime

    def summary(self, summary: dict[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass


def train_trial(
    study: Study, trial: Trial, wanted: Search, base: Config, world: World, is_over: Callable[[], bool]
) -> None:
    """Train a trial in its directory, or go on there, and tell the study how it ended.

    base: the settings but for those that are searched and the fraction. is_over: whether to leave it unfinished after
    an epoch. Raises `OutOfTime` then, and `Stopped` after a signal; both leave it to be gone on with.
    """
    summaries: list[dict[str, Any]] = []
    try:
        config.changed(base, trial.values, f"trial {trial.number}")
    except UserError as error:
        trial.fail(error.found)  # each value is a good one, and together they contradict each other
        return
    try:
        for repeat in range(wanted.repeats):
            directory = trial.directory / f"repeat-{repeat + 1}"
            own = {"seed": base.seed + repeat, "data.train_fraction": wanted.fraction}
            own |= {"run.dir": str(directory), "resume": "auto"}
            own["checkpoint.resume_allow_changes"] = ["trainer.precision"]  # it may go on on another device
            settings = config.changed(base, trial.values | own, f"trial {trial.number}")
            settings = with_precision(settings, world.device)
            sink = Reports(trial, [summary["figures"] for summary in summaries], settings, wanted.repeats, is_over)
            summaries.append(_train(settings, study, world, [sink]))
            trial.note(figures=[summary["figure"] for summary in summaries])
    except GivenUp:
        trial.give_up("behind the others")
    except NonFiniteLossError as error:
        trial.give_up(error.found)
    except torch.cuda.OutOfMemoryError:
        trial.fail("the device's memory did not suffice")
    except BaseException:
        trial.note(starts=0)  # this process is alive to leave it: stopped, out of time or refused by the user's mistake
        raise
    else:
        trial.complete([summary["figure"] for summary in summaries])
    for path in trial.directory.glob("repeat-*"):
        for weights in (path / "checkpoints", path / "nonfinite"):
            shutil.rmtree(weights, ignore_errors=True)


def _train(settings: Config, study: Study, world: World, sinks: list[Sink]) -> dict[str, Any]:
    """Train once, or go on, in `run.dir`; the best validation figure, and those of all epochs."""
    directory, resuming = run_directory.choose(settings)
    if directory.summary_path.exists():
        return directory.read_summary()
    # Beside the directory: one that holds a file and no settings would be taken for something else than a run.
    with directory.lock(), open(directory.path.with_suffix(".log"), "a") as log, _into(log):
        data = _open(settings, study, world)
        training = make_training(settings, data, world, resuming)
        source: Path | None = None
        if resuming:
            state, source = checkpoint.load_newest(directory.checkpoints)
            checkpoint.check_fits(state, settings, data.classes, data.digest, source)
            resume.restore(training, state)
        directory.begin(settings, environment(world.device) | {"backend": data.backend, "data": data.digest})
        directory.write_history(training.state.history)
        for record in training.state.history[-1:]:  # the process may have died before it was told
            for sink in sinks:
                sink.epoch(record)
        engine.fit_without_test(training, directory, sinks, source)
    figures = [record["validation"][settings.trainer.monitor] for record in training.state.history]
    summary = {
        "figure": training.state.best,
        "figures": figures,
        "validation": training.state.history[training.state.best_epoch - 1]["validation"],
        "best_epoch": training.state.best_epoch,
        "epochs": training.state.epoch,
        "seconds": training.state.elapsed,
        "images_per_second": training.state.total.images_per_second,
    }
    directory.write_summary(summary)
    del training, data
    gc.collect()
    if settings.trainer.compile != "off":
        torch.compiler.reset()  # compiled code of models that are gone counts towards its limits
    return summary


def _open(settings: Config, study: Study, world: World) -> TrainingData:
    with study.alone():  # statistics of the model input are measured once and written by one
        data = open_data(settings, world)
    study.check_data(data.digest)
    return data


@contextlib.contextmanager
def _into(log: TextIO) -> Any:
    """Write what a training says into its log; bars belong to a person at a terminal."""
    with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        yield
