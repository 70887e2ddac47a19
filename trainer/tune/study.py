"""Trials drawn and remembered by Optuna, in a directory that any number of processes and machines share.

A trial belongs to the process that holds the lock in its directory. One that is unfinished and not held was left by a
process that was stopped or killed: the next process takes it up, with its values, and goes on from its checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from shards.atomic import locked, make_directory
from shards.errors import UserError
from trainer.settings import Config
from trainer.tune.search_space import Choices, Conditional, FloatRange, IntRange, Search, dimensions

try:
    import optuna
except ImportError:
    raise UserError(
        found="no package optuna, by which python -m trainer.tune searches",
        expected="Inkstream with its extra `tune`",
        hint="pip install 'inkstream[tune]'",
    ) from None

optuna.logging.set_verbosity(optuna.logging.WARNING)
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)

State = optuna.trial.TrialState
_MOST_STARTS = 3  # of a trial whose process dies
_JOURNAL = "study.journal"


@dataclass(frozen=True)
class Result:
    """What is known of a trial.

    state: `complete`, `pruned`, `failed` or `running`. values: the searched settings that it was given. figures: the
    best validation figure of each finished repeat; mean, std: of them (std None of a single one). curve: pairs of the
    epochs trained so far and the mean figure then. seconds: spent on it up to its last epoch. note: why it failed or
    was given up.
    """

    number: int
    state: str
    values: dict[str, Any]
    figures: list[float]
    curve: list[tuple[int, float]]
    seconds: float
    note: str

    @property
    def mean(self) -> float | None:
        return float(np.mean(self.figures)) if self.figures and self.state == "complete" else None

    @property
    def std(self) -> float | None:
        return float(np.std(self.figures, ddof=1)) if len(self.figures) > 1 else None


class Trial:
    """A trial that this process holds."""

    def __init__(self, trial: optuna.Trial, search: Search, directory: Path) -> None:
        self._trial = trial
        self.number = trial.number
        self.directory = directory
        self.values = _suggest(trial, search)
        self._earlier = float(self._known().user_attrs.get("seconds", 0.0))  # of processes that held it before
        self._taken = time.perf_counter()

    def report(self, epochs: int, figure: float) -> bool:
        """Tell the mean figure after so many epochs; whether the trial is to be given up."""
        self.note(seconds=self._earlier + time.perf_counter() - self._taken)
        if epochs not in self._known().intermediate_values:
            self._trial.report(figure, epochs)
        return self._trial.should_prune()

    def note(self, **attributes: Any) -> None:
        for name, value in attributes.items():
            self._trial.set_user_attr(name, value)

    def complete(self, figures: list[float]) -> None:
        self.note(figures=figures)
        self._trial.study.tell(self._trial, float(np.mean(figures)))

    def give_up(self, reason: str) -> None:
        self.note(note=reason)
        self._trial.study.tell(self._trial, state=State.PRUNED)

    def fail(self, reason: str) -> None:
        self.note(note=reason)
        self._trial.study.tell(self._trial, state=State.FAIL)

    def _known(self) -> optuna.trial.FrozenTrial:
        return self._trial.storage.get_trial(self._trial._trial_id)


class Study:
    """A study in its directory: the journal, a lock file, and a directory for each trial."""

    def __init__(self, search: Search, base: Config) -> None:
        """Begin the study or go on with it. Raises `UserError` if it is another one that is there."""
        assert search.dir is not None
        self.directory = search.dir
        self._search = search
        make_directory(self.directory)
        journal = self.directory / _JOURNAL
        # The system frees this lock when its holder dies, and Optuna's own only after half a minute.
        lock = FileLock(f"{journal}.lock")
        with self.alone():
            _cut_torn_line(journal, lock)
            backend = optuna.storages.journal.JournalFileBackend(str(journal), lock_obj=lock)  # type: ignore[arg-type]
            storage = optuna.storages.JournalStorage(backend)
            self._study = optuna.create_study(
                storage=storage,
                study_name="search",
                direction="maximize",
                load_if_exists=True,
                pruner=_pruner(search),
            )
            self._check_same({"search": search.identity(), "recipe": base.recipe()})

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep the study's other processes waiting."""
        with locked(self.directory / ".lock"):
            yield

    def check_data(self, digest: str) -> None:
        """Refuse data other than that of the trials before."""
        with self.alone():
            known = self._study.user_attrs.get("data")
            if known is None:
                self._study.set_user_attr("data", digest)
            elif known != digest:
                raise UserError(
                    found=f"other data than that of the trials in {self.directory}",
                    expected="the same packed set for all trials of a study",
                    hint="name that set, or begin another study: dir=...",
                )

    @contextmanager
    def next_trial(self) -> Iterator[Trial | None]:
        """The next trial to be trained, held by this process until the end of the block: one that was left unfinished,
        else a new one; None when the budget of trials is used up."""
        with ExitStack() as held:
            with self.alone():
                trial = self._take_up(held) or self._draw(held)
            yield trial

    def unfinished(self) -> list[int]:
        """Numbers of the trials that are neither done nor held by any process."""
        left = []
        with self.alone():
            for trial in self._study.get_trials(deepcopy=False, states=(State.RUNNING,)):
                with ExitStack() as held:
                    if self._hold(trial.number, held):
                        left.append(trial.number)
        return left

    def results(self) -> list[Result]:
        names = {State.COMPLETE: "complete", State.PRUNED: "pruned", State.FAIL: "failed", State.RUNNING: "running"}
        found = []
        for trial in self._study.get_trials(deepcopy=False):
            if trial.state not in names:
                continue
            attributes = trial.user_attrs
            found.append(
                Result(
                    number=trial.number,
                    state=names[trial.state],
                    values=_values(trial.params, self._search),
                    figures=attributes.get("figures", []),
                    curve=sorted(trial.intermediate_values.items()),
                    seconds=attributes.get("seconds", 0.0),
                    note=attributes.get("note", ""),
                )
            )
        return found

    def _check_same(self, content: dict[str, dict[str, Any]]) -> None:
        known = self._study.user_attrs.get("content")
        content = json.loads(json.dumps(content))
        if known is None:
            self._study.set_user_attr("content", content)
            for values in self._search.first:
                self._study.enqueue_trial(_parameters(values, self._search))
            return
        for part in content:
            for name in {**known[part], **content[part]}:
                before, now = known[part].get(name), content[part].get(name)
                if before != now:
                    raise UserError(
                        found=f"{name}={now} of the {part}, and {before} when the study in {self.directory} began",
                        expected="the same search when a study goes on; its budget may differ",
                        hint="begin another study: dir=...",
                    )

    def _take_up(self, held: ExitStack) -> Trial | None:
        for known in self._study.get_trials(deepcopy=False, states=(State.RUNNING,)):
            if not self._hold(known.number, held):
                continue
            trial = self._trial(known._trial_id, known.number)
            starts = known.user_attrs.get("starts", 0)
            if starts < _MOST_STARTS:
                trial.note(starts=starts + 1)
                return trial
            trial.fail(f"its process died {starts} times")
            held.close()
        return None

    def _draw(self, held: ExitStack) -> Trial | None:
        most = self._search.budget.trials
        begun = [trial for trial in self._study.get_trials(deepcopy=False) if trial.state != State.WAITING]
        if most is not None and len(begun) >= most:
            return None
        drawn = self._study.ask()
        assert self._hold(drawn.number, held)
        trial = self._trial(drawn._trial_id, drawn.number)
        trial.note(starts=1)
        return trial

    def _trial(self, identifier: int, number: int) -> Trial:
        """A trial with values drawn by its number and what is known now, whichever process draws them."""
        self._study.sampler = _sampler(self._search, number)
        return Trial(optuna.Trial(self._study, identifier), self._search, self._place(number))

    def _hold(self, number: int, held: ExitStack) -> bool:
        make_directory(self._place(number))
        lock = FileLock(self._place(number) / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return False
        held.callback(lock.release)
        return True

    def _place(self, number: int) -> Path:
        return self.directory / "trials" / f"{number:04}"


def importances(results: list[Result], search: Search, base: Config) -> dict[str, float]:
    """The share of each searched setting in how the mean figures of the complete trials vary, by functional ANOVA
    (Hutter et al. 2014, https://proceedings.mlr.press/v32/hutter14.html); the largest first, and empty if there are
    too few of them or nothing varies.

    A setting that a trial was not given counts with its value in the recipe.
    """
    done = [result for result in results if result.mean is not None]
    if len(done) < 4 or len({result.mean for result in done}) < 2:
        return {}
    table = full_values(done, search, base)
    by_ratio = logarithmic(search)
    scales = {name: _scale(column, name in by_ratio) for name, column in table.items()}
    flat = optuna.create_study(direction="maximize")
    for place, result in enumerate(done):
        params = {name: float(scales[name](column[place])) for name, column in table.items()}
        ranges = {
            name: optuna.distributions.FloatDistribution(
                min(map(scales[name], column)), max(map(scales[name], column)) + 1e-9
            )
            for name, column in table.items()
        }
        flat.add_trial(optuna.trial.create_trial(params=params, distributions=ranges, value=result.mean))
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    with contextlib.suppress(RuntimeError, ValueError):  # nothing to tell apart
        found = optuna.importance.get_param_importances(flat, evaluator=evaluator)
        return {name: share for name, share in found.items() if math.isfinite(share)}
    return {}


def full_values(results: list[Result], search: Search, base: Config) -> dict[str, list[Any]]:
    """The value of every searched setting in each trial, those of the recipe where it was not given one."""
    recipe = base.recipe()
    return {name: [result.values.get(name, recipe[name]) for result in results] for name in search.space}


def logarithmic(search: Search) -> frozenset[str]:
    """The settings that are drawn from a logarithmic range; choices, too, where they are numbers, differ by ratios."""
    return frozenset(
        name for name, _, dimension in dimensions(search) if isinstance(dimension, Choices) or dimension.log
    )


def _scale(column: list[Any], logarithmic: bool) -> Any:
    """How values are laid on a line: numbers by their (logarithmic) size, others by their order of appearance."""
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in column):
        return math.log10 if logarithmic and min(column) > 0 else float
    order = list(dict.fromkeys(map(label, column)))
    return lambda value: float(order.index(label(value)))


def label(value: Any) -> Any:
    """A choice as Optuna takes it: plain values as they are, others as JSON."""
    return value if value is None or isinstance(value, str | int | float | bool) else json.dumps(value)


def _suggest(trial: optuna.Trial, search: Search) -> dict[str, Any]:
    """Draw the values of a trial, or recall those that were drawn."""
    found: dict[str, Any] = {}
    # The choices that others depend on are drawn first.
    for name, case, dimension in sorted(dimensions(search), key=lambda entry: entry[1] is not None):
        outer = search.space[name]
        if isinstance(outer, Conditional) and found[outer.of] != case:
            continue
        key = _key(name, outer, case)
        if isinstance(dimension, Choices):
            found[name] = _choice(dimension, trial.suggest_categorical(key, [label(c) for c in dimension.choices]))
        elif isinstance(dimension, IntRange):
            span = {"step": dimension.step or 1, "log": dimension.log}
            found[name] = trial.suggest_int(key, dimension.low, dimension.high, **span)
        else:
            assert isinstance(dimension, FloatRange)
            span = {"step": dimension.step, "log": dimension.log}
            found[name] = _rounded(trial.suggest_float(key, dimension.low, dimension.high, **span), dimension)
    return {name: found[name] for name in search.space if name in found}


def _values(parameters: dict[str, Any], search: Search) -> dict[str, Any]:
    found = {}
    for name, case, dimension in dimensions(search):
        key = _key(name, search.space[name], case)
        if key in parameters:
            value = parameters[key]
            if isinstance(dimension, Choices):
                value = _choice(dimension, value)
            elif isinstance(dimension, FloatRange):
                value = _rounded(value, dimension)
            found[name] = value
    return found


def _rounded(value: float, dimension: FloatRange) -> float:
    """As many digits of what was drawn as a person would write into a recipe."""
    return min(max(float(f"{value:.6g}"), dimension.low), dimension.high)


def _parameters(values: dict[str, Any], search: Search) -> dict[str, Any]:
    found = {}
    for name, case, dimension in dimensions(search):
        outer = search.space[name]
        if isinstance(outer, Conditional) and values.get(outer.of) != case:
            continue
        value = values[name]
        plain = label(value) if isinstance(dimension, Choices) else float(value)
        found[_key(name, outer, case)] = int(plain) if isinstance(dimension, IntRange) else plain
    return found


def _choice(dimension: Choices, chosen: Any) -> Any:
    return next(choice for choice in dimension.choices if label(choice) == chosen)


def _key(name: str, outer: Any, case: Any) -> str:
    """Optuna's name of a setting; a conditional one has a name for each case."""
    return f"{name} with {outer.of}={case}" if isinstance(outer, Conditional) else name


def _sampler(search: Search, number: int) -> optuna.samplers.BaseSampler:
    seed = int(np.random.SeedSequence([search.seed, number]).generate_state(1)[0])
    if search.sampler.name == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    # With a constant liar, processes that draw at the same time do not draw the same.
    startup = search.sampler.startup_trials
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup, constant_liar=True)


def _pruner(search: Search) -> optuna.pruners.BasePruner:
    pruner = search.pruner
    if pruner.name == "median":
        return optuna.pruners.MedianPruner(pruner.startup_trials, pruner.warmup_epochs)
    if pruner.name == "successive_halving":
        return optuna.pruners.SuccessiveHalvingPruner(pruner.warmup_epochs, pruner.reduction)
    return optuna.pruners.NopPruner()


def _cut_torn_line(journal: Path, lock: FileLock) -> None:
    """Remove the last line of a journal if its writer died over it; others could not be read any more."""
    if not journal.exists():
        return
    with lock, open(journal, "r+b") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            file.truncate(whole)
