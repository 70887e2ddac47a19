"""Train a recipe: settings, data, run directory, training loop, report."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
from pathlib import Path

import numpy as np

from shards.atomic import write_file
from shards.remote.datasets import resolve_dataset
from trainer.checkpoint import io as checkpoint
from trainer.checkpoint.compat import check_fits
from trainer.checkpoint.run_dir import RunDirectory, choose_run_dir
from trainer.config import load as config
from trainer.config.schema import Config
from trainer.data.training_data import TrainingData, open_data
from trainer.evaluate.evaluator import Evaluation
from trainer.loop import console, engine, resume
from trainer.loop.state import Training, make_training
from trainer.loop.summary import summarize
from trainer.models.auto import resolve_auto
from trainer.report import run_page
from trainer.runtime.distributed import World, init_distributed, report_errors_on_main
from trainer.runtime.env_info import collect_env_info
from trainer.runtime.loggers import MetricLogger, check_installed, open_loggers
from trainer.runtime.profiler import TimeProfile, format_profile
from trainer.runtime.rendezvous import get_run_dir_of_job, set_run_dir_of_job


def train(path: Path, overrides: list[str], is_dry_run: bool) -> int:
    """Train a recipe in a new run directory, or resume a run, and write its report.

    Args:
        path: YAML file of settings.
        overrides: Settings that replace the file's, as `key=value`.
        is_dry_run: Whether to print the plan, take one step, and stop.

    Returns:
        The exit status.

    Raises:
        UserError: Settings or data cannot be used.
    """
    with report_errors_on_main(), contextlib.ExitStack() as stack:
        settings = _load_settings(path, overrides)
        world = stack.enter_context(init_distributed(settings.device, settings.trainer.timeout_minutes))
        settings = resolve_auto(settings, world.device)
        data = open_data(settings, world)
        if is_dry_run:
            return dry_run(make_training(settings, data, world))
        run = _open_run(settings, data, world, stack)
        if run is None:
            return 0
        training, run_dir, source = run
        loggers = open_loggers(settings, run_dir.path, training.state.history) if world.is_main_process else []
        try:
            with engine.open_services(training, run_dir, loggers, source) as services:
                engine.fit(training, services)
                evaluation = engine.evaluate_best(training, services)
            if world.is_main_process:
                _report(training, evaluation, run_dir, loggers)
        except engine.Stopped as stop:
            if world.is_main_process:
                _write_profile(training, run_dir)
                is_trained = stop.epoch == settings.trainer.epochs
                position = "before the test" if is_trained else f"in epoch {stop.epoch + 1} after step {stop.step}"
                print(f"stopped {position}; resume with: resume=auto run.dir={run_dir.path}", flush=True)
            return 128 + stop.signum
        finally:
            for logger in loggers:
                logger.close()
        return 0


def dry_run(training: Training) -> int:
    """Print the plan and take one step on training data. No file is written, except the input statistics."""
    is_main_process = training.world.is_main_process
    if is_main_process:
        console.print_plan(training)
    training.forward.train()
    with contextlib.closing(training.data.train.batches()) as batches:
        batch = next(batches)
        start = time.perf_counter()
        loss = float(engine.train_step(training, batch, 1, True)) / len(batch.labels)
    if is_main_process:
        print(f"one step      loss {loss:.4f}, {time.perf_counter() - start:.1f} s")
    return 0


def _load_settings(path: Path, overrides: list[str]) -> Config:
    """Load the settings, print warnings about them, and download the data set if it is remote."""
    is_main_process = os.environ.get("RANK", "0") == "0"
    level = logging.WARNING if is_main_process else logging.ERROR
    logging.basicConfig(level=level, format="%(levelname)s: %(message)s")
    settings = config.load(path, overrides)
    if is_main_process:
        for line in settings.settings_without_effect():
            print(f"warning: {line}", file=sys.stderr)
    check_installed(settings)
    resolve_dataset(settings.data.shards)  # before ranks wait for each other: a download may exceed the timeout
    return settings


def _open_run(
    settings: Config, data: TrainingData, world: World, stack: contextlib.ExitStack
) -> tuple[Training, RunDirectory, Path | None] | None:
    """Choose and lock the run directory, load its checkpoint if it has one, and print the head.

    Returns:
        The training, its directory and the checkpoint that is resumed; None if the run is already complete.
    """
    run_dir, resuming = world.run_on_main(lambda: choose_run_dir(settings, get_run_dir_of_job(settings.run)))

    def load() -> tuple[dict, Path]:
        state, source = checkpoint.load_newest(run_dir.checkpoints)
        check_fits(state, settings, data.classes, data.digest, source)
        return state, source

    def begin() -> None:
        run_dir.begin(settings, _environment(training), training.state.history)
        console.print_head(training, run_dir, source)

    state, source = world.run_on_main(load) if resuming else (None, None)
    if resuming and world.run_on_main(run_dir.summary_path.exists):
        if world.is_main_process:
            print(f"run already complete: {run_dir.path}")
            console.print_summary(run_dir.read_summary(), run_dir)
        return None
    world.run_on_main(lambda: stack.enter_context(run_dir.lock()))
    world.run_on_main(lambda: set_run_dir_of_job(settings.run, run_dir.path))
    training = make_training(settings, data, world, resuming)
    if state is not None:
        resume.restore(training, state)
    world.run_on_main(begin)
    return training, run_dir, source


def _environment(training: Training) -> dict[str, object]:
    """Return the contents of `env.json`."""
    return collect_env_info(training.world.device) | {
        "ranks": training.world.size,
        "backend": f"{training.data.backend} ({training.data.backend_reason})",
        "data": training.data.digest,
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def _report(training: Training, evaluation: Evaluation, run_dir: RunDirectory, loggers: list[MetricLogger]) -> None:
    """Write profile, predictions, report and, last, the summary: a run with a summary is complete."""
    _write_profile(training, run_dir)
    summary = summarize(training, evaluation)
    np.savez_compressed(run_dir.predictions, **vars(evaluation.predictions))
    run_page.write(run_dir.path, training.data.test_store, summary, training.state.history)
    for logger in loggers:
        logger.log_summary(summary)
    run_dir.write_summary(summary)
    console.print_summary(summary, run_dir)


def _write_profile(training: Training, run_dir: RunDirectory) -> None:
    training.trace.finish(run_dir.trace)
    if isinstance(training.profile, TimeProfile):
        records = training.profile.summary()
        write_file(run_dir.profile, json.dumps(records, indent=1) + "\n")
        print(format_profile(records), flush=True)
