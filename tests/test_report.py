"""The page about a run: whole in itself, true to the figures, and shown by a real browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from trainer.charts import Line, confusion_chart, line_chart
from trainer.run import main as run_main


class Page(HTMLParser):
    """The tags of a page, the addresses it refers to and its text; complains about tags that do not close."""

    _VOID = frozenset({"meta", "img", "rect", "circle", "path", "br"})

    def __init__(self, source: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(source)
        assert self._open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href")]
        if tag == "img":
            assert dict(attributes).get("alt")
        if tag not in self._VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self._VOID:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, digits_set: Path) -> Path:
    """A run that learned a little, so that it still makes mistakes to show."""
    directory = tmp_path_factory.mktemp("report") / "run"
    recipe = directory.parent / "a <b> name.yaml"
    recipe.write_text(
        f"data: {{shards: '{digits_set}', resolution: 16}}\nmodel: {{name: three_block_cnn}}\n"
        "loader: {batch_size: 64}\noptim: {lr: 3.0e-4}\ntrainer: {epochs: 2, precision: fp32}\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["trainer.run", str(recipe), f"run.dir={directory}"])
        assert run_main() == 0
    return directory


def test_the_page_is_whole_in_itself_and_true(run: Path) -> None:
    page = Page((run / "report.html").read_text())
    assert page.addresses
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert "script" not in page.tags
    assert "link" not in page.tags
    summary = json.loads((run / "summary.json").read_text())
    assert f"{100 * summary['accuracy']:.2f} %" in page.text
    assert f"{100 * summary['macro_f1']:.2f} %" in page.text
    assert "a <b> name" in page.text, "names are escaped"


def test_the_most_confused_pair_is_shown_with_its_count(run: Path) -> None:
    predictions = np.load(run / "predictions.npz")
    wrong = predictions["labels"] != predictions["predicted"]
    pairs, counts = np.unique(
        np.stack([predictions["labels"][wrong], predictions["predicted"][wrong]]), axis=1, return_counts=True
    )
    text = re.sub(r"\s+", " ", Page((run / "report.html").read_text()).text)
    true, said = pairs[:, counts.argmax()]
    assert counts.max() > 1, "the run is to make mistakes"
    first = re.search(r"(\d) taken for (\d) (\d+) times", text)
    assert first is not None
    assert int(first[3]) == counts.max()
    assert f"{true} taken for {said} {counts.max()} times" in text


def test_a_browser_shows_it(run: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine")
    picture = run / "report.png"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    profile = f"--user-data-dir={run / 'profile'}"
    shot = f"--screenshot={picture}"
    subprocess.run(
        [browser, *options, profile, shot, "--window-size=1100,2400", (run / "report.html").as_uri()],
        check=True,
        capture_output=True,
        timeout=60,
    )
    from PIL import Image

    pixels = np.asarray(Image.open(picture).convert("RGB")).reshape(-1, 3)
    colours = np.unique(pixels // 16, axis=0)
    assert len(colours) > 50, "more than an empty page"


def test_line_chart_survives_one_epoch_and_equal_values() -> None:
    for values in ([0.5], [0.5, 0.5], [1e-9, 2e-9], [1e-12], [0.0, 1e-15], [float("nan"), 1.0]):
        chart = line_chart([Line("loss", values, "first")], "loss by epoch")
        assert "nan" not in chart
        Page(chart)


def test_confusion_chart_names_every_cell_that_is_not_empty() -> None:
    counts = np.array([[8, 2], [0, 5]])
    chart = confusion_chart(counts, ("<a>", "b"))
    assert chart.count("<title>") == 3
    assert "&lt;a&gt; taken for b: 2 of 10 (20.0%)" in chart
