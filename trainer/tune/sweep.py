"""A search space as Weights & Biases sweeps: the same settings, ranges and budget, drawn by its own service.

A sweep knows no conditional ranges, so a space with some becomes a sweep for each choice that they depend on. Each run
of a sweep is an ordinary one: the sweep goes by its validation figure, and the test part is evaluated at its end.
The format: https://docs.wandb.ai/guides/sweeps/define-sweep-configuration
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from shards.atomic import check_writable, write_file
from trainer.settings import Config
from trainer.tune.search_space import Choices, Conditional, IntRange, Plain, Search


def write(path: Path, search: Search, base: Config) -> list[Path]:
    """Write a sweep to a file, or several beside it (FILE_lion.yaml, ...); returns what was written."""
    check_writable(path)
    written = []
    for suffix, sweep in sweeps(search, base):
        place = path.with_name(f"{path.stem}{suffix}{path.suffix}")
        head = f"# wandb sweep {place.name}; then on each machine: wandb agent ID\n"
        write_file(place, head + yaml.safe_dump(sweep, sort_keys=False))
        written.append(place)
    return written


def sweeps(search: Search, base: Config) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each sweep, and what tells its file from the others'."""
    conditional = {name: inner for name, inner in search.space.items() if isinstance(inner, Conditional)}
    deciding = list(dict.fromkeys(inner.of for inner in conditional.values()))
    for chosen in itertools.product(*(search.choices(name) for name in deciding)):
        case = dict(zip(deciding, chosen, strict=True))
        parameters = {name: {"value": _text(value)} for name, value in search.settings.items()}
        parameters["data.subset"] = {"value": search.fraction}
        if search.repeats > 1:
            parameters["seed"] = {"values": [base.seed + repeat for repeat in range(search.repeats)]}
        for name, dimension in search.space.items():
            if name in case:
                parameters[name] = {"value": _text(case[name])}
            elif not isinstance(dimension, Conditional):
                parameters[name] = _parameter(dimension)
            elif case[dimension.of] in dimension.cases:
                parameters[name] = _parameter(dimension.cases[case[dimension.of]])
        suffix = "".join(f"_{value}" for value in chosen)
        yield suffix, _sweep(search, base, parameters, suffix)


def _sweep(search: Search, base: Config, parameters: dict[str, Any], suffix: str) -> dict[str, Any]:
    assert search.dir is not None
    sweep: dict[str, Any] = {
        "name": search.dir.name + suffix,
        "project": base.logging.wandb_project,
        "program": "trainer/run.py",
        "method": "bayes" if search.sampler.name == "tpe" else "random",
        "metric": {"name": f"validation.{base.trainer.select}", "goal": "maximize"},
        "parameters": parameters,
        "command": [
            *("${env}", "${interpreter}", "-m", "trainer.run", str(search.recipe)),
            *("${args_no_hyphens}", "logging.wandb=auto"),
        ],
    }
    if search.budget.trials is not None:
        sweep["run_cap"] = search.budget.trials
    if search.pruner.name != "none":
        sweep["early_terminate"] = {
            "type": "hyperband",
            "min_iter": search.pruner.warmup_epochs,
            "eta": search.pruner.reduction,
        }
    return sweep


def _parameter(dimension: Plain) -> dict[str, Any]:
    if isinstance(dimension, Choices):
        return {"values": [_text(choice) for choice in dimension.choices]}
    ends = {"min": dimension.low, "max": dimension.high}
    if dimension.step is not None:
        return {"distribution": "q_uniform", "q": dimension.step, **ends}
    if isinstance(dimension, IntRange):
        return {"distribution": "q_log_uniform_values", "q": 1, **ends} if dimension.log else ends | _INT
    return {"distribution": "log_uniform_values" if dimension.log else "uniform", **ends}


_INT = {"distribution": "int_uniform"}


def _text(value: Any) -> Any:
    """A value as the command line reads it again."""
    return "null" if value is None else json.dumps(value) if isinstance(value, list | dict) else value
