"""Which directory a run gets, and what its files hold."""

from __future__ import annotations

import itertools
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from shards import UserError
from trainer.checkpoint import io as checkpoint
from trainer.checkpoint.run_dir import RunDirectory, choose_run_dir
from trainer.checkpoint.run_files import read_predictions
from trainer.config.load import load
from trainer.config.schema import Config


def config_of(*overrides: str) -> Config:
    return load(ROOT / "configs" / "quickstart.yaml", list(overrides))


def begun(path: Path, *files: str) -> Path:
    """The directory of a run, with these files beside its settings."""
    for name in ("config.yaml", *files):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).touch()
    return path


@pytest.mark.parametrize("last", [f"checkpoints/{checkpoint.LAST}", f"checkpoints/{checkpoint.PREVIOUS}"])
def test_a_run_in_run_dir_is_resumed_if_it_is_to_be(tmp_path: Path, last: str) -> None:
    run = begun(tmp_path / "run", last)
    directory, resumes = choose_run_dir(config_of(f"run.dir={run}", "resume=auto"))
    assert (directory.path, resumes) == (run, True)
    with pytest.raises(UserError, match="which holds a run") as caught:
        choose_run_dir(config_of(f"run.dir={run}"))
    assert str(run) in caught.value.found and "resume=auto" in caught.value.hint


def test_a_run_without_a_checkpoint_begins_again(tmp_path: Path) -> None:
    run = begun(tmp_path / "run", "env.json")
    directory, resumes = choose_run_dir(config_of(f"run.dir={run}", "resume=auto"))
    assert (directory.path, resumes) == (run, False)


def test_weights_without_a_checkpoint_to_resume_are_not_replaced(tmp_path: Path) -> None:
    """The directory of an ensemble or of a run that was pulled."""
    run = begun(tmp_path / "run", f"checkpoints/{checkpoint.BEST}")
    for earlier in (None, run):
        with pytest.raises(UserError, match="no checkpoint to resume") as caught:
            choose_run_dir(config_of(f"run.dir={run}", "resume=auto"), earlier)
    assert f"model.init_checkpoint={run}/checkpoints/best.pt" in caught.value.hint
    assert "resume=auto" not in RunDirectory(run).hint
    begun(run, f"checkpoints/{checkpoint.LAST}")
    assert "resume=auto" in RunDirectory(run).hint


def test_a_restarted_process_keeps_its_directory(tmp_path: Path) -> None:
    """Whatever the settings say, and even before it has written its settings."""
    run = tmp_path / "earlier"
    (run / "checkpoints").mkdir(parents=True)
    for overrides in ([], [f"run.dir={tmp_path / 'other'}"], ["resume=auto"]):
        directory, resumes = choose_run_dir(config_of(*overrides), run)
        assert (directory.path, resumes) == (run, False)
    begun(run, f"checkpoints/{checkpoint.LAST}")
    directory, resumes = choose_run_dir(config_of(), run)
    assert (directory.path, resumes) == (run, True)


def test_a_new_directory_is_free_of_files(tmp_path: Path) -> None:
    new = tmp_path / "new"
    for _ in range(2):
        directory, resumes = choose_run_dir(config_of(f"run.dir={new}"))
        assert (directory.path, resumes) == (new, False)
        with directory.lock():
            assert (new / "checkpoints" / ".lock").exists()
            choose_run_dir(config_of(f"run.dir={new}"))  # the lock alone is no run
    (new / "checkpoints" / "notes.txt").touch()
    with pytest.raises(UserError, match="is no run") as caught:
        choose_run_dir(config_of(f"run.dir={new}"))
    assert caught.value.hint == "choose another run.dir"


def test_a_checkpoint_without_settings_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "x" / "checkpoints").mkdir(parents=True)
    (tmp_path / "x" / "checkpoints" / checkpoint.LAST).touch()
    for resume in ("never", "auto"):
        with pytest.raises(UserError, match="is no run"):
            choose_run_dir(config_of(f"run.dir={tmp_path / 'x'}", f"resume={resume}"))


def test_a_file_is_no_run_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is no run"):
        choose_run_dir(config_of(f"run.dir={tmp_path / 'file'}"))


def test_without_run_dir_the_newest_run_that_can_be_resumed_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runs = Path("runs") / "mine"
    last = f"checkpoints/{checkpoint.LAST}"
    begun(runs / "2026-01-01_00-00-00", last)
    wanted = begun(runs / "2026-01-02_00-00-00", last)
    begun(runs / "2026-01-03_00-00-00", last, "summary.json")  # complete
    begun(runs / "2026-01-04_00-00-00")  # died before its first checkpoint
    begun(Path("runs") / "other" / "2026-01-05_00-00-00", last)
    directory, resumes = choose_run_dir(config_of("run.name=mine", "resume=auto"))
    assert (directory.path, resumes) == (wanted, True)
    fresh, resumes = choose_run_dir(config_of("run.name=mine"))
    assert fresh.path.parent == runs and not any(fresh.path.iterdir()) and not resumes
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", fresh.path.name)
    none, resumes = choose_run_dir(config_of("run.name=unknown", "resume=auto"))
    assert none.path.parent == Path("runs") / "unknown" and not resumes


def test_runs_of_one_second_have_different_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = []
    for _ in range(4):
        directory, _ = choose_run_dir(config_of("run.name=mine"))
        names.append(directory.path.name)
    for _, same in itertools.groupby(names, key=lambda name: name[:19]):
        stamp, *later = same
        assert later == [f"{stamp}_{number}" for number in range(2, 2 + len(later))]


def test_files_of_a_run_are_read_as_they_were_written(tmp_path: Path) -> None:
    config, history = config_of("optim.lr=0.5"), [{"epoch": 1, "lr": 0.5}, {"epoch": 2, "lr": 0.25}]
    directory = RunDirectory(tmp_path)
    directory.begin(config, {"torch": "2.6"}, history)
    assert load(tmp_path / "config.yaml", []) == config
    assert (tmp_path / "env.json").read_text() == '{\n "torch": "2.6"\n}\n'
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == history
    directory.write_history(history[:1])
    assert (tmp_path / "metrics.jsonl").read_text() == json.dumps(history[0]) + "\n"
    directory.write_summary({"accuracy": 0.5})
    assert (tmp_path / "summary.json").read_text() == '{\n "accuracy": 0.5\n}\n'
    with pytest.raises(
        UserError, match=r"summary\.json, which cannot be read: balanced_accuracy: Field required"
    ) as caught:
        directory.read_summary()
    assert caught.value.hint.startswith(f"rm -rf {directory.summary_path}; python -m trainer.run {directory.config}")
    assert sorted(os.listdir(tmp_path)) == ["config.yaml", "env.json", "metrics.jsonl", "summary.json"]


def test_one_process_trains_in_a_directory(tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "run").lock():
        second = RunDirectory(tmp_path / "run").lock()
        with pytest.raises(UserError, match="another process that trains"):
            second.__enter__()
    with RunDirectory(tmp_path / "run").lock():
        pass


def test_damaged_settings_name_a_recipe_to_compare_with(tmp_path: Path) -> None:
    run = begun(tmp_path)
    (run / "config.yaml").write_text("data: [\n")
    with pytest.raises(UserError, match="which is not YAML") as caught:
        RunDirectory(run).read_settings()
    assert caught.value.hint == f"compare it with {ROOT / 'configs' / 'quickstart.yaml'}"


def test_predictions_of_many_classes_and_few_images_can_be_read(tmp_path: Path) -> None:
    path, zeros = tmp_path / "predictions.npz", np.zeros(10, np.float32)
    labels = {"labels": np.zeros(10, np.int64), "predicted": np.zeros(10, np.int64)}
    columns = {"rows": np.arange(10), **labels, "confidence": zeros, "uncalibrated": zeros}
    matrix = np.eye(256, dtype=np.int64)
    np.savez_compressed(path, **columns, validation_confusion=matrix)
    assert np.array_equal(read_predictions(path, 256, "hint")["validation_confusion"], matrix)
    np.savez_compressed(path, **columns, validation_confusion=np.zeros((1000, 1000), np.int64))
    with pytest.raises(UserError, match="bytes in an archive"):
        read_predictions(path, 256, "hint")
