"""Training of a recipe, from its settings to its report."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from shards.atomic import write_file
from shards.remote.sets import resolve_dataset
from trainer.checkpoint import io as checkpoint
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
from trainer.runtime import rendezvous
from trainer.runtime.distributed import World, init_distributed, report_errors_on_main
from trainer.runtime.env_info import collect_env_info
from trainer.runtime.loggers import MetricLogger, check_installed, open_loggers
from trainer.runtime.profiler import TimeProfile, format_profile


def train(path: Path, overrides: list[str], dry: bool) -> int:
    """Train a recipe and report.

    Args:
        path: YAML file of settings.
        overrides: Settings that replace the file's, as `key=value`.
        dry: Show what would run, take one step, and stop.

    Returns:
        The exit status.

    Raises:
        UserError: For settings or data that cannot be used.
    """
    is_main_process = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(
        level=logging.WARNING if is_main_process else logging.ERROR, format="%(levelname)s: %(message)s"
    )
    with report_errors_on_main():
        settings = config.load(path, overrides)
        if is_main_process:
            for line in settings.settings_without_effect():
                print(f"warning: {line}", file=sys.stderr)
        check_installed(settings)
        resolve_dataset(settings.data.shards)  # before ranks wait for each other, as a download may take longer
        with init_distributed(settings.device, settings.trainer.timeout_minutes) as world:
            settings = resolve_auto(settings, world.device)
            data = open_data(settings, world)
            if dry:
                return dry_run(settings, data, world)
            return run(settings, data, world)


def run(settings: Config, data: TrainingData, world: World) -> int:
    """Train in a new run directory, or resume in an existing one; returns the exit status."""
    run_dir, resuming = world.run_on_main(lambda: choose_run_dir(settings, rendezvous.get_run_dir_of_job(settings.run)))
    saved, source = world.run_on_main(lambda: _load_newest(run_dir, settings, data)) if resuming else (None, None)
    if resuming and world.run_on_main(run_dir.summary_path.exists):
        if world.is_main_process:
            print(f"run already complete: {run_dir.path}")
            console.print_summary(run_dir.read_summary(), run_dir)
        return 0
    with contextlib.ExitStack() as stack:
        world.run_on_main(lambda: stack.enter_context(run_dir.lock()))
        world.run_on_main(lambda: rendezvous.set_run_dir_of_job(settings.run, run_dir.path))
        training = make_training(settings, data, world, resuming)
        if saved is not None:
            resume.restore(training, saved)
        world.run_on_main(lambda: _begin(training, run_dir, source))
        return _fit(training, run_dir, source)


def dry_run(settings: Config, data: TrainingData, world: World) -> int:
    """Print what would run and take one step on real data; writes nothing but the input statistics."""
    training = make_training(settings, data, world)
    if world.is_main_process:
        console.print_plan(training)
    training.forward.train()
    with contextlib.closing(data.train.batches()) as batches:
        batch = next(batches)
        start = time.perf_counter()
        loss = float(engine.train_step(training, batch, 1, True)) / len(batch.labels)
    if world.is_main_process:
        print(f"one step      loss {loss:.4f}, {time.perf_counter() - start:.1f} s")
    return 0


def _load_newest(run_dir: RunDirectory, settings: Config, data: TrainingData) -> tuple[dict[str, Any], Path]:
    """The checkpoint to resume, and its path."""
    saved, path = checkpoint.load_newest(run_dir.checkpoints)
    checkpoint.check_fits(saved, settings, data.classes, data.digest, path)
    return saved, path


def _begin(training: Training, run_dir: RunDirectory, source: Path | None) -> None:
    """Write settings and environment, and print the head."""
    stamp = collect_env_info(training.world.device) | {
        "ranks": training.world.size,
        "backend": f"{training.data.backend} ({training.data.backend_reason})",
        "data": training.data.digest,
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }
    run_dir.begin(training.config, stamp)
    run_dir.write_history(training.state.history)
    console.print_head(training, run_dir, source)


def _fit(training: Training, run_dir: RunDirectory, source: Path | None) -> int:
    """Train, test and report; returns the exit status."""
    is_main_process = training.world.is_main_process
    loggers = open_loggers(training.config, run_dir.path, training.state.history) if is_main_process else []
    try:
        evaluation = engine.fit(training, run_dir, loggers, source)
        if is_main_process:
            _report(training, evaluation, run_dir, loggers)
    except engine.Stopped as stop:
        if is_main_process:
            _write_profile(training, run_dir)
            ended = stop.epoch == training.config.trainer.epochs
            place = "before the test" if ended else f"in epoch {stop.epoch + 1} after step {stop.step}"
            print(f"stopped {place}; go on with: resume=auto run.dir={run_dir.path}", flush=True)
        return 128 + stop.signum
    finally:
        for logger in loggers:
            logger.close()
    return 0


def _report(training: Training, evaluation: Evaluation, run_dir: RunDirectory, loggers: list[MetricLogger]) -> None:
    """Write profile, predictions, report and, last, the summary: a run with a summary is complete."""
    _write_profile(training, run_dir)
    summary = summarize(training, evaluation)
    predictions = evaluation.predictions
    assert predictions is not None
    np.savez_compressed(run_dir.predictions, **vars(predictions))
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
