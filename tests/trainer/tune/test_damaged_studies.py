"""A search continues in its directory or refuses it with one message, whatever is in it."""

from __future__ import annotations

import resource
import shutil
from pathlib import Path

import pytest
import yaml
from support.damaged_runs import damage, run
from support.training_runs import write_smallest_recipe

from shards.errors import CorruptError
from trainer.tune import __main__ as tune
from trainer.tune import search_space
from trainer.tune.study import SharedStudy
from trainer.tune.trial import TrialPaused, TrialReporter

MAX_KILOBYTES = 400_000  # by which memory may grow
MESSAGE = ("error: ", "\nexpected: ", "\nhint: ")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study whose second trial is not finished, another one, and their search files."""
    place = tmp_path_factory.mktemp("studies")
    write_smallest_recipe(place, epochs=2)
    report = TrialReporter.log_epoch

    def pause(reporter: TrialReporter, record: dict) -> None:
        report(reporter, record)
        if reporter._trial.number == 1:
            raise TrialPaused

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrialReporter, "log_epoch", pause)
        for seed, name in enumerate(("study", "other")):
            space = {"optim.lr": {"type": "float", "low": 1e-3, "high": 1e-2}}
            search = {"recipe": str(place / "recipe.yaml"), "seed": 3 * seed, "budget": {"trials": 2}, "space": space}
            (place / f"{name}.yaml").write_text(yaml.safe_dump(search))
            assert run(tune.main, "tune", place / f"{name}.yaml", f"dir={place / name}").status == 0
    return place


def attack(place: Path, directory: Path, seed: int) -> list[str]:
    """Damage a copy of the study and continue it; returns what is wrong with the outcome."""
    shutil.copytree(place / "study", directory)
    what = damage(directory, place / "other", seed)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcome = run(tune.main, "tune", place / "study.yaml", f"dir={directory}")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    shutil.rmtree(directory)
    is_refused = outcome.status == 2 and [outcome.errors.count(word) for word in MESSAGE] == [1, 1, 1]
    if (outcome.status == 0 or is_refused) and "Traceback" not in outcome.errors and grown < MAX_KILOBYTES:
        return []
    return [f"{what}: status {outcome.status}, {grown} kB\n{outcome.errors[-3000:]}"]


# The log of a trial is a pipe; an option of the optimizer is changed; the journal is cut.
@pytest.mark.parametrize("seed", [7, 28, 11])
def test_a_damaged_study_continues_or_is_refused(place: Path, tmp_path: Path, seed: int) -> None:
    assert attack(place, tmp_path / "study", seed) == []


def test_wrong_results_in_the_journal_are_refused(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "study", tmp_path / "study")
    search, base = search_space.load(place / "study.yaml", [f"dir={tmp_path / 'study'}"])
    study = SharedStudy(search, base)
    assert [result.state for result in study.results()] == ["complete", "running"]
    running = study._study.get_trials(deepcopy=False)[1]
    study._study._storage.set_trial_user_attr(running._trial_id, "scores", "many")
    with pytest.raises(CorruptError, match=r"study\.journal, which cannot be read"):
        study.results()


@pytest.mark.slow
@pytest.mark.parametrize("start", range(100, 300, 20))
def test_many_damaged_studies_go_on_or_are_refused(place: Path, tmp_path: Path, start: int) -> None:
    wrong = [line for seed in range(start, start + 20) for line in attack(place, tmp_path / "study", seed)]
    assert not wrong, "\n\n".join(wrong)
