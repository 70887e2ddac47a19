"""A bar on a terminal, plain lines elsewhere; both say loss, rate, throughput, data wait and time left."""

from __future__ import annotations

import io
import re
import sys

import pytest

from trainer.runtime import progress
from trainer.runtime.progress import Progress, duration


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def show(monkeypatch: pytest.MonkeyPatch, first: int = 0) -> None:
    monkeypatch.setattr(progress, "_LINE_EVERY", 0)
    monkeypatch.setattr(progress, "_BAR_EVERY", 0)
    shown = Progress(epoch=1, epochs=3, steps=8, first_step=first, steps_ahead=8)
    shown._start -= 10.0
    shown.step(first + 2, 0.25, rate=1e-3, images=1280, wait=0.5)
    shown.close()


def test_plain_lines_elsewhere(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    show(monkeypatch)
    line = capsys.readouterr().out
    assert re.fullmatch(
        r"epoch 2/3  step 2/8  loss 0\.2500  lr 1\.00e-03  12[78] images/s  data wait 5\.0%  1:10 left\n", line
    ), line


def test_the_time_left_counts_from_where_a_resumed_epoch_began(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    show(monkeypatch, first=4)
    assert "step 6/8" in (line := capsys.readouterr().out)
    assert line.endswith("0:50 left\n"), "two steps took ten seconds, ten are left"


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "140")
    show(monkeypatch)
    bar = terminal.getvalue()
    assert "epoch 2/3" in bar
    assert "2/8, loss 0.2500  lr 1.00e-03" in bar
    assert "data wait 5.0%  1:10 left" in bar
    assert capsys.readouterr().out == ""


def test_durations() -> None:
    assert [duration(seconds) for seconds in (0.4, 62, 3723)] == ["0:00", "1:02", "1:02:03"]
