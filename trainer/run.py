"""Train a recipe and report.

python -m trainer.run configs/quickstart.yaml [key=value ...] [--dry-run]
torchrun --nproc_per_node=2 -m trainer.run configs/byclass.yaml
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from shards.atomic import write_file
from shards.cli import run_command
from shards.remote.sets import resolve_dataset
from trainer import checkpoint, config, engine, job, resume, run_directory
from trainer.arithmetic import with_precision
from trainer.data import TrainingData, open_data
from trainer.distributed import World, join, spoken_once
from trainer.evaluate import Evaluation
from trainer.phases import Phase
from trainer.report import run_page
from trainer.run_directory import RunDirectory
from trainer.runtime.env_info import environment
from trainer.runtime.loggers import check_installed, open_sinks
from trainer.runtime.profiler import TimeProfile, table
from trainer.section import listing
from trainer.settings import Config
from trainer.training import Training, make_training


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.run",
        description="Train a recipe and report.",
        epilog=f"settings (in the file, or key=value):\n{listing(config.settings())}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", type=Path, metavar="CONFIG", help="YAML file of settings, for instance configs/...")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the file's")
    parser.add_argument("--dry-run", action="store_true", help="show what would run, take one step, and stop")
    return parser.parse_intermixed_args()


def main() -> int:
    arguments = parse_arguments()
    first = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.WARNING if first else logging.ERROR, format="%(levelname)s: %(message)s")
    with spoken_once():
        settings = config.load(arguments.config, arguments.overrides)
        if first:
            for line in settings.without_effect():
                print(f"warning: {line}", file=sys.stderr)
        check_installed(settings)
        resolve_dataset(settings.data.shards)  # fetching takes its time, and ranks that have joined wait only so long
        with join(settings.device, settings.trainer.timeout_minutes) as world:
            settings = with_precision(settings, world.device)
            data = open_data(settings, world)
            if arguments.dry_run:
                return dry_run(settings, data, world)
            return run(settings, data, world)


def run(settings: Config, data: TrainingData, world: World) -> int:
    """Train in a new run directory, or go on in one that is there; returns the exit status."""
    directory, resuming = world.on_first(lambda: run_directory.choose(settings, job.recall_directory(settings.run)))
    state, source = world.on_first(lambda: _newest(directory, settings, data)) if resuming else (None, None)
    if resuming and world.on_first(directory.summary_path.exists):
        if world.speaks:
            print(f"{directory.path} is finished already")
            print_summary(directory.read_summary(), directory)
        return 0
    with contextlib.ExitStack() as held:
        world.on_first(lambda: held.enter_context(directory.held()))
        world.on_first(lambda: job.remember_directory(settings.run, directory.path))
        training = make_training(settings, data, world, resuming)
        if state is not None:
            resume.restore(training, state)
        world.on_first(lambda: _begin(training, directory, source))
        return _fit_and_report(training, directory, source)


def _begin(training: Training, directory: RunDirectory, source: Path | None) -> None:
    """Write down what is about to run, and say it. source: the checkpoint that it goes on from."""
    stamp = environment(training.world.device) | {
        "ranks": training.world.size,
        "backend": f"{training.data.backend} ({training.data.backend_reason})",
        "data": training.data.digest,
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }
    directory.begin(training.config, stamp)
    directory.write_history(training.history)
    print_head(training, directory, source)


def _fit_and_report(training: Training, directory: RunDirectory, source: Path | None) -> int:
    speaks = training.world.speaks
    sinks = open_sinks(training.config, directory.path, training.history) if speaks else []
    try:
        evaluation = engine.fit(training, directory, sinks, source)
        if speaks:
            _write_profile(training, directory)
            summary = summarise(training, evaluation)
            predictions = evaluation.predictions
            assert predictions is not None
            np.savez_compressed(directory.predictions, **vars(predictions))
            run_page.write(directory.path, training.data.test_store, summary, training.history)
            for sink in sinks:
                sink.summary(summary)
            directory.write_summary(summary)  # last: where it stands, the run is finished
            print_summary(summary, directory)
    except engine.Stopped as stop:
        if speaks:
            _write_profile(training, directory)
            ended = stop.epoch == training.config.trainer.epochs
            place = "before the test" if ended else f"in epoch {stop.epoch + 1} after step {stop.step}"
            print(f"stopped {place}; go on with: resume=auto run.dir={directory.path}", flush=True)
        return 128 + stop.signum
    finally:
        for sink in sinks:
            sink.close()
    return 0


def _write_profile(training: Training, directory: RunDirectory) -> None:
    training.trace.finish(directory.trace)
    if isinstance(training.profile, TimeProfile):
        figures = training.profile.figures()
        write_file(directory.profile, json.dumps(figures, indent=1) + "\n")
        print(table(figures), flush=True)


def summarise(training: Training, evaluation: Evaluation) -> dict[str, Any]:
    """The figures of `summary.json`: of the test part, with those of the best epoch's validation beside them."""
    finished = training.finished
    return {
        **evaluation.summary(),
        "calibration": evaluation.calibration(),
        "decision": training.decision.summary() if training.decision else None,
        "epochs": training.epoch,
        "best_epoch": training.best_epoch,
        "validation": training.history[training.best_epoch - 1].get("validation"),
        "seconds": training.elapsed,
        "training_seconds": finished.seconds,
        "images_per_second": finished.images_per_second,
        "data_wait_share": finished.wait_share,
        "resolution": training.config.data.final_resolution,
        "parameters": _parameters(training),
        "model": training.config.model.name,
        "dataset": training.data.manifest.name,
    }


def print_head(training: Training, directory: RunDirectory, source: Path | None) -> None:
    data, settings = training.data, training.config
    if settings.loader.batch_size > len(data.train.samples):
        print(
            f"warning: loader.batch_size={settings.loader.batch_size} is more than all training images; an epoch is "
            "one smaller batch",
            file=sys.stderr,
        )
    validation = len(data.validation.sampler.samples) if data.validation else 0
    print(
        f"{data.manifest.name}: {len(data.train.samples):,} training, {validation:,} validation, "
        f"{len(data.test.sampler.samples):,} test images of {len(data.classes)} classes\n"
        f"{_by_phase(data, lambda phase: f'{data.train.steps(phase.first):,} steps an epoch')}, "
        f"{_by_phase(data, lambda phase: f'{phase.batch_size:,} images each')}\n"
        f"{settings.model.name} at {_by_phase(data, lambda phase: f'{phase.resolution}x{phase.resolution}')}, "
        f"{_parameters(training):,} parameters, on {training.world.device} in {settings.trainer.precision} "
        f"({training.world.size} {'rank' if training.world.size == 1 else 'ranks'}); "
        f"loader {data.backend}: {data.backend_reason}\n"
        f"{directory.path}"
        + (f", going on from epoch {training.epoch + 1} after step {training.step} ({source.name})" if source else ""),
        flush=True,
    )


def print_summary(summary: dict[str, Any], directory: RunDirectory) -> None:
    validation = summary["validation"]
    print(
        f"test        accuracy {summary['accuracy']:.2%}  macro F1 {summary['macro_f1']:.2%}  "
        f"weighted F1 {summary['weighted_f1']:.2%}  ({summary['samples']:,} images)"
    )
    calibration = summary["calibration"]
    before = f" ({calibration['ece_before']:.2%} before the temperature {calibration['temperature']:.2f})"
    print(f"calibration error {calibration['ece']:.2%}{before if calibration['temperature'] != 1 else ''}")
    if validation:
        print(
            f"validation  accuracy {validation['accuracy']:.2%}  macro F1 {validation['macro_f1']:.2%}  "
            f"weighted F1 {validation['weighted_f1']:.2%}  (epoch {summary['best_epoch']}, the best)"
        )
    decision = summary.get("decision")
    if decision and decision["tau"]:
        before, after = decision["validation_as_learned"], decision["validation"]
        print(
            f"decision    tau {decision['tau']:g}: validation accuracy {before['accuracy']:.2%} to "
            f"{after['accuracy']:.2%}, macro F1 {before['macro_f1']:.2%} to {after['macro_f1']:.2%}"
        )
    print(
        f"training    {summary['images_per_second']:,.0f} images/s  data wait {summary['data_wait_share']:.1%}  "
        f"{summary['training_seconds']:.0f} s\nreport      {directory.report}"
    )


def dry_run(settings: Config, data: TrainingData, world: World) -> int:
    """Print what would run, take one step on real data, and stop; nothing is written but the statistics."""
    training = make_training(settings, data, world)
    if world.speaks:
        print(settings.to_yaml())
        epochs = range(settings.trainer.epochs)
        height, width, channels = data.spec.image_shape
        raw = f"picture files, {channels} channels" if data.spec.encoded else f"{height}x{width}x{channels}"

        def model_input(phase: Phase) -> str:
            share = -(-phase.batch_size // world.size)
            return f"[{share}, {channels}, {phase.resolution}, {phase.resolution}] a rank"

        def steps(phase: Phase) -> str:
            count = data.train.steps(phase.first)
            return f"{count:,} an epoch, {-(-count // settings.optim.grad_accumulation):,} updates"

        print(
            f"raw images    {raw}, {'transposed' if data.spec.transposed else 'upright'}\n"
            f"model input   {_by_phase(data, model_input)}, "
            f"mean {_numbers(data.spec.mean)}, deviation {_numbers(data.spec.std)}\n"
            f"classes       {len(data.classes)}, weights {float(training.class_weights.min()):.3f} .. "
            f"{float(training.class_weights.max()):.3f}\n"
            f"parameters    {_parameters(training):,}\n"
            f"steps         {_by_phase(data, steps)}; "
            f"{sum(map(data.train.steps, epochs)):,} in {settings.trainer.epochs} epochs\n"
            f"loader        {data.backend}: {data.backend_reason}",
            flush=True,
        )
    training.forward.train()
    with contextlib.closing(data.train.batches()) as batches:
        batch = next(batches)
        start = time.perf_counter()
        loss = float(engine.train_step(training, batch, window=1, updates=True)) / len(batch.labels)
    if world.speaks:
        print(f"one step      loss {loss:.4f}, {time.perf_counter() - start:.1f} s")
    return 0


def _by_phase(data: TrainingData, describe: Callable[[Phase], str]) -> str:
    """A phrase about each phase that says another than the one before it: `48x48, from epoch 5 on 112x112`."""
    said = [(phase.first, describe(phase)) for phase in data.train.phases]
    new = [words for before, words in zip([None, *said], said, strict=False) if before is None or before[1] != words[1]]
    return ", ".join(words if first == 0 else f"from epoch {first + 1} on {words}" for first, words in new)


def _newest(directory: RunDirectory, settings: Config, data: TrainingData) -> tuple[dict[str, Any], Path]:
    """The checkpoint to go on from, and its path."""
    state, path = checkpoint.load_newest(directory.checkpoints)
    checkpoint.check_fits(state, settings, data.classes, data.digest, path)
    return state, path


def _parameters(training: Training) -> int:
    return sum(parameter.numel() for parameter in training.model.parameters())


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.4f}" for value in values)


if __name__ == "__main__":
    run_command(main)
