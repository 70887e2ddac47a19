"""Ranks that are killed, stopped, cut off or of another number change nothing in what a run comes to."""

from __future__ import annotations

import functools
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import yaml
from conftest import ROOT, free_port
from support import warm_process
from support.run_outcome import assert_same_run, history, weights
from support.training_runs import QUICK

from trainer.runtime import signals

RECIPE = QUICK | {"checkpoint": {"every_steps": 4}}

# What torchrun starts in place of trainer.run: every step takes a little time and is noted with the rows of its share,
# in a file named after rank and process; every file takes a little time to reach the disk.
NOTING = """
import json, os, time
import trainer.loop.engine as engine
step, fsync = engine.train_step, os.fsync
note = open(os.path.join(os.environ["NOTES"], f"{time.time_ns()}-{os.environ.get('RANK', '0')}-{os.getpid()}"), "a")
def slow_step(training, batch, *arguments):
    time.sleep(0.05)
    loss = step(training, batch, *arguments)
    print(json.dumps([training.state.epoch, batch.step, batch.source_index.tolist()]), file=note, flush=True)
    return loss
def slow_fsync(file):
    time.sleep(0.1)
    fsync(file)
engine.train_step, os.fsync = slow_step, slow_fsync
if "SPOIL" in os.environ:  # let batches that hold a row be infinite on the rank that has it
    from dataclasses import replace
    import torch
    from pipeline.loader import Loader
    batches = Loader.batches
    def spoiled(loader, *place):
        for batch in batches(loader, *place):
            here = (batch.source_index == int(os.environ["SPOIL"])) & hasattr(loader.sampler, "seed")
            yield replace(batch, images=torch.where(here[:, None, None, None], float("inf"), batch.images))
    Loader.batches = spoiled
from shards.cli import run_command
from trainer.run import main
run_command(main)
"""


class Job:
    """A run under torchrun, with what its ranks note."""

    def __init__(self, place: Path, command: list[str], **environment: str) -> None:
        self.place = place
        self.notes = place / "notes"
        self.notes.mkdir(parents=True)
        self.output = place / "output.txt"
        (place / "noting.py").write_text(NOTING)
        environment |= {"NOTES": str(self.notes), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with open(self.output, "w") as output:
            self.process = warm_process.Popen(
                command,
                cwd=place,
                env=os.environ | environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def ranks(self) -> dict[int, int]:
        """The process of each rank, of the latest start."""
        latest = {}
        for path in sorted(self.notes.iterdir()):
            _, rank, process = map(int, path.name.split("-"))
            latest[rank] = process
        return latest

    def steps(self) -> list[list]:
        """[epoch, step, rows] of every rank's every step, rank by rank."""
        paths = sorted(self.notes.iterdir(), key=lambda path: int(path.name.split("-")[1]))
        # A rank that was killed may have left half a line.
        lines = [line for path in paths for line in path.read_text().splitlines(keepends=True)]
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def wait_for(self, what: Callable[[], bool]) -> bool:
        """Wait until something is the case; False if the job ended before."""
        while not what():
            if self.process.poll() is not None:
                return False
            time.sleep(0.01)
        return True

    def kill(self, rank: int) -> None:
        with suppress(ProcessLookupError):  # it may have just ended
            os.kill(self.ranks()[rank], signal.SIGKILL)

    def end(self) -> str:
        self.process.wait()
        return self.output.read_text()


@contextmanager
def job(
    place: Path, recipe: Path, *overrides: str, ranks: int = 2, restarts: int = 0, **environment: str
) -> Iterator[Job]:
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
    launcher += [f"--master_port={free_port()}", f"--max-restarts={restarts}", "--monitor-interval=0.1"]
    started = Job(place, [*launcher, "noting.py", str(recipe), *overrides], **environment)
    try:
        yield started
    finally:
        if started.process.poll() is None:
            os.killpg(started.process.pid, signal.SIGTERM)
            started.process.wait()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, synthetic_set: Path) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "quick.yaml"
    path.write_text(yaml.safe_dump(RECIPE | {"data": QUICK["data"] | {"shards": str(synthetic_set)}}))
    return path


@pytest.fixture(scope="module")
def train_whole(tmp_path_factory: pytest.TempPathFactory, recipe: Path) -> Callable[[int], Path]:
    """Returns the run directory of a number of ranks that nothing happened to."""

    @functools.cache
    def train(ranks: int) -> Path:
        place = tmp_path_factory.mktemp("whole")
        with job(place, recipe, f"run.dir={place / 'run'}", ranks=ranks) as running:
            output = running.end()
        assert running.process.returncode == 0, output
        return place / "run"

    return train


@pytest.fixture(scope="module")
def whole(train_whole: Callable[[int], Path]) -> Path:
    """The run directory of two ranks that nothing happened to."""
    return train_whole(2)


@pytest.mark.slow
def test_stopped_by_sigterm_and_resumed_is_bit_identical(whole: Path, recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with job(tmp_path / "first", recipe, f"run.dir={run}") as running:
        assert running.wait_for(lambda: any(epoch == 1 and step > 5 for epoch, step, _ in running.steps()))
        running.process.send_signal(signal.SIGTERM)
        output = running.end()
    assert running.process.returncode != 0
    assert "stopped in epoch 2 after step" in output and "resume with: resume=auto" in output
    with job(tmp_path / "second", recipe, f"run.dir={run}", "resume=auto") as running:
        output = running.end()
    assert running.process.returncode == 0, output
    assert_same_run(whole, run)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["torchrun", "rank 1"])
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGKILL])
def test_a_signal_to_torchrun_or_a_rank_ends_all_with_one_checkpoint(
    whole: Path, recipe: Path, tmp_path: Path, number: signal.Signals, target: str
) -> None:
    """SIGUSR1 and SIGKILL end torchrun at once; its ranks follow it."""
    run = tmp_path / "run"
    with job(tmp_path / "first", recipe, f"run.dir={run}") as running:
        assert running.wait_for(lambda: any(epoch == 1 and step > 5 for epoch, step, _ in running.steps()))
        ranks = running.ranks()
        os.kill(ranks[1] if target == "rank 1" else running.process.pid, number)
        running.end()
    assert running.process.returncode != 0
    deadline = time.monotonic() + 30
    while any(psutil.pid_exists(rank) for rank in ranks.values()):
        assert time.monotonic() < deadline, "a rank is left behind"
        time.sleep(0.05)
    with job(tmp_path / "second", recipe, f"run.dir={run}", "resume=auto") as running:
        output = running.end()
    assert running.process.returncode == 0, output
    assert_same_run(whole, run)


@pytest.mark.parametrize("python", ["warm", pytest.param("fresh", marks=pytest.mark.slow)])
def test_a_killed_rank_is_started_again_and_continues_in_its_run_directory(
    whole: Path, recipe: Path, tmp_path: Path, python: str
) -> None:
    """Killed while it writes a checkpoint; the settings say resume=never and name no directory.

    The killed rank is a fresh interpreter, or forked as the others are, and so is the one that replaces it.
    """
    of_rank_0 = sys.executable if python == "fresh" else warm_process.executable()
    program = tmp_path / "python"
    program.write_text(f'#!/bin/sh\n[ "$RANK" = 0 ] && exec {of_rank_0} "$@"\nexec {warm_process.executable()} "$@"\n')
    program.chmod(0o755)
    with job(tmp_path / "job", recipe, restarts=1, PYTHON_EXEC=str(program)) as running:

        def is_writing() -> bool:
            late = any(epoch == 1 and step > 8 for epoch, step, _ in running.steps())
            return late and any((tmp_path / "job" / "runs").glob("quick/*/checkpoints/.*.partial"))

        assert running.wait_for(is_writing)
        running.kill(0)
        output = running.end()
    assert running.process.returncode == 0, output
    assert "resuming from epoch 2 after step" in output
    (run,) = (tmp_path / "job" / "runs" / "quick").iterdir()
    assert_same_run(whole, run)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("seed", range(8))
def test_ranks_killed_at_many_random_moments_change_nothing(
    train_whole: Callable[[int], Path], recipe: Path, tmp_path: Path, seed: int, ranks: int
) -> None:
    """Of each start, a random rank after a random number of steps, and a little later: also while starting, validating
    and writing. Up to 160 kills in all."""
    random, kills = np.random.default_rng(seed), 0
    with job(tmp_path / "job", recipe, "checkpoint.every_steps=2", ranks=ranks, restarts=10) as running:
        for start in range(10):
            if not running.wait_for(lambda start=start: len(list(running.notes.iterdir())) == ranks * (start + 1)):
                break
            enough = len(running.steps()) + int(random.integers(0, 10 * ranks))
            if not running.wait_for(lambda enough=enough: len(running.steps()) >= enough):
                break
            time.sleep(random.random() * 0.3)
            running.kill(int(random.integers(0, ranks)))
            kills += 1
        output = running.end()
    assert running.process.returncode == 0, output
    assert kills > 4
    (run,) = (tmp_path / "job" / "runs" / "quick").iterdir()
    assert_same_run(train_whole(ranks), run)


def without_batch_norm(recipe: Path, place: Path) -> Path:
    """A recipe whose arithmetic does not depend on how a batch is shared out, but for rounding."""
    content = yaml.safe_load(recipe.read_text())
    content["model"] = {"name": "test_convnext", "drop_rate": 0.0}
    content["mixup"] = {"prob": 0.0}
    content["optim"] = {"name": "sgd_lookahead", "lr": 0.05, "grad_accumulation": 2, "max_grad_norm": 1.0}
    content["data"]["resolution"] = 32
    path = place / "elastic.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [(1, 2), (2, 1), (2, 3, 1)])
def test_another_number_of_ranks_continues_with_the_same_rows(
    recipe: Path, tmp_path: Path, ranks: tuple[int, ...]
) -> None:
    elastic, run = without_batch_norm(recipe, tmp_path), tmp_path / "run"
    with job(tmp_path / "whole", elastic, f"run.dir={tmp_path / 'expected'}", ranks=1) as running:
        output = running.end()
    assert running.process.returncode == 0, output
    expected = {(epoch, step): rows for epoch, step, rows in running.steps()}
    found: dict[tuple[int, int], list[int]] = {}
    for number, count in enumerate(ranks):
        with job(tmp_path / str(number), elastic, f"run.dir={run}", "resume=auto", ranks=count) as running:
            if number < len(ranks) - 1:
                place = [number, 9]
                assert running.wait_for(lambda place=place, job=running: any(step[:2] > place for step in job.steps()))
                running.process.send_signal(signal.SIGTERM)
            output = running.end()
        shares: dict[tuple[int, int], list[int]] = {}
        for epoch, step, rows in running.steps():
            shares.setdefault((epoch, step), []).extend(rows)
        assert shares == {place: expected[place] for place in shares}
        assert not shares.keys() & found.keys(), "no step is taken twice"
        found |= shares
    assert running.process.returncode == 0, output
    assert found.keys() == expected.keys()
    for name, tensor in weights(tmp_path / "expected").items():
        torch.testing.assert_close(weights(run)[name], tensor, rtol=1e-4, atol=1e-5)
    for one, other in zip(history(tmp_path / "expected"), history(run), strict=True):
        assert other["train_loss"] == pytest.approx(one["train_loss"], rel=1e-5)


@pytest.mark.slow
def test_a_batch_that_is_not_finite_on_one_rank_is_found_by_all(recipe: Path, tmp_path: Path) -> None:
    with job(tmp_path / "seen", recipe, "trainer.epochs=1", f"run.dir={tmp_path / 'first'}") as running:
        running.end()
    rows = [row for _, step, share in running.steps() if step == 7 for row in share]
    row = str(rows[-1])  # of the share of the last rank
    run = tmp_path / "run"
    with job(tmp_path / "job", recipe, f"run.dir={run}", SPOIL=row) as running:
        output = running.end()
    assert running.process.returncode != 0
    assert output.count("error: a loss that is not finite in epoch 1 step 8") == 1, output
    state = torch.load(run / "nonfinite" / "epoch-1-step-8.pt", weights_only=True)
    assert [row for share in state["shares"] for row in share["rows"].tolist()] == rows


def test_a_second_sigterm_changes_nothing_and_a_second_sigint_ends_at_once() -> None:
    with signals.record_signals(grace=60) as received:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert received == [signal.SIGTERM] * 2
    with pytest.raises(KeyboardInterrupt), signals.record_signals(grace=60):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_break_of_windows_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "SIGBREAK", 21, raising=False)
    assert 21 in runpy.run_path(signals.__file__)["_SIGNALS"]


def test_what_does_not_end_after_a_signal_is_ended() -> None:
    """The main thread waits in a library, where no handler of Python's runs."""
    waiting = (
        "import ctypes, sys\n"
        "from trainer.runtime.signals import record_signals\n"
        "with record_signals(grace=0.5):\n"
        "    print('here', flush=True)\n"
        "    libc = ctypes.CDLL(None)\n"
        "    while libc.sleep(100) > 0: pass\n"
    )
    process = warm_process.Popen(
        [sys.executable, "-c", waiting], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGTERM
    assert "checkpoint.grace_seconds" in errors
