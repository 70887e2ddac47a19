"""Search file: search space, sampler, pruner and budget, validated against the settings of the recipe."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from shards.errors import UserError
from trainer.config import load as config
from trainer.config.base import BaseConfig, describe_settings, iterate_fields
from trainer.config.schema import Config, flatten

EXAMPLE = config.RECIPES / "search" / "optimizers_cpu.yaml"
DEFAULT_ROOT = Path("runs/search")
# The objective must be the same for all trials. The last two are set by the search itself.
_OBJECTIVE = {"data.val_fraction", "data.fold", "trainer.monitor", "trainer.minutes", "data.train_fraction", "seed"}
_SET_BY_SEARCH = {"data.train_fraction": "train_fraction", "run.dir": "dir", "run.name": "dir", "resume": "dir"}
_TOLERANCE = 1e-8  # distance of a number of steps from a whole number, as in Optuna

Number = Annotated[int | float, Field(ge=-(10**15), le=10**15)]


class Range(BaseConfig):
    """A range of numbers."""

    type: Literal["float", "int"]
    """A number from a range, or a whole number."""
    low: Number
    """Smallest value."""
    high: Number
    """Largest value."""
    step: Annotated[int | float, Field(gt=0, le=10**15)] | None = None
    """Distance of the values; null for any number, or any whole number."""
    log: bool = False
    """Sample from the logarithmic domain."""

    @model_validator(mode="after")
    def _check_bounds(self) -> Range:
        low, high, step = self.low, self.high, self.step
        if self.type == "int" and not all(isinstance(value, int) for value in (low, high, step or 1)):
            raise ValueError("whole numbers with type: int")
        if low >= high:
            raise ValueError(f"low below high, not {low} and {high}")
        if self.log and low <= 0:
            raise ValueError(f"low above 0 with log: true, not {low}")
        if self.log and step is not None:
            raise ValueError("step or log: true, not both")
        if step is not None and step > high - low + _TOLERANCE * step:
            raise ValueError(f"a step of at most high - low, not {step}")
        if step is not None and not self.contains(high):
            largest = low + int((high - low) / step) * step
            raise ValueError(f"high = low + a whole number of steps: {_number(largest)}, not {high}")
        return self

    def bounds(self) -> list[Any]:
        return [self.low, self.high]

    def contains(self, value: Any) -> bool:
        step = self.step or (1 if self.type == "int" else 0)
        steps = (float(value) - self.low) / step if step else 0.0
        return self.low <= float(value) <= self.high and abs(steps - round(steps)) < _TOLERANCE

    def suggest(self, trial: Any, name: str) -> float:
        if self.type == "int":
            return trial.suggest_int(name, self.low, self.high, step=self.step or 1, log=self.log)
        value = trial.suggest_float(name, self.low, self.high, step=self.step, log=self.log)
        return min(max(float(f"{value:.6g}"), self.low), self.high)  # as many digits as a person writes into a recipe


class Categorical(BaseConfig):
    """A choice among values."""

    type: Literal["categorical"]
    """One of some values."""
    choices: Annotated[list[Any], Field(min_length=2)]
    """The values."""

    def bounds(self) -> list[Any]:
        return self.choices

    def contains(self, value: Any) -> bool:
        return value in self.choices

    def suggest(self, trial: Any, name: str) -> Any:
        return trial.suggest_categorical(name, self.choices)


Distribution = Annotated[Range | Categorical, Field(discriminator="type")]


class Conditional(BaseConfig):
    """A dimension whose range depends on another setting."""

    type: Literal["conditional"]
    """A range for each choice of another setting; for other choices the setting keeps the recipe's value."""
    of: str
    """The other setting, a categorical one of this space."""
    cases: Annotated[dict[Any, Distribution], Field(min_length=1)]
    """A range or choices for each choice of it."""


Dimension = Annotated[Range | Categorical | Conditional, Field(discriminator="type")]


class Sampler(BaseConfig):
    """Sampler of values."""

    name: Literal["tpe", "random"] = "tpe"
    """How values are sampled: by a tree-structured Parzen estimator, or at random."""
    startup_trials: Annotated[int, Field(ge=1, le=10**6)] = 10
    """tpe: random trials before the estimator is used."""


class Pruner(BaseConfig):
    """Pruner of trials."""

    name: Literal["median", "successive_halving", "none"] = "median"
    """Which trials are pruned: those below the median of the others at the same epoch, or all but one in `reduction`
    at epochs that grow by that factor, or none."""
    startup_trials: Annotated[int, Field(ge=0, le=10**6)] = 5
    """median: complete trials before any is pruned."""
    warmup_epochs: Annotated[int, Field(ge=1, le=10**6)] = 1
    """Epochs that every trial is given."""
    reduction: Annotated[int, Field(ge=2, le=10**6)] = 3
    """successive_halving: factor by which epochs grow and trials become fewer."""


class Budget(BaseConfig):
    """End of a search."""

    trials: Annotated[int, Field(ge=1, le=10**6)] | None = None
    """Trials of the whole study, including pruned ones; null for no limit."""
    minutes: Annotated[float, Field(gt=0, le=10**6)] | None = None
    """Minutes of this command; the next command resumes unfinished trials. Null for no limit."""

    @model_validator(mode="after")
    def _check_finite(self) -> Budget:
        if self.trials is None and self.minutes is None:
            raise ValueError("trials, minutes or both, so that the search ends")
        return self


class SearchConfig(BaseConfig):
    """A search over settings of a recipe."""

    recipe: Path
    """The recipe to start from, a path relative to the search file."""
    dir: Path | None = None
    """Directory of the study and its trials, by default runs/search/NAME. An existing study is resumed."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the sampler."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Settings of every trial that replace the recipe's, by dotted name. best.yaml has them too, except for
    data.val_fraction."""
    train_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Fraction of the train split, by class, that trials learn from (data.train_fraction); the objective uses the whole
    validation split."""
    seeds_per_trial: Annotated[int, Field(ge=1, le=1000)] = 1
    """Trainings of a trial, each with its own seed and validation split; the objective is their mean."""
    sampler: Sampler = Sampler()
    pruner: Pruner = Pruner()
    budget: Budget
    space: Annotated[dict[str, Dimension], Field(min_length=1)]
    """Search space: for each setting, by dotted name, {type: float or int, low: ..., high: ..., log: true or step:
    ...}, {type: categorical, choices: [...]}, or {type: conditional, of: ..., cases: {...}}."""
    initial_trials: list[dict[str, Any]] = Field(default_factory=list)
    """Values of the first trials, for instance published ones: each gives every setting of the space that applies."""

    def identity(self) -> dict[str, Any]:
        """Keys that must not change when a study is resumed, flat and by name."""
        return dict(flatten(self.model_dump(mode="json", exclude={"dir", "budget", "recipe"})))

    def applicable(self, values: dict[str, Any]) -> Iterator[tuple[str, str, Range | Categorical]]:
        """Iterate over the settings that apply, those without a condition first.

        Args:
            values: Values by setting. Conditions are looked up lazily, so a caller may fill it while iterating.

        Yields:
            Setting, name of its Optuna parameter (one for each case of a condition), and distribution.
        """
        for name, dimension in sorted(self.space.items(), key=lambda item: isinstance(item[1], Conditional)):
            if not isinstance(dimension, Conditional):
                yield name, name, dimension
                continue
            for case, distribution in dimension.cases.items():
                if values.get(dimension.of) == case:
                    yield name, f"{name} with {dimension.of}={case}", distribution

    def distributions(self, name: str) -> list[Range | Categorical]:
        """The distribution of a setting, or those of all its cases."""
        dimension = self.space[name]
        return list(dimension.cases.values()) if isinstance(dimension, Conditional) else [dimension]


def load(path: Path, overrides: list[str]) -> tuple[SearchConfig, Config]:
    """Read a search file and its recipe.

    Args:
        path: The search file, YAML.
        overrides: `key=value` pairs that replace keys of the file. A recipe named here is relative to the working
            directory.

    Returns:
        The search, and the recipe with `settings` applied (without `train_fraction`).

    Raises:
        UserError: A key, setting or value is unknown or out of range.
    """
    content = config.read_yaml(path, EXAMPLE)
    for override in overrides:
        config.apply_override(content, override)
    if isinstance(content.get("settings"), dict):
        content["settings"] = dict(flatten(content["settings"]))
    source = f"{path} or the command line" if overrides else str(path)
    search = _validate(content, source)
    changes: dict[str, Any] = {}
    if search.dir is None:
        changes["dir"] = DEFAULT_ROOT / path.stem
    if not any(override.startswith("recipe=") for override in overrides):
        recipe = config.find_recipe(search.recipe, path.parent, f"recipe in {path}")
        changes["recipe"] = Path(os.path.normpath(recipe))
    search = search.model_copy(update=changes)
    base = config.load(search.recipe, [])
    for name in [*search.settings, *search.space]:
        if name not in config.SETTINGS:
            raise config.unknown_setting_error(name, source)
        if name in _SET_BY_SEARCH:
            raise UserError(
                found=f"{name} in {source}",
                expected=f"{_SET_BY_SEARCH[name]}, from which the search sets it",
                hint=f"set {_SET_BY_SEARCH[name]}, and remove {name}",
            )
    base = config.replace_settings(base, search.settings, source)
    for is_wrong, name, value, default in (
        (base.trainer.monitor == "loss", "trainer.monitor", base.trainer.monitor, "accuracy"),
        (base.trainer.minutes is not None, "trainer.minutes", base.trainer.minutes, "null"),
    ):
        if is_wrong:
            raise UserError(
                found=f"{name}={value} in {search.recipe} or {source}",
                expected="trials that are compared by accuracy or macro_f1 after the same numbers of epochs",
                hint=f"settings: {{{name}: {default}}}",
            )
    _check_space(search, base, source)
    return search, base


def default_keys() -> dict[str, Any]:
    """Return the defaults of the keys of a search."""
    fields = iterate_fields(SearchConfig)
    return {name: field.get_default(call_default_factory=True) for name, field in fields if not field.is_required()}


def _number(value: float) -> str:
    """Format a number as YAML reads it: 3e+06 would be a text."""
    return str(int(value)) if value == int(value) else f"{value:g}"


def describe() -> dict[str, str]:
    """Every key of a search file and its description."""
    return describe_settings(SearchConfig)


def _check_space(search: SearchConfig, base: Config, source: str) -> None:
    """Check that each setting can be searched, and that each bound and choice is a valid value of it."""
    searchable = set(base.recipe()) - _OBJECTIVE
    for name, dimension in search.space.items():
        if name not in searchable:
            raise UserError(
                found=f"{name} in the space of {source}",
                expected="a setting of the training that does not change the objective",
                hint=f"set it for all trials: settings: {{{name}: ...}}" if name != "seed" else "raise seeds_per_trial",
            )
        if isinstance(dimension, Conditional):
            _check_cases(search, name, dimension, source)
        for distribution in search.distributions(name):
            for value in distribution.bounds():
                config.replace_settings(base, {name: value}, f"the space of {source}")
            if isinstance(distribution, Range) and distribution.type == "float":
                _check_fractions(base, name, distribution, source)
    for number, values in enumerate(search.initial_trials, 1):
        _check_initial_trial(search, base, values, f"initial_trials, entry {number}, in {source}")


def _check_fractions(base: Config, name: str, distribution: Range, source: str) -> None:
    """Raise `UserError` if a setting takes whole numbers only."""
    low, high = distribution.low, distribution.high
    value = low + (distribution.step or (high - low) / math.pi)  # divided by pi, so that it is no whole number
    try:
        config.replace_settings(base, {name: value}, source)
    except UserError as error:
        raise UserError(
            found=f"{name} of type float in the space of {source}, which includes {value:.6g}",
            expected=error.expected,
            hint=f"{name}: {{type: int, low: {_number(low)}, high: {_number(high)}{', log: true' * distribution.log}}}",
        ) from None


def _check_cases(search: SearchConfig, name: str, dimension: Conditional, source: str) -> None:
    condition = search.space.get(dimension.of)
    if not isinstance(condition, Categorical):
        raise UserError(
            found=f"{name} in {source}, conditional on {dimension.of}",
            expected="a categorical setting of the same space",
            hint=f"add {dimension.of}: {{type: categorical, choices: [...]}} to the space",
        )
    for case in dimension.cases:
        if case not in condition.choices:
            raise UserError(
                found=f"{name} in {source} has a case {case}",
                expected=f"one of the choices of {dimension.of}: {', '.join(map(str, condition.choices))}",
                hint=_did_you_mean(str(case), list(map(str, condition.choices))),
            )


def _check_initial_trial(search: SearchConfig, base: Config, values: dict[str, Any], source: str) -> None:
    for name in values:
        if name not in search.space:
            raise UserError(
                found=f"{name} in {source}",
                expected="settings of the space",
                hint=_did_you_mean(name, list(search.space)),
            )
    config.replace_settings(base, values, source)
    for name, _, distribution in search.applicable(values):
        if name not in values:
            raise UserError(
                found=f"no {name} in {source}", expected="a value for every setting of the space", hint="add it"
            )
        if not distribution.contains(values[name]):
            raise UserError(
                found=f"{name}={values[name]} in {source}, which is outside of the space",
                expected=str(distribution.model_dump(exclude={"type"}, exclude_none=True)),
                hint="widen the space, or choose another value",
            )


def _validate(content: dict[str, Any], source: str) -> SearchConfig:
    try:
        return SearchConfig.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        # Pydantic inserts the type of a dimension into the location of an error.
        loc = [str(key) for key in first["loc"] if key not in ("float", "int", "categorical", "conditional")]
        name = ".".join(loc)
        reason = first["msg"].removeprefix("Value error, ")
        given = first["input"] if isinstance(first["input"], str | int | float | bool | None) else "..."
        found = f"{name}: {given} in {source}" if name else source
        expected = reason[0].lower() + reason[1:]
        hint = describe().get(name) or f"compare it with {EXAMPLE}"
        if first["type"] == "extra_forbidden":
            found, expected = f"unknown key {name} in {source}", "one of the keys in python -m trainer.tune --help"
            settings = [setting for setting in config.SETTINGS if setting.split(".")[0] == name]
            of_dimensions = [key for model in (Range, Categorical, Conditional) for key in model.model_fields]
            known = [*SearchConfig.model_fields, *describe()]
            if loc[0] == "space":
                known = of_dimensions
                expected = f"one of {', '.join(dict.fromkeys(of_dimensions))}"
            hint = f"for all trials: settings.{settings[0]}=..." if settings else _did_you_mean(loc[-1], known)
        elif first["type"] in ("missing", "union_tag_not_found"):
            kind = ".type" if first["type"] == "union_tag_not_found" else ""
            found, expected = f"no {name}{kind} in {source}", "a value for it"
        raise UserError(found=found, expected=expected, hint=hint) from None


def _did_you_mean(name: str, known: list[str]) -> str:
    """Return a hint. `name` is the last part of a key; the known keys may be dotted."""
    by_last = {key.rpartition(".")[2]: key for key in reversed(known)}
    near = difflib.get_close_matches(name, [*by_last, *known], n=1, cutoff=0.5)
    return f"did you mean {by_last.get(near[0], near[0])}?" if near else "remove it"
