"""Console output of a run: head, plan of a dry run, metrics."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.sampler import equal_batch_size
from pipeline.transforms.preprocess import format_size
from shards.cli import plural
from shards.errors import quote
from trainer.checkpoint.run_dir import RunDirectory
from trainer.config.schema import TrainerConfig
from trainer.data.resolution_schedule import ResolutionStage
from trainer.data.training_data import TrainingData
from trainer.loop.state import Training
from trainer.models.precision import describe_precision
from trainer.runtime.progress import duration, epoch_name


def print_head(training: Training, run_dir: RunDirectory, source: Path | None) -> None:
    """Print data, steps, model, loader, directory, and the checkpoint that is resumed, if any."""
    data, settings = training.data, training.config
    _warn_of_batch_size(training)
    state, world = training.state, training.world
    resumed = f", resuming from epoch {state.epoch + 1} after step {state.step} ({source.name})" if source else ""
    validation = len(data.validation.sampler.samples) if data.validation else 0
    steps = _by_stage(data, lambda stage: f"{data.train.steps(stage.first):,} steps/epoch")
    sizes = _by_stage(data, lambda stage: f"batch size {_batch_size(data, stage):,}")
    print(
        f"{data.manifest.name}: {len(data.train.samples):,} training, {validation:,} validation, "
        f"{len(data.test.sampler.samples):,} test images, {len(data.classes)} classes\n"
        f"{steps}, {sizes}\n"
        f"{settings.model.name} at {_by_stage(data, lambda stage: format_size(stage.resolution))}, "
        f"{state.parameter_count:,} parameters, on {world.device} in "
        f"{describe_precision(settings.trainer, world.device)} "
        f"({plural(world.size, 'rank')}); loader {data.backend}: {data.backend_reason}\n"
        f"{run_dir.path}{resumed}",
        flush=True,
    )


def _warn_of_batch_size(training: Training) -> None:
    size, samples = training.config.loader.batch_size, len(training.data.train.samples)
    if size > samples:
        print(
            f"warning: loader.batch_size={size} exceeds the {samples:,} training images; an epoch is one batch of them",
            file=sys.stderr,
        )


def print_plan(training: Training) -> None:
    """Print all settings, the shape of the model input and the number of steps (`--dry-run`)."""
    _warn_of_batch_size(training)
    settings, data, world = training.config, training.data, training.world
    print(settings.to_yaml())
    epochs, minutes = settings.trainer.epochs, settings.trainer.minutes
    end = f"{sum(map(data.train.steps, range(epochs))):,} in {epochs} epochs" if minutes is None else f"{minutes:g} min"
    height, width, channels = data.spec.image_shape
    raw = f"image files, {channels} channels" if data.spec.encoded else f"{height}x{width}x{channels}"
    weights = training.class_weights

    def model_input(stage: ResolutionStage) -> str:
        per_rank = -(-_batch_size(data, stage) // world.size)
        return f"[{per_rank}, {channels}, {', '.join(map(str, stage.input_size))}] per rank"

    def steps(stage: ResolutionStage) -> str:
        count = data.train.steps(stage.first)
        return f"{count:,} per epoch, {plural(-(-count // settings.optim.grad_accumulation), 'optimizer step')}"

    print(
        f"raw images    {raw}, {'transposed' if data.spec.transposed else 'upright'}\n"
        f"model input   {_by_stage(data, model_input)}, "
        f"mean {_numbers(data.spec.mean)}, std {_numbers(data.spec.std)}\n"
        f"classes       {len(data.classes)}, weights {float(weights.min()):.3f} .. {float(weights.max()):.3f}\n"
        f"parameters    {training.state.parameter_count:,}\n"
        f"steps         {_by_stage(data, steps)}; {end}\n"
        f"loader        {data.backend}: {data.backend_reason}",
        flush=True,
    )


def print_epoch(record: dict[str, Any], settings: TrainerConfig, is_best: bool) -> None:
    """Print the record of an epoch in one line."""
    validation, has_metrics = record.get("validation"), "train_accuracy" in record
    training = {"accuracy": record["train_accuracy"], "macro_f1": record["train_macro_f1"]} if has_metrics else None
    print(
        f"{epoch_name(record['epoch'], settings.fixed_epochs)}  loss {record['train_loss']:.4f}"
        f"{f'  training {_metrics(training)}' if training else ''}"
        f"{f'  validation {_metrics(validation)}' if validation else ''}  lr {record['lr']:.2e}  "
        f"{record['images_per_second']:,.0f} images/s  data wait {record['data_wait_share']:.1%}  "
        f"{duration(record['seconds'])}{'  best' if is_best and validation else ''}",
        flush=True,
    )


def print_summary(summary: dict[str, Any], run_dir: RunDirectory) -> None:
    """Print the metrics of `summary.json`."""
    top5 = f"  top-5 accuracy {summary['top5_accuracy']:.2%}" if "top5_accuracy" in summary else ""
    print(
        f"test        {_metrics(summary)}  weighted F1 {summary['weighted_f1']:.2%}  "
        f"balanced accuracy {summary['balanced_accuracy']:.2%}{top5}  ({summary['samples']:,} images)"
    )
    calibration = summary["calibration"]
    before = f" ({calibration['ece_before']:.2%} before temperature scaling, T = {calibration['temperature']:.2f})"
    print(f"calibration error {calibration['ece']:.2%}{before if calibration['temperature'] != 1 else ''}")
    if validation := summary["validation"]:
        best = f"weighted F1 {validation['weighted_f1']:.2%}  (best epoch {summary['best_epoch']})"
        print(f"validation  {_metrics(validation)}  {best}")
    decision = summary.get("decision")
    if decision and decision["tau"]:
        before, after = _metrics(decision["validation_as_learned"]), _metrics(decision["validation"])
        print(f"logit adjustment  tau {decision['tau']:g}: validation {before} -> {after}")
    if (setting := summary.get("stopped_by", "epochs")) != "epochs":
        print(f"stopped     after epoch {summary['epochs']} by trainer.{setting}")
    print(
        f"training    {summary['images_per_second']:,.0f} images/s  data wait {summary['data_wait_share']:.2%}  "
        f"{summary['training_seconds']:.0f} s\nreport      {run_dir.report}"
    )


def print_stopped(training: Training, run_dir: RunDirectory) -> None:
    """Print where a signal stopped the run, and how to resume it."""
    state = training.state
    position = "before the test" if training.stopped_by else f"in epoch {state.epoch + 1} after step {state.step}"
    print(f"stopped {position}; resume with: resume=auto {quote(f'run.dir={run_dir.path}')}", flush=True)


def _metrics(metrics: dict[str, Any]) -> str:
    return f"accuracy {metrics['accuracy']:.2%}  macro F1 {metrics['macro_f1']:.2%}"


def _batch_size(data: TrainingData, stage: ResolutionStage) -> int:
    return equal_batch_size(len(data.train.samples), stage.batch_size)


def _by_stage(data: TrainingData, describe: Callable[[ResolutionStage], str]) -> str:
    """One phrase for each stage whose phrase differs from the stage before: `48x48, from epoch 5 on 112x112`."""
    parts = [(next(stages).first, phrase) for phrase, stages in itertools.groupby(data.train.stages, key=describe)]
    return ", ".join(phrase if first == 0 else f"from epoch {first + 1} on {phrase}" for first, phrase in parts)


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.4f}" for value in values)
