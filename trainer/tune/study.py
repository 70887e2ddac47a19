"""Optuna study in a directory that any number of processes and machines share.

A running trial belongs to the process that holds the lock in its directory. A running trial whose lock is free was left
by a process that was stopped or killed: the next process resumes it, with its values, from its checkpoint. (Optuna's
heartbeat and `RetryFailedTrialCallback` need an SQL server and start such a trial from scratch.)
"""

from __future__ import annotations

import json
import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from pipeline.readers.naming import natural_key
from shards.atomic import append_line, check_is_file, file_lock, make_directory
from shards.errors import UserError, errors_as_corrupt
from trainer.checkpoint.compat import default_recipe
from trainer.config.schema import Config
from trainer.tune.search_space import Range, SearchConfig, default_keys

try:
    import optuna
    from optuna.storages.journal import JournalFileBackend
except ImportError:
    raise UserError(
        found="no package optuna, which python -m trainer.tune needs",
        expected="Inkstream with its extra `tune`",
        hint='pip install -e ".[tune]"',
    ) from None

optuna.logging.set_verbosity(optuna.logging.WARNING)
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
warnings.filterwarnings("ignore", message="The reported value is ignored")  # of an epoch that was reported before
warnings.filterwarnings("ignore", message="Choices for a categorical distribution")  # lists, which the journal can hold

State = optuna.trial.TrialState
log = logging.getLogger(__name__)

_MAX_STARTS = 3  # of a trial whose process dies before it reports a further epoch
_JOURNAL = "study.journal"
_HELD = UserError("a trial that another process trains", "a free trial", "wait for it to end")
_HINT = "start another study: dir=..."
_STATES = {State.COMPLETE: "complete", State.PRUNED: "pruned", State.FAIL: "failed", State.RUNNING: "running"}


@dataclass(frozen=True)
class TrialResult:
    """Result of a trial.

    Attributes:
        number: Number of the trial, from 0.
        state: `complete`, `pruned`, `failed` or `running`.
        values: Its values, by setting.
        scores: Best validation metric of each finished seed.
        curve: Pairs of epochs trained so far and the mean metric at that epoch.
        seconds: Training time up to its last epoch.
        note: Why it failed or was pruned.
    """

    number: int
    state: str
    values: dict[str, Any]
    scores: list[float]
    curve: list[tuple[int, float]]
    seconds: float
    note: str

    @property
    def mean(self) -> float | None:
        return float(np.mean(self.scores)) if self.scores and self.state == "complete" else None

    @property
    def std(self) -> float | None:
        return float(np.std(self.scores, ddof=1)) if len(self.scores) > 1 else None


class RunningTrial:
    """A trial whose lock this process holds."""

    def __init__(self, trial: optuna.Trial, search: SearchConfig, directory: Path) -> None:
        self._trial = trial
        self.number = trial.number
        self.directory = directory
        values: dict[str, Any] = {}
        for name, parameter, distribution in search.applicable(values):
            values[name] = distribution.suggest(trial, parameter)  # the same again where it was suggested before
        self.values = {name: values[name] for name in search.space if name in values}
        self._earlier = float(trial.user_attrs.get("seconds", 0.0))  # in processes that held it before
        self._start = time.perf_counter()
        self._epochs = int(trial.user_attrs.get("epochs", 0))  # the most that any process has reported
        self.note(values=self.values)

    def report(self, epochs: int, metric: float) -> bool:
        """Report the mean metric after some epochs; returns whether to prune the trial."""
        self.note(seconds=self._earlier + time.perf_counter() - self._start)
        if epochs > self._epochs:  # progress: deaths are counted anew
            self._epochs = epochs
            self.note(epochs=epochs, starts=1)
        self._trial.report(metric, epochs)  # a step that was reported before is ignored
        return self._trial.should_prune()

    def note(self, **attributes: Any) -> None:
        """Store user attributes."""
        for name, value in attributes.items():
            self._trial.set_user_attr(name, value)

    def complete(self, scores: list[float]) -> None:
        """End the trial with the scores of its seeds."""
        self.note(scores=scores)
        self._trial.study.tell(self._trial, float(np.mean(scores)))

    def abort(self, state: State, reason: str) -> None:
        """End the trial as pruned or failed."""
        self.note(note=reason)
        self._trial.study.tell(self._trial, state=state)


class SharedStudy:
    """A study in its directory: the journal, a lock file, and a directory for each trial."""

    def __init__(self, search: SearchConfig, base: Config) -> None:
        """Create the study or open it.

        Raises:
            UserError: The directory holds the study of another search.
        """
        assert search.dir is not None
        self.directory = search.dir
        self._search = search
        make_directory(self.directory)
        journal = self._journal = self.directory / _JOURNAL
        with self.exclusive(), errors_as_corrupt(journal, _HINT):
            check_is_file(journal)
            self._study = optuna.create_study(
                storage=optuna.storages.JournalStorage(_Journal(str(journal))),
                study_name="search",
                direction="maximize",
                load_if_exists=True,
                pruner=_pruner(search),
            )
            self._check_same("recipe", base.recipe(), default_recipe())
            if self._check_same("search", search.identity(), default_keys()):
                for values in search.initial_trials:
                    applicable = search.applicable(values)
                    self._study.enqueue_trial({parameter: values[name] for name, parameter, _ in applicable})

    def exclusive(self) -> AbstractContextManager[None]:
        """Lock the study for other processes."""
        return file_lock(self.directory / ".lock")

    def check_data(self, identity: str) -> None:
        """Raise `UserError` for data that differ from those of the trials before."""
        with self.exclusive():
            self._check_same("data", {"digest": identity}, {})  # the key in studies on disk

    @contextmanager
    def next_trial(self) -> Iterator[RunningTrial | None]:
        """Lock the next trial to train until the end of the block: an unfinished one, else a new one.

        Yields:
            The trial; None once the budget of trials is used up.
        """
        with ExitStack() as stack:
            with self.exclusive(), errors_as_corrupt(self._journal, _HINT):
                trial = self._resume(stack) or self._ask(stack)
            yield trial

    def unfinished(self) -> list[int]:
        """Numbers of the running trials whose lock is free."""
        with self.exclusive(), ExitStack() as stack:
            running = self._study.get_trials(deepcopy=False, states=(State.RUNNING,))
            return [trial.number for trial in running if self._lock(trial.number, stack)]

    def results(self) -> list[TrialResult]:
        with errors_as_corrupt(self._journal, _HINT):
            records = [
                {
                    "number": trial.number,
                    "state": _STATES[trial.state],
                    "values": trial.user_attrs.get("values", {}),
                    "scores": trial.user_attrs.get("scores", []),
                    "curve": sorted(trial.intermediate_values.items()),
                    "seconds": trial.user_attrs.get("seconds", 0.0),
                    "note": trial.user_attrs.get("note", ""),
                }
                for trial in self._study.get_trials(deepcopy=False)
                if trial.state in _STATES
            ]
            return TypeAdapter(list[TrialResult]).validate_python(records)

    def _check_same(self, key: str, content: dict[str, Any], defaults: dict[str, Any]) -> bool:
        """Store what the study is made of, or compare it with what is stored; returns whether it is new.

        A study of an earlier version lacks settings that were added since. It has their defaults.
        """
        content = json.loads(json.dumps(content))
        known = self._study.user_attrs.get(key)
        if known is None:
            self._study.set_user_attr(key, content)
            return True
        for name in known | content:
            stored = known.get(name, defaults.get(name))
            if stored != content.get(name):
                raise UserError(
                    found=f"{name}={content.get(name)} of the {key}, but {stored} in {self.directory}",
                    expected="the same search, recipe and data when a study is resumed; its budget may differ",
                    hint=_HINT,
                )
        return False

    def _resume(self, stack: ExitStack) -> RunningTrial | None:
        for known in self._study.get_trials(deepcopy=False, states=(State.RUNNING,)):
            if not self._lock(known.number, stack):
                continue
            trial = self._trial(known._trial_id, known.number)
            starts = known.user_attrs.get("starts", 0)
            if starts < _MAX_STARTS:
                trial.note(starts=starts + 1)
                return trial
            reason = f"its process died {starts} times without completing a further epoch"
            log.warning("trial %d failed: %s", known.number, reason)
            trial.abort(State.FAIL, reason)
            stack.close()
        return None

    def _ask(self, stack: ExitStack) -> RunningTrial | None:
        most = self._search.budget.trials
        begun = [trial for trial in self._study.get_trials(deepcopy=False) if trial.state != State.WAITING]
        if most is not None and len(begun) >= most:
            return None
        asked = self._study.ask()
        assert self._lock(asked.number, stack)
        trial = self._trial(asked._trial_id, asked.number)
        trial.note(starts=1)
        return trial

    def _trial(self, identifier: int, number: int) -> RunningTrial:
        """A trial whose values depend on its number and the finished trials, not on the process that samples them."""
        self._study.sampler = _sampler(self._search, number)
        return RunningTrial(optuna.Trial(self._study, identifier), self._search, self._trial_dir(number))

    def _lock(self, number: int, stack: ExitStack) -> bool:
        make_directory(self._trial_dir(number))
        try:
            stack.enter_context(file_lock(self._trial_dir(number) / ".lock", _HELD))
        except UserError as error:
            if error is not _HELD:
                raise
            return False
        return True

    def _trial_dir(self, number: int) -> Path:
        return self.directory / "trials" / f"{number:04}"


def flat_study(results: list[TrialResult], search: SearchConfig, base: Config) -> optuna.Study:
    """Copy results into a study in which every trial has every searched setting.

    Optuna's importances and plots omit parameters that only some trials have, so a setting whose condition did not
    apply gets the recipe's value.
    """
    recipe = base.recipe()
    columns = {name: [result.values.get(name, recipe[name]) for result in results] for name in search.space if results}
    distributions: dict[str, optuna.distributions.BaseDistribution] = {}
    for name, column in columns.items():
        ranges = [each for each in search.distributions(name) if isinstance(each, Range)]
        if len(ranges) == len(search.distributions(name)) and None not in column:
            log = all(each.log for each in ranges) and min(column) > 0
            distributions[name] = optuna.distributions.FloatDistribution(min(column), max(column), log=log)
        else:
            columns[name] = labels = ["null" if value is None else str(value) for value in column]
            choices = sorted(set(labels), key=natural_key)
            distributions[name] = optuna.distributions.CategoricalDistribution(choices)
    study = optuna.create_study(direction="maximize")
    for number, result in enumerate(results):
        study.add_trial(
            optuna.trial.create_trial(
                state=State.COMPLETE if result.mean is not None else State.PRUNED,
                value=result.mean,
                params={name: column[number] for name, column in columns.items()},
                distributions=distributions,
                intermediate_values=dict(result.curve),
            )
        )
    return study


def can_rank(study: optuna.Study) -> bool:
    """Whether there are at least 4 complete trials, whose results differ."""
    values = [trial.value for trial in study.get_trials(deepcopy=False, states=(State.COMPLETE,))]
    return len(values) >= 4 and len(set(values)) >= 2


def _sampler(search: SearchConfig, number: int) -> optuna.samplers.BaseSampler:
    seed = int(np.random.SeedSequence([search.seed, number]).generate_state(1)[0])
    if search.sampler.name == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    # constant_liar: processes that sample at the same time do not sample the same values
    startup = search.sampler.startup_trials
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup, constant_liar=True)


def _pruner(search: SearchConfig) -> optuna.pruners.BasePruner:
    pruner = search.pruner
    if pruner.name == "median":
        return optuna.pruners.MedianPruner(pruner.startup_trials, pruner.warmup_epochs)
    if pruner.name == "successive_halving":
        return optuna.pruners.SuccessiveHalvingPruner(pruner.warmup_epochs, pruner.reduction)
    return optuna.pruners.NopPruner()


class _Journal(JournalFileBackend):
    """A journal that a full disk or a killed process does not damage.

    The system frees its lock when the holder dies; Optuna's own locks stay for half a minute.
    """

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        path = Path(self._file_path)
        with file_lock(path.with_name(f"{path.name}.lock")):
            append_line(path, "\n".join(json.dumps(log, separators=(",", ":")) for log in logs))
