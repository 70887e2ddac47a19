"""Combine runs into one model, an ensemble or a soup, and evaluate it on the test split.

    python -m trainer.export.ensemble RUN RUN ... --out DIR [--soup uniform|greedy]

Evaluation, prediction, export and distillation accept the model like a run. An ensemble predicts the mean of the runs'
calibrated probabilities, at the sum of their costs. A soup is one network with the mean of the runs' weights, at the
cost of one; it takes runs that started from the same weights, such as fine-tuned ones. A greedy soup adds runs, the
best first, as long as the metric of the validation split (`trainer.monitor`) does not fall. Wortsman et al. 2022, Model
soups, https://arxiv.org/abs/2203.05482.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.loader import Loader
from shards.atomic import make_directory, replace_directory, replace_file
from shards.cli import command_parser, run_command
from shards.errors import UserError
from shards.manifest import VALIDATION, has_split
from shards.remote.datasets import resolve_dataset
from trainer.checkpoint import io as checkpoint
from trainer.checkpoint.compat import list_classes
from trainer.checkpoint.completed_run import CompletedRun
from trainer.checkpoint.run_dir import RunDirectory
from trainer.checkpoint.trained_model import TrainedModel
from trainer.config.load import replace_settings
from trainer.config.schema import TrainerConfig
from trainer.data.training_data import open_data
from trainer.evaluate.evaluator import evaluate, measurements
from trainer.report import run_page
from trainer.runtime.distributed import World, init_single_process

_OF_SOUP = ("model.name", "model.options", "model.stem_stride", "shapes of the weights")  # equal in a soup


def make_ensemble(models: Sequence[TrainedModel]) -> TrainedModel:
    """Return a model that predicts the mean probability of several. Ensembles among them count by their members."""
    members = tuple(member for model in models for member in (model.members or (model,)))
    zeros = np.zeros(len(models[0].classes), np.float32)
    return replace(models[0], weights={}, epoch=0, tau=0.0, offsets=zeros, temperature=1.0, members=members)


def make_soup(models: Sequence[TrainedModel]) -> TrainedModel:
    """Return a model with the mean of the weights, offsets, logit biases and temperatures of several.

    Counters, which are integers, are those of the first.
    """
    weights = {
        name: torch.stack([model.weights[name] for model in models]).mean(dim=0)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in models[0].weights.items()
    }
    biases = [model.logit_bias for model in models if model.logit_bias is not None]
    return replace(
        models[0],
        weights=weights,
        epoch=0,
        tau=float(np.mean([model.tau for model in models])),
        offsets=np.mean([model.offsets for model in models], axis=0, dtype=np.float32),
        temperature=float(np.mean([model.temperature for model in models])),
        logit_bias=None if len(biases) < len(models) else np.mean(biases, axis=0, dtype=np.float32),
    )


def choose_greedily(models: Sequence[TrainedModel], metric: Callable[[TrainedModel], float]) -> list[TrainedModel]:
    """Choose the models of a greedy soup (recipe 1 of the paper).

    Args:
        models: The candidates.
        metric: Measures a model; larger is better.

    Returns:
        The chosen models, the best first.
    """
    values = [metric(model) for model in models]
    order = sorted(range(len(models)), key=lambda number: -values[number])
    chosen, best = [models[order[0]]], values[order[0]]
    for number in order[1:]:
        value = metric(make_soup([*chosen, models[number]]))
        if value >= best:
            chosen, best = [*chosen, models[number]], value
    return chosen


def check_combinable(runs: Sequence[CompletedRun], soup: str | None) -> None:
    """Raise `UserError` if runs differ in classes, data or model input, or for a soup in the network."""
    first = runs[0]

    def facts(run: CompletedRun) -> dict[str, Any]:
        data, trained = run.config.data, run.trained
        common: dict[str, Any] = {
            "classes": trained.classes,
            "data set": trained.data_identity,
            "data.resolution": data.final_resolution,
            "data.interpolation": data.interpolation,
            "preprocessing": data.preprocessing(),
            "mean and std of the input": (trained.mean, trained.std),
        }
        if soup:
            model, shapes = run.config.model, {name: tuple(each.shape) for name, each in trained.weights.items()}
            common |= zip(_OF_SOUP, (model.name, model.options, model.stem_stride, shapes), strict=True)
        return common

    for run in runs if soup else ():
        if run.trained.members:
            raise UserError(
                found=f"--soup {soup} and {run.directory.path}, an ensemble of {len(run.trained.members)} networks",
                expected="runs of one network, whose weights are averaged",
                hint="name the runs of the ensemble, or omit --soup",
            )
    for run in runs[1:]:
        for name, value in facts(run).items():
            expected = facts(first)[name]
            if value != expected:
                is_shown = name not in ("shapes of the weights", "data set")
                if name == "classes":
                    value, expected = list_classes(value, expected), list_classes(expected, value)
                raise UserError(
                    found=f"{run.directory.path} and {first.directory.path}, which differ in {name}"
                    + (f" ({value} and {expected})" if is_shown else ""),
                    expected=f"runs with the same {name}",
                    hint="omit --soup" if name in _OF_SOUP else "name runs that agree in it",
                )


def _check_validation(runs: Sequence[CompletedRun]) -> None:
    """Raise `UserError` if a run may have trained on images that the first one holds out of the training split."""
    first = runs[0].config
    for run in runs:
        config = run.config
        for name, value, expected in (
            ("data.fold", config.data.fold, None),  # a soup has no fold, and its validation images are others
            ("data.val_fraction", config.data.val_fraction, first.data.val_fraction),
            ("seed", config.seed, first.seed),
        ):
            if value != expected:
                raise UserError(
                    found=f"--soup greedy and {run.directory.path} with {name}={value}",
                    expected=f"{name}={'null' if expected is None else expected}, so that no run has trained on the "
                    "validation images",
                    # Other seeds are other initial weights, whose mean is no useful model.
                    hint="omit --soup" if name == "seed" else "--soup uniform",
                )


def _validation_metric(
    settings: TrainerConfig, validation: Loader | None, world: World
) -> Callable[[TrainedModel], float]:
    """The function that measures a model by `trainer.monitor` on the validation split; larger is better."""
    if validation is None:
        raise UserError(
            found="--soup greedy for runs without a validation split",
            expected="runs that hold out validation images",
            hint="--soup uniform",
        )

    def metric(model: TrainedModel) -> float:
        network = model.build_model(world.device)
        measured = evaluate(network, validation, settings, world, **model.posthoc_kwargs()).summary()
        return -measured["loss"] if settings.monitor == "loss" else measured[settings.monitor]

    return metric


def combine(paths: Sequence[Path], out: Path, soup: str | None, shards: str | None, world: World) -> list[str]:
    """Write the combination of runs as a run directory, after evaluating it on the test split.

    Args:
        paths: Run directories.
        out: The directory to write.
        soup: `uniform` or `greedy` for a soup, None for an ensemble.
        shards: The runs' data set, if it has moved.
        world: One process.

    Returns:
        Lines for the terminal.

    Raises:
        UserError: A run is not complete, or the runs do not fit together.
    """
    runs = [CompletedRun.open(path) for path in paths]
    check_combinable(runs, soup)
    settings: dict[str, Any] = {"data.fold": None, "run.dir": str(out), "run.name": out.name}
    config = replace_settings(runs[0].config, settings | ({"data.shards": shards} if shards else {}), "the runs")
    data = open_data(config, world)
    if data.identity != runs[0].trained.data_identity:
        raise UserError(
            found=f"{config.data.shards}, another packed data set than that of the runs",
            expected="the data set of the runs",
            hint="name its directory: --shards DIR",
        )
    models, names, lines = [run.trained for run in runs], list(paths), []
    if soup == "greedy":
        if not has_split(resolve_dataset(config.data.shards), VALIDATION):
            _check_validation(runs)
        models = choose_greedily(models, _validation_metric(config.trainer, data.validation, world))
        names = [run.directory.path for run in runs if any(run.trained is model for model in models)]
        lines.append(f"soup of {len(names)} of {len(runs)} runs: {', '.join(map(str, names))}")
    trained = replace(make_soup(models) if soup else make_ensemble(models), config=config)
    network = trained.build_model(world.device)
    evaluation = evaluate(network, data.test, config.trainer, world, **trained.posthoc_kwargs())
    summary = {
        **measurements(evaluation, network, config),
        "decision": None,
        "epochs": 0,
        "best_epoch": 0,
        "validation": None,
        "training_seconds": sum(run.summary["training_seconds"] for run in runs),
        "model": config.model.name,
        "dataset": data.manifest.name,
        "members": list(map(str, names)),
    }
    with replace_directory(out) as replacement:
        _check_new(out)  # again: another process may have written it meanwhile
        directory = RunDirectory(replacement.path)
        make_directory(directory.checkpoints)
        directory.begin(config, runs[0].environment, [])
        checkpoint.save(directory.best, trained.state_dict())
        with replace_file(directory.predictions) as file:
            np.savez_compressed(file, **vars(evaluation.predictions))
        run_page.write(directory.path, data.manifest, data.test_store, summary, [])
        directory.write_summary(summary)
        replacement.commit()
    rows = [*((run.directory.path, run.summary) for run in runs), (out, summary)]
    return [*lines, *(_describe(path, metrics) for path, metrics in rows)]


def _check_new(out: Path) -> None:
    if out.exists():
        raise UserError(f"--out {out}, which exists", "a new directory", "choose another --out")


def _describe(path: Path, summary: dict[str, Any]) -> str:
    return (
        f"accuracy {summary['accuracy']:.2%}  macro F1 {summary['macro_f1']:.2%}  "
        f"calibration error {summary['calibration']['ece']:.2%}  {path}"
    )


def main() -> int:
    """Run the command; returns the exit status."""
    parser = command_parser("trainer.export.ensemble", __doc__)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="run directories, two or more")
    add("--out", type=Path, required=True, metavar="DIR", help="directory of the result, used like a run directory")
    add(
        "--soup",
        choices=("uniform", "greedy"),
        help="average the weights of all runs (uniform) or of those that do not lower the validation metric (greedy)",
    )
    add("--shards", metavar="SHARDS", help="the runs' data set, if it has moved")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="device of the model")
    arguments = parser.parse_args()
    if len(arguments.runs) < 2:
        raise UserError("one run", "two or more runs", "name the run directories one after another")
    _check_new(arguments.out)
    with init_single_process(arguments.device, "its result is one directory") as world:
        print("\n".join(combine(arguments.runs, arguments.out, arguments.soup, arguments.shards, world)))
    return 0


if __name__ == "__main__":
    run_command(main)
