"""What a search is: its space and its budget, from a YAML file, checked against the settings before anything runs."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from shards.errors import UserError
from trainer import config
from trainer.section import Section, described
from trainer.settings import Config, flatten

EXAMPLE = Path("configs/search/optimizers_cpu.yaml")
DEFAULT_ROOT = Path("runs/search")
# What a trial is judged by must be the same for all; the last two are said by the search itself.
_JUDGED_BY = {"data.val_fraction", "trainer.monitor", "data.train_fraction", "seed"}
_OF_THE_SEARCH = {"data.train_fraction": "fraction", "run.dir": "dir", "run.name": "dir", "resume": "dir"}


class _Range(Section):
    log: bool = False
    """Draw the logarithm evenly."""

    @model_validator(mode="after")
    def _has_a_width(self) -> _Range:
        low, high, step = self.low, self.high, self.step  # type: ignore[attr-defined]
        if low >= high:
            raise ValueError(f"low below high, not {low} and {high}")
        if self.log and low <= 0:
            raise ValueError(f"low above 0 with log: true, not {low}")
        if self.log and step is not None:
            raise ValueError("step or log: true, not both")
        return self


class FloatRange(_Range):
    type: Literal["float"]
    """A number from a range."""
    low: float
    """Smallest value."""
    high: float
    """Largest value."""
    step: Annotated[float, Field(gt=0)] | None = None
    """Distance of the values; null for any."""


class IntRange(_Range):
    type: Literal["int"]
    """A whole number from a range."""
    low: int
    """Smallest value."""
    high: int
    """Largest value."""
    step: Annotated[int, Field(ge=1)] | None = None
    """Distance of the values; null for 1."""


class Choices(Section):
    type: Literal["categorical"]
    """One of some values."""
    choices: Annotated[list[Any], Field(min_length=2)]
    """The values."""


Plain = Annotated[FloatRange | IntRange | Choices, Field(discriminator="type")]


class Conditional(Section):
    type: Literal["conditional"]
    """A range for each choice of another setting; where a choice has none, the setting stays as it is."""
    of: str
    """The other setting, a categorical one of this space."""
    cases: Annotated[dict[Any, Plain], Field(min_length=1)]
    """A range or choices for each choice of it."""


Dimension = Annotated[FloatRange | IntRange | Choices | Conditional, Field(discriminator="type")]


class Sampler(Section):
    name: Literal["tpe", "random"] = "tpe"
    """How values are drawn: by a tree-structured Parzen estimator from what is known, or at random."""
    startup_trials: Annotated[int, Field(ge=1)] = 10
    """tpe: trials drawn at random before it begins."""


class Pruner(Section):
    name: Literal["median", "successive_halving", "none"] = "median"
    """Which trials are given up: those below the median of the others after as many epochs, or all but one in
    `reduction` at epochs that grow by that factor, or none."""
    startup_trials: Annotated[int, Field(ge=0)] = 5
    """median: trials that are finished before any is given up."""
    warmup_epochs: Annotated[int, Field(ge=1)] = 1
    """Epochs that every trial is given."""
    reduction: Annotated[int, Field(ge=2)] = 3
    """successive_halving: factor by which epochs grow and trials become fewer."""


class Budget(Section):
    trials: Annotated[int, Field(ge=1)] | None = None
    """Trials of the whole study, those that were given up among them; null for no limit."""
    minutes: Annotated[float, Field(gt=0)] | None = None
    """Minutes of this command; a trial that is not done by then goes on with the next one. Null for no limit."""

    @model_validator(mode="after")
    def _ends(self) -> Budget:
        if self.trials is None and self.minutes is None:
            raise ValueError("trials, minutes or both, so that the search ends")
        return self


class Search(Section):
    """A search over settings of a recipe."""

    recipe: Path
    """The recipe that is searched around, a configuration file."""
    dir: Path | None = None
    """Directory of the study and its trials, by default runs/search/NAME; one that is there goes on."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Decides what is drawn."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Settings that every trial has instead of the recipe's, by dotted name; so has the best one's recipe, but for
    data.val_fraction."""
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the train part, by class, that trials learn from (data.train_fraction); they are judged by the whole
    validation part."""
    repeats: Annotated[int, Field(ge=1)] = 1
    """Trainings of a trial, each with a seed (and so a validation part) of its own; what counts is their mean."""
    sampler: Sampler = Sampler()
    pruner: Pruner = Pruner()
    budget: Budget
    space: Annotated[dict[str, Dimension], Field(min_length=1)]
    """What is searched: a range or choices for each setting, by dotted name."""
    first: list[dict[str, Any]] = Field(default_factory=list)
    """Values that are tried before any are drawn, for instance published ones: each gives every setting of the space
    that it needs."""

    def choices(self, setting: str) -> list[Any]:
        dimension = self.space[setting]
        assert isinstance(dimension, Choices)
        return dimension.choices

    def identity(self) -> dict[str, Any]:
        """What must be the same when a study goes on, flat and by name."""
        free = {"dir": True, "budget": True, "recipe": True}
        return dict(flatten(json.loads(self.model_dump_json(exclude=free))))


def load(path: Path, overrides: list[str]) -> tuple[Search, Config]:
    """A search and the recipe it is about (with `settings`, without the fraction). Raises `UserError`."""
    content = config.read(path, overrides, EXAMPLE)
    if isinstance(content.get("settings"), dict):
        content["settings"] = dict(flatten(content["settings"]))
    place = f"{path} or the command line" if overrides else str(path)
    search = _validate(content, place)
    if search.dir is None:
        search = search.model_copy(update={"dir": DEFAULT_ROOT / path.stem})
    base = config.load(search.recipe, [])
    known = {name for name, _ in config.settings()}
    for name in [*search.settings, *search.space]:
        if name not in known:
            raise config.unknown_setting(name, place)
        if name in _OF_THE_SEARCH:
            raise UserError(
                found=f"{name} in {place}",
                expected=f"{_OF_THE_SEARCH[name]}, by which the search decides it",
                hint=f"set {_OF_THE_SEARCH[name]}, and remove {name}",
            )
    base = config.changed(base, search.settings, place)
    _check_space(search, base, place)
    return search, base


def dimensions(search: Search) -> Iterator[tuple[str, Any, FloatRange | IntRange | Choices]]:
    """Each setting with its range; conditional ones once for each case, which is None for the others."""
    for name, dimension in search.space.items():
        if isinstance(dimension, Conditional):
            for case, inner in dimension.cases.items():
                yield name, case, inner
        else:
            yield name, None, dimension


def describe() -> list[tuple[str, str]]:
    """Every key of a search file and the sentence about it."""
    return described(Search)


def _check_space(search: Search, base: Config, place: str) -> None:
    """Each setting may be searched, each end of a range and each choice is a value of it."""
    searchable = set(base.recipe()) - _JUDGED_BY
    for name, dimension in search.space.items():
        if name not in searchable:
            raise UserError(
                found=f"{name} in the space of {place}",
                expected="a setting that changes what is learned, and not by what a trial is judged",
                hint=f"set it for all trials: settings: {{{name}: ...}}" if name != "seed" else "raise repeats",
            )
        if isinstance(dimension, Conditional):
            _check_cases(search, name, dimension, place)
    for name, _, dimension in dimensions(search):
        ends = dimension.choices if isinstance(dimension, Choices) else [dimension.low, dimension.high]
        for value in ends:
            config.changed(base, {name: value}, f"the space of {place}")
    for number, values in enumerate(search.first, 1):
        _check_first(search, base, values, f"values {number} of first in {place}")


def _check_cases(search: Search, name: str, dimension: Conditional, place: str) -> None:
    if not isinstance(search.space.get(dimension.of), Choices):
        raise UserError(
            found=f"{name} in {place}, conditional on {dimension.of}",
            expected="a categorical setting of the same space",
            hint=f"add {dimension.of}: {{type: categorical, choices: [...]}} to the space",
        )
    choices = search.choices(dimension.of)
    for case in dimension.cases:
        if case not in choices:
            raise UserError(
                found=f"case {case} of {name} in {place}",
                expected=f"one of the choices of {dimension.of}: {', '.join(map(str, choices))}",
                hint=_near(str(case), [str(choice) for choice in choices]),
            )


def _check_first(search: Search, base: Config, values: dict[str, Any], place: str) -> None:
    for name in values:
        if name not in search.space:
            raise UserError(
                found=f"{name} in {place}",
                expected="settings of the space",
                hint=_near(name, list(search.space)),
            )
    config.changed(base, values, place)
    for name, case, dimension in dimensions(search):
        outer = search.space[name]
        if isinstance(outer, Conditional) and values.get(outer.of) != case:
            continue
        if name not in values:
            raise UserError(
                found=f"no {name} in {place}", expected="a value for every setting of the space", hint="add it"
            )
        value = values[name]
        if isinstance(dimension, Choices):
            fits = value in dimension.choices
        else:
            fits = dimension.low <= float(value) <= dimension.high
        if not fits:
            raise UserError(
                found=f"{name}={value} in {place}, which is outside of the space",
                expected=str(dimension.model_dump(exclude={"type"}, exclude_none=True)),
                hint="widen the space, or choose another value",
            )


def _validate(content: dict[str, Any], place: str) -> Search:
    try:
        return Search.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        # Pydantic puts the type of a dimension into its path, which a user did not write there.
        loc = [str(part) for part in first["loc"]]
        name = ".".join(part for part in loc if part not in ("float", "int", "categorical", "conditional"))
        if first["type"] == "extra_forbidden":
            settings = [setting for setting, _ in config.settings() if setting.split(".")[0] == name]
            raise UserError(
                found=f"unknown key {name} in {place}",
                expected="one of the keys that python -m trainer.tune --help lists",
                hint=f"the recipe's are set for all trials: settings.{settings[0]}=..."
                if settings
                else _near(loc[-1], _keys(loc)),
            ) from None
        if first["type"] in ("missing", "union_tag_not_found"):
            name = f"{name}.type" if first["type"] == "union_tag_not_found" else name
            raise UserError(
                found=f"no {name} in {place}", expected="a value for it", hint=f"compare it with {EXAMPLE}"
            ) from None
        reason = first["msg"].removeprefix("Value error, ")
        given = first["input"] if isinstance(first["input"], str | int | float | bool | None) else "..."
        raise UserError(
            found=f"{name}: {given} in {place}" if name else f"{place}",
            expected=reason[0].lower() + reason[1:],
            hint=dict(describe()).get(name) or f"compare it with {EXAMPLE}",
        ) from None


def _keys(loc: list[str]) -> list[str]:
    """The keys that may stand where an unknown one was found."""
    tags = {"float": FloatRange, "int": IntRange, "categorical": Choices, "conditional": Conditional}
    models = {"sampler": Sampler, "pruner": Pruner, "budget": Budget} | tags
    model = next((models[part] for part in reversed(loc[:-1]) if part in models), Search)
    return list(model.model_fields)


def _near(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else "remove it"


def best_recipe(search: Search, base: Config, values: dict[str, Any], name: str, head: list[str]) -> str:
    """The text of a complete recipe with the best values; head: lines about where they are from."""
    own = {"run.name": name}
    if "data.val_fraction" in search.settings:
        own["data.val_fraction"] = config.load(search.recipe, []).data.val_fraction
    found = config.changed(base, values | own, "the best trial")
    content = found.model_dump(mode="json", exclude_unset=True)
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    return "".join(f"# {line}".rstrip() + "\n" for line in head) + text
