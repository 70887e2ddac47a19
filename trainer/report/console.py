"""What a run prints: its head, a line for each epoch, its metrics."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.checkpoint.run_dir import RunDirectory
from trainer.data.resolution_schedule import Phase
from trainer.data.training_data import TrainingData
from trainer.loop.state import Training


def print_head(training: Training, run_dir: RunDirectory, source: Path | None) -> None:
    """Print what is about to run: data, steps, model, loader, directory, and the checkpoint that is resumed."""
    data, settings = training.data, training.config
    if settings.loader.batch_size > len(data.train.samples):
        print(
            f"warning: loader.batch_size={settings.loader.batch_size} is more than all training images; an epoch is "
            "one smaller batch",
            file=sys.stderr,
        )
    state = training.state
    resumed = f", resuming from epoch {state.epoch + 1} after step {state.step} ({source.name})" if source else ""
    validation = len(data.validation.sampler.samples) if data.validation else 0
    print(
        f"{data.manifest.name}: {len(data.train.samples):,} training, {validation:,} validation, "
        f"{len(data.test.sampler.samples):,} test images of {len(data.classes)} classes\n"
        f"{_by_stage(data, lambda phase: f'{data.train.steps(phase.first):,} steps an epoch')}, "
        f"{_by_stage(data, lambda phase: f'{phase.batch_size:,} images each')}\n"
        f"{settings.model.name} at {_by_stage(data, lambda phase: f'{phase.resolution}x{phase.resolution}')}, "
        f"{training.state.parameter_count:,} parameters, on {training.world.device} in {settings.trainer.precision} "
        f"({training.world.size} {'rank' if training.world.size == 1 else 'ranks'}); "
        f"loader {data.backend}: {data.backend_reason}\n"
        f"{run_dir.path}{resumed}",
        flush=True,
    )


def print_plan(training: Training) -> None:
    """Print all settings, the shape of the model input and the number of steps (`--dry-run`)."""
    settings, data, world = training.config, training.data, training.world
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
        f"model input   {_by_stage(data, model_input)}, "
        f"mean {_numbers(data.spec.mean)}, std {_numbers(data.spec.std)}\n"
        f"classes       {len(data.classes)}, weights {float(training.class_weights.min()):.3f} .. "
        f"{float(training.class_weights.max()):.3f}\n"
        f"parameters    {training.state.parameter_count:,}\n"
        f"steps         {_by_stage(data, steps)}; "
        f"{sum(map(data.train.steps, epochs)):,} in {settings.trainer.epochs} epochs\n"
        f"loader        {data.backend}: {data.backend_reason}",
        flush=True,
    )


def print_summary(summary: dict[str, Any], run_dir: RunDirectory) -> None:
    """Print the metrics of `summary.json`."""
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
        f"{summary['training_seconds']:.0f} s\nreport      {run_dir.report}"
    )


def _by_stage(data: TrainingData, describe: Callable[[Phase], str]) -> str:
    """One phrase for each stage whose phrase differs from the one before: `48x48, from epoch 5 on 112x112`."""
    said = [(phase.first, describe(phase)) for phase in data.train.phases]
    new = [words for before, words in zip([None, *said], said, strict=False) if before is None or before[1] != words[1]]
    return ", ".join(words if first == 0 else f"from epoch {first + 1} on {words}" for first, words in new)


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.4f}" for value in values)
