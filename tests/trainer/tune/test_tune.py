"""A search: judged by the validation part alone, gone on with after any death, its best recipe one that trains."""

from __future__ import annotations

import json
import multiprocessing.spawn
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from conftest import ROOT
from support import warm_process

from shards import UserError
from shards.cli import run_command
from shards.errors import NotFoundError
from trainer.checkpoint.run_dir import RunDirectory
from trainer.config import load as config
from trainer.loop import engine
from trainer.run import main as run_main
from trainer.tune import search_space as search
from trainer.tune import study_page, workers
from trainer.tune.__main__ import main
from trainer.tune.study import SharedStudy, TrialResult, can_rank, flat_study, optuna
from trainer.tune.study_page import ranking
from trainer.tune.workers import work

SEARCHES = sorted((ROOT / "configs" / "search").glob("*.yaml"))
RECIPE = {
    "data": {"val_fraction": 0.2, "resolution": 8, "verify": False},
    "loader": {"batch_size": 64},
    "model": {"name": "three_block_cnn"},
    "optim": {"name": "adamw", "lr": 3e-3},
    "trainer": {"epochs": 1, "precision": "fp32"},
    "device": "cpu",
}
LR = {"type": "float", "low": 1e-3, "high": 1e-2, "log": True}
SEARCH = {
    "train_fraction": 0.5,
    "budget": {"trials": 2},
    "pruner": {"name": "none"},
    "space": {"optim.lr": LR},
}
BY_OPTIMIZER = {
    "optim.name": {"type": "categorical", "choices": ["adamw", "lion", "sgd_lookahead"]},
    "optim.lr": {
        "type": "conditional",
        "of": "optim.name",
        "cases": {"adamw": LR, "lion": LR | {"low": 1e-4, "high": 1e-3}},
    },
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, digits_set: Path) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "small.yaml"
    path.write_text(yaml.safe_dump(RECIPE | {"data": RECIPE["data"] | {"shards": str(digits_set)}}))
    return path


def written(directory: Path, recipe: Path, /, **changes: Any) -> Path:
    """A search file; its study lies beside it."""
    path = directory / "mine.yaml"
    path.write_text(yaml.safe_dump({"recipe": str(recipe), "dir": str(directory / "study"), **SEARCH, **changes}))
    return path


def tune_here(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Search in this process, which saves the start of another."""
    monkeypatch.setattr(sys, "argv", ["trainer.tune", *map(str, arguments)])
    return main()


def results(path: Path) -> list[TrialResult]:
    wanted, base = search.load(path, [])
    return SharedStudy(wanted, base).results()


def metrics_of(path: Path) -> list[str]:
    """The epochs of a search's first training."""
    return (path.parent / "study/trials/0000/seed-1/metrics.jsonl").read_text().splitlines()


def start(*arguments: object, slowed: float = 0.0) -> subprocess.Popen:
    """A search by a real process, each of its steps slowed down by some seconds."""
    code = (
        "import time, trainer.loop.engine as engine\n"
        "step = engine.train_step\n"
        "def slow_step(*arguments, **options):\n"
        f"    time.sleep({slowed})\n"
        "    return step(*arguments, **options)\n"
        "engine.train_step = slow_step\n"
        "from shards.cli import run_command\n"
        "from trainer.tune.__main__ import main\n"
        "run_command(main)\n"
    )
    return warm_process.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(condition: Any, process: subprocess.Popen, timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(("system", "calls"), [("posix", ["terminate", "join"]), ("nt", ["join", "terminate", "join"])])
def test_workers_can_write_their_checkpoints(monkeypatch: pytest.MonkeyPatch, system: str, calls: list[str]) -> None:
    class Worker:
        def terminate(self) -> None:
            found.append("terminate")

        def join(self, seconds: float) -> None:
            assert seconds > base.checkpoint.grace_seconds
            found.append("join")

    found: list[str] = []
    base = config.load(ROOT / "configs" / "quickstart.yaml", [])
    with monkeypatch.context() as patch:
        patch.setattr(os, "name", system)
        workers._stop([Worker()], base)
    assert found == calls


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory, recipe: Path) -> Path:
    """The file of a search of three trials with two repeats each, finished; the test part was watched."""
    directory = tmp_path_factory.mktemp("searched")
    own = {"logging.tensorboard": True}
    path = written(directory, recipe, seeds_per_trial=2, budget={"trials": 3}, space=BY_OPTIMIZER, settings=own)
    with pytest.MonkeyPatch.context() as patch:
        judged = []
        evaluate = engine.evaluate

        def watched(model: Any, loader: Any, *arguments: Any, **options: Any) -> Any:
            judged.append(len(loader.sampler.samples))
            return evaluate(model, loader, *arguments, **options)

        patch.setattr(engine, "evaluate", watched)
        patch.setattr(engine, "evaluate_best", lambda *_: pytest.fail("the test part was evaluated"))
        assert tune_here(patch, path) == 0
    assert judged == [judged[0]] * 6  # after each epoch
    assert judged[0] == pytest.approx(0.2 * 1438, abs=10)  # the validation part; the test part has 359 images
    return path


def test_a_search_leaves_trials_a_page_and_the_best_recipe(searched: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    study = searched.parent / "study"
    found = results(searched)
    assert [(result.number, result.state, len(result.scores)) for result in found] == [
        (number, "complete", 2) for number in range(3)
    ]
    for result in found:
        case = result.values["optim.name"]
        assert ("optim.lr" in result.values) == (case != "sgd_lookahead")
        for repeat, figure in enumerate(result.scores, 1):
            run = study / "trials" / f"{result.number:04}" / f"seed-{repeat}"
            summary = json.loads((run / "summary.json").read_text())
            settings = config.load(run / "config.yaml", [])
            assert summary["metric"] == figure == max(summary["metrics"]) == summary["validation"]["accuracy"]
            events = event_accumulator.EventAccumulator(str(run / "tensorboard")).Reload()
            assert events.Scalars("validation/accuracy")[0].value == pytest.approx(figure)
            hyperparameters = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
            assert HParamsPluginData.FromString(hyperparameters).session_start_info.hparams[
                "optim.name"
            ].string_value == (case)
            assert summary["validation"]["samples"] == pytest.approx(0.2 * 1438, abs=10)
            assert (settings.seed, settings.data.train_fraction, settings.optim.name) == (repeat - 1, 0.5, case)
            assert not (run / "checkpoints").exists()
            assert not (run / "predictions.npz").exists()
    best = ranking(found)[0]
    assert best.mean == max(sum(result.scores) / 2 for result in found)
    page = (study / "study.html").read_text()
    assert f"{best.mean:.2%} ± {best.std:.2%}" in page
    assert not re.findall(r'(?:src|href)=(?!"(?:#|data:))|url\((?!#)|@import', page)
    assert len(re.findall('<svg [^>]*role="img" aria-label=', page)) == page.count("<svg ") == 4


def test_the_best_recipe_is_complete_and_trains(
    searched: Path, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = searched.parent / "study" / "best.yaml"
    found, base = config.load(path, []), config.load(recipe, [])
    best = ranking(results(searched))[0].values
    expected = base.recipe() | best
    assert found.recipe() == expected
    assert yaml.safe_load(path.read_text()).keys() == RECIPE.keys() | {"run", "logging"}
    monkeypatch.setattr(
        sys, "argv", ["trainer.run", str(path), f"run.dir={tmp_path / 'run'}", "data.train_fraction=0.2"]
    )
    assert run_main() == 0
    assert (tmp_path / "run" / "summary.json").exists()


def test_workers_that_end_together_write_the_page_in_turn(searched: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    described, base = search.load(searched, [])
    page = described.dir / study_page.PAGE
    content = page.read_bytes()
    writing: set[int] = set()
    most = 0

    def render(*_: Any, **values: Any) -> str:
        nonlocal most
        writing.add(threading.get_ident())
        most = max(most, len(writing))
        time.sleep(0.05)
        writing.discard(threading.get_ident())
        return values["name"]

    monkeypatch.setattr(study_page, "render", render)
    monkeypatch.setattr(study_page, "_charts", lambda *_: [])
    failures: list[Exception] = []

    def write() -> None:
        try:
            study_page.write(SharedStudy(described, base), described, base)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=write) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert most == 1
    assert page.read_text() == described.dir.name
    page.write_bytes(content)


def test_a_finished_search_trains_no_more_and_a_larger_budget_continues(
    searched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    before = results(searched)
    assert tune_here(monkeypatch, searched) == 0
    assert results(searched) == before
    assert "started" not in capsys.readouterr().out
    monkeypatch.setattr("trainer.tune.trial.engine.fit", lambda *_: pytest.fail("it trains"))
    with pytest.raises(pytest.fail.Exception):
        tune_here(monkeypatch, searched, "budget.trials=4")


def test_another_search_does_not_go_on_in_the_same_directory(searched: Path, recipe: Path) -> None:
    cases = (({"train_fraction": 0.4}, "train_fraction"), ({"settings.trainer.epochs": 2}, "trainer.epochs"))
    for changes, name in cases:
        overrides = [f"{key}={value}" for key, value in changes.items()]
        wanted, base = search.load(searched, overrides)
        with pytest.raises(UserError) as caught:
            SharedStudy(wanted, base)
        assert name in caught.value.found
        assert "dir=" in caught.value.hint


def test_a_study_of_an_earlier_version_continues(tmp_path: Path, recipe: Path) -> None:
    """It lacks settings that were added since, which have their defaults in it."""
    path = written(tmp_path, recipe)
    wanted, base = search.load(path, [])
    SharedStudy(wanted, base)
    journal = tmp_path / "study" / "study.journal"
    content = journal.read_text()
    earlier = content.replace('"data.class_balance":0.0,', "").replace('"pruner.reduction":3,', "")
    assert len(content) - len(earlier) == len('"data.class_balance":0.0,"pruner.reduction":3,')
    journal.write_text(earlier)
    assert SharedStudy(wanted, base).results() == []
    for change in ("settings.data.class_balance=0.5", "pruner.reduction=4"):
        with pytest.raises(UserError, match=r"class_balance=0\.5 .* but 0\.0|reduction=4 .* but 3"):
            SharedStudy(*search.load(path, [change]))


def test_what_is_drawn_follows_from_the_seed_and_the_trials_before(
    tmp_path: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.tune.workers.init_distributed", lambda device: pytest.MonkeyPatch.context())
    monkeypatch.setattr(
        "trainer.tune.workers.train_trial", lambda study, trial, *_: trial.complete([trial.values["optim.lr"]])
    )

    def drawn(name: str, *budgets: int, seed: int = 0) -> list[Any]:
        for trials in budgets:  # each in a process of its own, as it were
            changes = {"budget": {"trials": trials}, "sampler": {"startup_trials": 3}, "seed": seed}
            (tmp_path / name).mkdir(exist_ok=True)
            path = written(tmp_path / name, recipe, **changes)
            wanted, base = search.load(path, [])
            assert work(wanted, base, float("inf"), workers=2) == 0
            best = config.load(tmp_path / name / "study" / "best.yaml", [])
            assert best.loader.cache_gb == "auto", "not a worker's share"
        return [result.values["optim.lr"] for result in results(path)]

    whole = drawn("whole", 8)
    assert len(set(whole)) == 8
    assert all(1e-3 <= rate <= 1e-2 for rate in whole)
    assert drawn("in-parts", 1, 4, 8) == whole
    assert drawn("other-seed", 3, seed=1) != whole[:3]


@pytest.mark.slow
def test_a_killed_search_continues_from_its_checkpoint(tmp_path: Path, recipe: Path) -> None:
    path = written(tmp_path, recipe, settings={"trainer.epochs": 3}, budget={"trials": 1})
    run = tmp_path / "study" / "trials" / "0000" / "seed-1"
    metrics = run / "metrics.jsonl"

    process = start(path, slowed=0.05)
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 1, process)
    process.kill()
    process.wait()
    (left,) = results(path)
    assert left.state == "running"
    epochs = metrics.read_text().splitlines()

    process = start(path)
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 0, said
    (found,) = results(path)
    assert (found.state, found.values) == ("complete", left.values)
    assert metrics.read_text().splitlines()[: len(epochs)] == epochs  # not trained again
    assert len(found.curve) == 3


def test_a_stopped_search_continues(tmp_path: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, recipe, budget={"trials": 1}, settings={"trainer.epochs": 2})
    step, stopped = engine.train_step, []

    def interrupted(training: Any, batch: Any, *arguments: Any) -> Any:
        if (training.state.epoch, batch.step) == (1, 2) and not stopped:
            stopped.append(True)
            os.kill(os.getpid(), signal.SIGINT)
        return step(training, batch, *arguments)

    monkeypatch.setattr(engine, "train_step", interrupted)
    assert tune_here(monkeypatch, path) == 130
    (left,) = results(path)
    assert left.state == "running"
    first_epoch = metrics_of(path)
    assert len(first_epoch) == 1
    with open(tmp_path / "study" / "study.journal", "ab") as journal:
        journal.write(b'{"op_code": 4, "torn')  # a line that a dying machine did not finish
    assert tune_here(monkeypatch, path) == 0
    (found,) = results(path)
    assert (found.state, found.values, len(found.curve)) == ("complete", left.values, 2)
    assert metrics_of(path)[:1] == first_epoch  # not trained again


@pytest.mark.parametrize("replacement", ["warm", pytest.param("fresh", marks=pytest.mark.slow)])
def test_workers_share_a_study_and_a_killed_one_is_replaced(
    tmp_path: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, replacement: str
) -> None:
    path = written(tmp_path, recipe, budget={"trials": 3})
    trials = tmp_path / "study" / "trials"
    killed: list[int] = []

    def kill() -> None:
        deadline = time.monotonic() + 300
        while len(list(trials.glob("*/seed-1/config.yaml"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        workers = [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]
        if replacement == "fresh":
            multiprocessing.set_executable(sys.executable)
        workers[0].kill()
        killed.append(len(workers))

    killer, executable = threading.Thread(target=kill), multiprocessing.spawn.get_executable()
    killer.start()
    assert tune_here(monkeypatch, path, "--workers", 2) == 0
    killer.join()
    multiprocessing.set_executable(executable)
    assert killed == [2]
    assert "was killed by signal 9" in capsys.readouterr().err
    found = results(path)
    assert [result.state for result in found] == ["complete"] * 3
    rates = {result.values["optim.lr"] for result in found}
    assert len(rates) == 3 and rates == {float(f"{rate:.6g}") for rate in rates}


def test_a_trial_that_always_kills_its_process_fails(tmp_path: Path, recipe: Path) -> None:
    wanted, base = search.load(written(tmp_path, recipe), [])
    for _ in range(3):
        study = SharedStudy(wanted, base)
        with study.next_trial() as trial:
            assert trial is not None and trial.number == 0  # and is left without a word, as by a death
    with study.next_trial() as trial:
        assert trial is not None and trial.number == 1
        assert study.unfinished() == []  # it is held
    assert study.unfinished() == [1]
    first, _ = study.results()
    assert (first.state, first.note) == ("failed", "its process died 3 times without completing a further epoch")


def test_a_trial_that_progresses_between_deaths_of_its_process_continues(tmp_path: Path, recipe: Path) -> None:
    wanted, base = search.load(written(tmp_path, recipe), [])
    for epoch in range(1, 8):
        study = SharedStudy(wanted, base)
        with study.next_trial() as trial:
            assert trial is not None and trial.number == 0
            trial.report(epoch, 0.5)
    for _ in range(2):  # the same epoch again is no progress
        study = SharedStudy(wanted, base)
        with study.next_trial() as trial:
            assert trial is not None and trial.number == 0
            trial.report(epoch, 0.5)
    with SharedStudy(wanted, base).next_trial() as trial:
        assert trial is not None and trial.number == 1


def test_a_trial_that_is_behind_is_given_up(tmp_path: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = [{"optim.lr": rate} for rate in (4e-3, 5e-3, 1e-6)]
    path = written(
        tmp_path,
        recipe,
        budget={"trials": 3},
        settings={"trainer.epochs": 3},
        pruner={"name": "median", "startup_trials": 2, "warmup_epochs": 1},
        space={"optim.lr": LR | {"low": 1e-6}},
        initial_trials=first,
    )
    assert tune_here(monkeypatch, path) == 0
    found = results(path)
    assert [result.values for result in found] == first
    assert [result.state for result in found] == ["complete", "complete", "pruned"]
    assert all(result.seconds > 0 for result in found), "time spent on what was given up is time, too"
    assert 1 <= len(found[2].curve) < 3
    assert (found[2].mean, found[2].note) == (None, "pruned")
    assert not list((tmp_path / "study" / "trials").glob("*/*/checkpoints"))


def test_a_trial_that_diverges_is_given_up_and_the_search_continues(
    tmp_path: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"optim.name": "sgd_lookahead", "optim.weight_decay": 1.0}  # multiplies the weights by 1 - lr each step
    space, trials = {"optim.lr": LR | {"high": 1e3}}, [{"optim.lr": 1e3}, {"optim.lr": 3e-3}]
    path = written(tmp_path, recipe, settings=settings, space=space, initial_trials=trials)
    assert tune_here(monkeypatch, path) == 0
    diverged, fine = results(path)
    assert (diverged.state, fine.state) == ("pruned", "complete")
    assert "not finite" in diverged.note


def test_values_that_contradict_each_other_fail_alone(
    tmp_path: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = {name: {"type": "categorical", "choices": [0, 0.2]} for name in ("mixup.mixup_alpha", "mixup.cutmix_alpha")}
    both = {"mixup.mixup_alpha": 0, "mixup.cutmix_alpha": 0}
    path = written(tmp_path, recipe, settings={"mixup.prob": 0.5}, space=space, budget={"trials": 1})
    path.write_text(path.read_text() + yaml.safe_dump({"initial_trials": [both | {"mixup.mixup_alpha": 0.2}]}))
    wanted, base = search.load(path, [])
    study = SharedStudy(wanted, base)
    with study.next_trial() as trial:
        assert trial is not None
        trial.values = both
        from trainer.tune.trial import train_trial

        train_trial(study, trial, wanted, base, None, lambda: False)
    (found,) = study.results()
    assert found.state == "failed"
    assert "are both 0" in found.note


def test_a_trial_whose_model_is_refused_fails_alone(
    tmp_path: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = {"model.freeze": {"type": "categorical", "choices": [0, 1]}}
    path = written(tmp_path, recipe, space=space, initial_trials=[{"model.freeze": 1}, {"model.freeze": 0}])
    assert tune_here(monkeypatch, path) == 0
    refused, trained = results(path)
    assert (refused.state, trained.state) == ("failed", "complete") and "model.freeze" in refused.note
    path = written(tmp_path, recipe, settings={"model.init_checkpoint": "missing.pt"}, dir=str(tmp_path / "other"))
    with pytest.raises(NotFoundError, match=r"missing\.pt"):
        tune_here(monkeypatch, path)


def test_time_that_is_up_before_the_first_trial_is_no_error(
    tmp_path: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert tune_here(monkeypatch, written(tmp_path, recipe, budget={"minutes": 1e-9})) == 0
    assert "trials      none" in capsys.readouterr().out


def test_the_time_ends_a_search_and_the_trial_continues_later(
    tmp_path: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path, recipe, budget={"trials": 1}, settings={"trainer.epochs": 2})
    learn = engine.fit
    now = time.time()

    def slowly(*given: Any) -> None:
        monkeypatch.setattr(time, "time", lambda: now + 3600)
        learn(*given)

    monkeypatch.setattr("trainer.tune.trial.engine.fit", slowly)
    assert tune_here(monkeypatch, path, "budget.minutes=30") == 0
    (found,) = results(path)
    assert (found.state, len(found.curve)) == ("running", 1)
    assert not (RunDirectory(tmp_path / "study" / "trials" / "0000" / "seed-1")).summary_path.exists()


def test_importance_belongs_to_the_setting_that_matters(recipe: Path, tmp_path: Path) -> None:
    space = BY_OPTIMIZER | {"optim.weight_decay": {"type": "float", "low": 0.001, "high": 0.1, "log": True}}
    wanted, base = search.load(written(tmp_path, recipe, space=space), [])
    found = []
    for number in range(24):
        name = ("adamw", "lion", "sgd_lookahead")[number % 3]
        values = {"optim.name": name, "optim.weight_decay": 0.001 * 1.2**number}
        if name != "sgd_lookahead":
            values["optim.lr"] = 1e-3
        found.append(TrialResult(number, "complete", values, [0.9 if name == "lion" else 0.5], [], 1.0, ""))
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)  # as on the page
    shares = optuna.importance.get_param_importances(flat_study(found, wanted, base), evaluator=evaluator)
    assert shares.keys() == space.keys()
    assert sum(shares.values()) == pytest.approx(1)
    assert next(iter(shares)) == "optim.name"
    assert shares["optim.weight_decay"] < 0.2
    assert can_rank(flat_study(found, wanted, base))
    assert not can_rank(flat_study(found[:3], wanted, base))
    same = [TrialResult(number, "complete", found[number].values, [0.5], [], 1.0, "") for number in range(9)]
    assert not can_rank(flat_study(same, wanted, base))


@pytest.mark.parametrize("path", SEARCHES, ids=lambda path: path.stem)
def test_every_search_that_comes_with_inkstream_loads(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    wanted, base = search.load(path, [])
    assert wanted.dir == Path("runs/search") / path.stem
    given = yaml.safe_load(path.read_text())
    fields = search.SearchConfig.model_fields
    assert [name for name, value in given.items() if value == fields[name].get_default()] == []
    assert list(base.settings_without_effect()) == []


def test_the_emnist_search_is_the_published_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    wanted, base = search.load(ROOT / "configs" / "search" / "optimizers.yaml", [])
    assert (wanted.train_fraction, base.trainer.epochs, wanted.seeds_per_trial) == (0.2, 20, 10)
    assert wanted.space["optim.name"].choices == ["adam", "adamw", "lion", "sgd_lookahead"]
    assert base.data.val_fraction > 0


MISTAKES: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"budgte": {"trials": 1}}, ("unknown key budgte", "did you mean budget?")),
    ({"budget": {"trails": 1}}, ("unknown key budget.trails", "did you mean budget.trials?")),
    ({"trials": 3}, ("unknown key trials", "did you mean budget.trials?")),
    ({"minuets": 3}, ("unknown key minuets", "did you mean budget.minutes?")),
    ({"budget": {}}, ("budget", "trials, minutes or both")),
    ({"budget": {"trials": 0}}, ("budget.trials: 0", "greater than or equal to 1")),
    ({"train_fraction": 0}, ("train_fraction: 0", "greater than 0", "Fraction of the train split")),
    ({"seeds_per_trial": "many"}, ("seeds_per_trial: many", "valid integer")),
    ({"space": {}}, ("space", "at least 1")),
    ({"space": {"optim.learning_rate": LR}}, ("unknown setting optim.learning_rate", "did you mean optim.lr?")),
    ({"space": {"optim.lr": {"low": 1, "high": 2}}}, ("no space.optim.lr.type",)),
    ({"space": {"optim.lr": {"type": "float", "low": 1}}}, ("no space.optim.lr.high",)),
    ({"space": {"optim.lr": LR | {"hihg": 1}}}, ("unknown key space.optim.lr.hihg", "did you mean high?")),
    ({"space": {"optim.lr": LR | {"low": 1}}}, ("space.optim.lr", "low below high")),
    ({"space": {"optim.lr": LR | {"low": -1}}}, ("space.optim.lr", "low above 0 with log")),
    ({"space": {"optim.lr": {"type": "float", "low": -1, "high": 1}}}, ("optim.lr=-1", "greater than 0")),
    (
        {"space": {"optim.name": {"type": "categorical", "choices": ["adam", "adamxx"]}}},
        ("optim.name=adamxx", "'lion'"),
    ),
    ({"space": {"optim.name": {"type": "categorical", "choices": ["adam"]}}}, ("choices", "at least 2")),
    ({"space": {"optim.lr": BY_OPTIMIZER["optim.lr"]}}, ("conditional on optim.name", "categorical setting")),
    (
        {"space": BY_OPTIMIZER | {"optim.lr": BY_OPTIMIZER["optim.lr"] | {"cases": {"adamm": LR}}}},
        ("has a case adamm", "did you mean adamw?"),
    ),
    ({"space": {"seed": {"type": "int", "low": 0, "high": 9}}}, ("seed in the space", "raise seeds_per_trial")),
    (
        {"space": {"data.train_fraction": {"type": "float", "low": 0.1, "high": 1}}},
        ("data.train_fraction", "set train_fraction"),
    ),
    ({"space": {"data.val_fraction": {"type": "float", "low": 0.1, "high": 0.2}}}, ("data.val_fraction in the space",)),
    ({"space": {"data.fold": {"type": "categorical", "choices": ["1/2", "2/2"]}}}, ("data.fold in the space",)),
    ({"settings": {"run.dir": "x"}}, ("run.dir", "set dir")),
    ({"settings": {"trainer.epochs": 0}}, ("trainer.epochs=0", "greater than or equal to 1")),
    ({"initial_trials": [{"optim.lr": 1.0}]}, ("optim.lr=1.0", "outside of the space")),
    (
        {"space": {"loader.batch_size": {"type": "float", "low": 16, "high": 64}}},
        ("loader.batch_size of type float", "valid integer", "{type: int, low: 16, high: 64}"),
    ),
    (
        {"space": {"augment.rotation": {"type": "int", "low": 1, "high": 12, "step": 3}}},
        ("space.augment.rotation", "whole number of steps: 10, not 12"),
    ),
    (
        {"space": {"augment.rotation": {"type": "int", "low": 1, "high": 3, "step": 5}}},
        ("space.augment.rotation", "a step of at most high - low, not 5"),
    ),
    (
        {"space": {"augment.rotation": {"type": "float", "low": 1, "high": 3000001.5, "step": 1}}},
        ("space.augment.rotation", "3000001, not 3000001.5"),
    ),
    (
        {"space": {"optim.lr": {"type": "float", "low": 0.1, "high": 0.35, "step": 0.1}}},
        ("space.optim.lr", "whole number of steps: 0.3, not 0.35"),
    ),
    (
        {
            "space": {"optim.lr": {"type": "float", "low": 0.1, "high": 0.4, "step": 0.1}},
            "initial_trials": [{"optim.lr": 0.3}, {"optim.lr": 0.25}],
        },
        ("optim.lr=0.25", "entry 2", "outside of the space"),
    ),
    (
        {
            "space": {"augment.rotation": {"type": "int", "low": 0, "high": 9}},
            "initial_trials": [{"augment.rotation": 7.5}],
        },
        ("augment.rotation=7.5", "outside of the space"),
    ),
    ({"initial_trials": [{"optim.rl": 1e-3}]}, ("optim.rl", "did you mean optim.lr?")),
    ({"initial_trials": [{}]}, ("no optim.lr",)),
    ({"data": {"shards": "x"}}, ("unknown key data", "settings.data.shards=...")),
    (
        {"recipe": "none.yaml"},
        (
            "no recipe",
            "none.yaml",
        ),
    ),
]


def test_a_missing_search_file_gets_a_list_of_those_that_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        search.load(Path("none.yaml"), [])
    assert caught.value.hint == f"one of {', '.join(map(str, SEARCHES))}"


@pytest.mark.parametrize(("changes", "words"), MISTAKES, ids=lambda value: str(value)[:40])
def test_a_mistake_in_a_search_is_told(
    tmp_path: Path, recipe: Path, changes: dict[str, Any], words: tuple[str, ...]
) -> None:
    with pytest.raises(UserError) as caught:
        search.load(written(tmp_path, recipe, **changes), [])
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert not (tmp_path / "study").exists()


def test_a_mistake_ends_in_one_message(
    tmp_path: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as caught:
        run_command(lambda: tune_here(monkeypatch, written(tmp_path, recipe), "train_fractoin=1"))
    assert caught.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert re.fullmatch(
        r"error: unknown key train_fractoin in .*\nexpected: .*\nhint: did you mean train_fraction\?\n",
        said.err,
    )


def test_a_recipe_without_a_validation_part_is_refused(
    tmp_path: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path, recipe, settings={"data.val_fraction": 0})
    with pytest.raises(UserError) as caught:
        tune_here(monkeypatch, path)
    assert "data.val_fraction" in caught.value.hint
    assert not (tmp_path / "study").exists()


def test_a_set_that_is_packed_later_is_searched_by_the_same_command(
    tmp_path: Path, recipe: Path, digits_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = tmp_path / "packed"
    path = written(tmp_path, recipe, settings={"data.shards": str(packed)}, budget={"trials": 1})
    with pytest.raises(UserError, match="pack a data set first"):
        tune_here(monkeypatch, path)
    assert not (tmp_path / "study").exists()
    shutil.copytree(digits_set, packed)
    assert tune_here(monkeypatch, path) == 0
    assert [result.state for result in results(path)] == ["complete"]


def test_a_search_continues_after_a_damaged_shard_is_repaired(
    tmp_path: Path, recipe: Path, digits_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = tmp_path / "packed"
    shutil.copytree(digits_set, packed)
    shard = next(packed.glob("train/*.tar"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    path = written(tmp_path, recipe, settings={"data.shards": str(packed), "data.verify": True}, budget={"trials": 1})
    with pytest.raises(UserError, match=shard.name):
        tune_here(monkeypatch, path)
    shard.write_bytes(whole)
    assert tune_here(monkeypatch, path) == 0
    assert [result.state for result in results(path)] == ["complete"]


def test_without_optuna_the_extra_is_named(tmp_path: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    for name in ("study", "study_page", "trial", "workers"):
        monkeypatch.delitem(sys.modules, f"trainer.tune.{name}", raising=False)
        monkeypatch.delattr(f"trainer.tune.{name}", raising=False)
    with pytest.raises(UserError) as caught:
        tune_here(monkeypatch, written(tmp_path, recipe))
    assert ".[tune]" in caught.value.hint
    assert not (tmp_path / "study").exists()
