"""A trial of a search: one training per seed, evaluated on the validation split, never on the test split."""

from __future__ import annotations

import contextlib
import gc
import shutil
import sys
from collections.abc import Callable
from typing import Any, TextIO

import numpy as np
import torch

from shards.atomic import check_is_file
from shards.errors import UserError
from trainer.checkpoint import run_files
from trainer.checkpoint.run_dir import choose_run_dir
from trainer.config import load as config
from trainer.config.schema import Config
from trainer.data.training_data import open_data
from trainer.loop import engine, resume
from trainer.loop.nan_guard import NonFiniteLossError
from trainer.loop.step_check import StepMemoryError
from trainer.models.auto import resolve_auto
from trainer.runtime.distributed import World
from trainer.runtime.env_info import collect_env_info
from trainer.runtime.loggers.base import MetricLogger
from trainer.runtime.loggers.open import open_loggers
from trainer.tune.search_space import SearchConfig
from trainer.tune.study import RunningTrial, SharedStudy, State, optuna


class _Summary(run_files.Schema):
    """`summary.json` of a trial."""

    metric: run_files.Finite
    metrics: list[run_files.Finite]


class TrialPaused(Exception):
    """The time budget is exhausted; a later command resumes the trial."""


class RefusedTrial(Exception):
    """The values of a trial, each of which is valid, do not fit each other or the data."""


class TrialReporter(MetricLogger):
    """A metric logger that reports each epoch's validation metric to the study, and ends the training if it must."""

    def __init__(
        self, trial: RunningTrial, earlier: list[list[float]], settings: Config, is_over: Callable[[], bool]
    ) -> None:
        """Start to report a seed of a trial.

        Args:
            trial: The trial to report to.
            earlier: Metrics by epoch of the seeds before this one.
            settings: Settings of this training.
            is_over: Whether the time budget is exhausted.
        """
        self._trial = trial
        self._earlier = earlier
        self._settings = settings.trainer
        self._is_over = is_over
        self._out: TextIO = sys.stdout

    def log_epoch(self, record: dict[str, Any]) -> None:
        """Report the mean of the seeds at this epoch. Raises `TrialPruned` or `TrialPaused`."""
        epoch, name = record["epoch"], self._settings.monitor
        metric = record["validation"][name]
        head = f"trial {self._trial.number}, seed {len(self._earlier) + 1}, epoch {epoch}/{self._settings.epochs}"
        print(f"{head}: {name} {metric:.2%}", file=self._out, flush=True)
        mean = float(np.mean([*(before[:epoch][-1] for before in self._earlier), metric]))
        if self._trial.report(len(self._earlier) * self._settings.epochs + epoch, mean):
            raise optuna.TrialPruned
        if self._is_over():
            raise TrialPaused


def train_trial(
    study: SharedStudy,
    trial: RunningTrial,
    search: SearchConfig,
    base: Config,
    world: World,
    is_over: Callable[[], bool],
) -> None:
    """Train a trial in its directory, or resume it there, and report its result to the study.

    Args:
        study: The study.
        trial: A trial that this process holds.
        search: The search.
        base: The recipe with the settings of all trials.
        world: The process group.
        is_over: Whether to pause after an epoch.

    Raises:
        TrialPaused: `is_over` returned True. The trial can be resumed.
        Interrupted: A signal was received. The trial can be resumed.
    """
    summaries: list[dict[str, Any]] = []
    place = f"trial {trial.number}"
    try:
        config.replace_settings(base, trial.values, place)
    except UserError as error:
        trial.abort(State.FAIL, error.found)  # each value is valid, but not their combination
        return
    try:
        for seed in range(search.seeds_per_trial):
            own = {
                "seed": base.seed + seed,
                "data.train_fraction": search.train_fraction,
                "run.dir": str(trial.directory / f"seed-{seed + 1}"),
                "resume": "auto",
                "checkpoint.resume_allow_changes": ["trainer.precision"],  # it may be resumed on another device
            }
            settings = resolve_auto(config.replace_settings(base, trial.values | own, place), world.device)
            reporter = TrialReporter(trial, [summary["metrics"] for summary in summaries], settings, is_over)
            summaries.append(_train(settings, study, world, reporter))
            trial.note(scores=[summary["metric"] for summary in summaries])
    except optuna.TrialPruned:
        trial.abort(State.PRUNED, "pruned")
    except NonFiniteLossError as error:
        trial.abort(State.PRUNED, error.found)
    except (torch.cuda.OutOfMemoryError, StepMemoryError):
        trial.abort(State.FAIL, "out of memory")
    except RefusedTrial as error:
        trial.abort(State.FAIL, str(error))
    except BaseException:
        trial.note(starts=0)  # the process did not die: it was stopped, out of time, or met an error of the user
        raise
    else:
        trial.complete([summary["metric"] for summary in summaries])
    for path in trial.directory.glob("seed-*"):
        for weights in (path / "checkpoints", path / "nonfinite"):
            shutil.rmtree(weights, ignore_errors=True)


def _train(settings: Config, study: SharedStudy, world: World, reporter: TrialReporter) -> dict[str, Any]:
    """Train once, or resume, in `run.dir`; returns the best validation metric, and those of all epochs."""
    directory, resuming = choose_run_dir(settings)
    if directory.summary_path.exists():
        return run_files.read_json(directory.summary_path, _Summary, f"rm {directory.summary_path}")
    with contextlib.ExitStack() as stack:
        stack.enter_context(directory.lock())
        # Beside the directory, because a directory that contains a file but no settings is not a run.
        path = directory.path.with_suffix(".log")
        check_is_file(path)
        log = stack.enter_context(open(path, "a", encoding="utf-8"))
        stack.enter_context(contextlib.redirect_stdout(log))
        stack.enter_context(contextlib.redirect_stderr(log))
        with study.exclusive():  # one process computes and writes the input statistics
            data = open_data(settings, world)
        study.check_data(data.identity)
        try:
            training, source = resume.open_training(settings, data, world, directory, resuming)
        except UserError as error:
            if type(error) is not UserError:  # an error of a file or of the machine
                raise
            raise RefusedTrial(error.found) from None
        environment = collect_env_info(world.device) | {"backend": data.backend, "data": data.identity}
        directory.begin(settings, environment, training.state.history)
        history, updates = training.state.history, training.state.updates
        loggers = open_loggers(settings, directory.path, history, updates, study.directory.name)
        for logger in loggers:
            stack.callback(logger.close)
        for record in history[-1:]:  # the process may have died before it reported this epoch
            reporter.log_epoch(record)
        # The reporter is the last, as it may end the trial.
        with engine.open_services(training, directory, [*loggers, reporter], source) as services:
            engine.fit(training, services)
        summary = {
            "metric": training.state.best,
            "metrics": training.metrics(),
            "validation": training.state.history[training.state.best_epoch - 1]["validation"],
        }
        for logger in loggers:
            logger.log_summary(summary)
    directory.write_summary(summary)
    del training, data
    gc.collect()
    if settings.trainer.compile != "off":
        torch.compiler.reset()  # frees what compiled code of deleted models holds, before data is placed on a GPU
    return summary
