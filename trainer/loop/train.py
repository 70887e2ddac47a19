"""Train a recipe: settings, data, run directory, training loop, report."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

from pipeline.common.process_group import report_errors_on_main
from shards.credentials import redact
from shards.errors import first_line, os_errors_as_user_errors
from shards.remote.datasets import resolve_dataset
from trainer.checkpoint.run_dir import RunDirectory, choose_run_dir
from trainer.checkpoint.trained_model import load_trained_model
from trainer.config import load as config
from trainer.config.schema import Config
from trainer.data.training_data import open_data
from trainer.evaluate.evaluator import Evaluation
from trainer.loop import console, engine, resume
from trainer.loop.state import Training, make_training
from trainer.loop.step_check import check_batch_sizes, estimate_memory, explain_out_of_memory, memory_error
from trainer.loop.summary import prediction_images, write_profile, write_results
from trainer.loop.warm_up import warm_up
from trainer.models.auto import resolve_auto
from trainer.models.transfer import set_training_mode
from trainer.runtime.distributed import init_distributed
from trainer.runtime.env_info import collect_env_info
from trainer.runtime.loggers.base import MetricLogger
from trainer.runtime.loggers.open import check_installed, open_loggers
from trainer.runtime.output_errors import ignore_output_errors
from trainer.runtime.rendezvous import get_run_dir_of_job, send_heartbeats, set_run_dir_of_job
from trainer.runtime.signals import Interrupted

log = logging.getLogger(__name__)

_DRY_RUN_IMAGES = 64  # of a step whose batch does not fit in memory; it takes seconds on a CPU


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
    with ignore_output_errors(), report_errors_on_main(), contextlib.ExitStack() as stack:
        settings = _load_settings(path, overrides)
        world = stack.enter_context(init_distributed(settings.device, settings.trainer.timeout_minutes))
        settings = resolve_auto(settings, world.device)
        data = open_data(settings, world)
        if is_dry_run:
            return _dry_run(make_training(settings, data, world))
        run_dir, resuming = world.run_on_main(lambda: choose_run_dir(settings, get_run_dir_of_job(settings.run)))
        world.run_on_main(lambda: stack.callback(run_dir.discard_if_empty))
        training, source = resume.open_training(settings, data, world, run_dir, resuming)
        is_complete = resuming and training.find_end()
        if is_complete and world.run_on_main(run_dir.summary_path.exists):
            if world.is_main_process:
                print(f"run already complete: {run_dir.path}")
                console.print_summary(run_dir.read_summary(), run_dir)
            return 0
        world.run_on_main(lambda: stack.enter_context(run_dir.lock()))
        world.run_on_main(lambda: _begin(training, run_dir, source))
        loggers: list[MetricLogger] = []
        if world.is_main_process:
            loggers = open_loggers(settings, run_dir.path, training.state.history, training.state.updates)
        for logger in loggers:
            stack.callback(logger.close)
        try:
            with engine.open_services(training, run_dir, loggers, source) as services:
                with explain_out_of_memory(training):
                    seconds = warm_up(training)
                    if seconds and world.is_main_process:
                        print(f"warm-up     {seconds:.1f} s", flush=True)
                    engine.fit(training, services)
                evaluation = engine.evaluate_best(training, services)
        except Interrupted as stop:
            if world.is_main_process:
                write_profile(training, run_dir)
                console.print_stopped(training, run_dir)
            return 128 + stop.signum
        world.run_on_main(lambda: _finish(training, evaluation, run_dir, loggers))
        return 0


def _finish(training: Training, evaluation: Evaluation, run_dir: RunDirectory, loggers: list[MetricLogger]) -> None:
    """Write the results, then print them; runs on rank 0."""
    with os_errors_as_user_errors(run_dir.path):
        write_profile(training, run_dir)
        summary = write_results(training, evaluation, run_dir)
    if training.config.logging.uses_tracker:
        try:
            images = prediction_images(training, evaluation, load_trained_model(run_dir.path))
            for logger in loggers:
                logger.log_test(images)
        except Exception as error:  # the run is complete without them
            log.warning("no pictures of the predictions for loggers: %s", first_line(error))
    for logger in loggers:
        logger.log_summary(summary)
    console.print_summary(summary, run_dir)


def _dry_run(training: Training) -> int:
    """Print the plan and take one step on training data. No file is written, except the input statistics."""
    is_main_process = training.world.is_main_process
    if is_main_process:
        console.print_plan(training)
    check_batch_sizes(training)
    memory = estimate_memory(training)
    if not memory.fits:
        error = memory_error(str(memory), training, memory.fitting)
        if not memory.fitting:
            raise error
        size = min(memory.fitting, max(_DRY_RUN_IMAGES, 2 * training.world.size))
        if is_main_process:
            print(f"memory        {error.found}; {error.hint} fits. The step below has {size} images")
        smaller = config.replace_settings(training.config, {"loader.batch_size": size}, "memory")
        training.data = open_data(smaller, training.world)
    set_training_mode(training.forward)
    with contextlib.closing(training.data.train.batches()) as batches:
        batch = next(batches)
        start = time.perf_counter()
        with explain_out_of_memory(training):
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
    with send_heartbeats(timedelta(minutes=settings.trainer.timeout_minutes)):
        # Before ranks wait for each other in collectives: a download may exceed their timeout.
        resolve_dataset(settings.data.shards)
    return settings


def _begin(training: Training, run_dir: RunDirectory, source: Path | None) -> None:
    """Write settings, environment and earlier metrics, and print the head; runs on rank 0."""
    set_run_dir_of_job(training.config.run, run_dir.path)
    environment = collect_env_info(training.world.device) | {
        "ranks": training.world.size,
        "backend": f"{training.data.backend} ({training.data.backend_reason})",
        "data": training.data.identity,
        "command": redact(" ".join([Path(sys.argv[0]).name, *sys.argv[1:]])),
    }
    with os_errors_as_user_errors(run_dir.path):
        run_dir.begin(training.config, environment, training.state.history)
    console.print_head(training, run_dir, source)
