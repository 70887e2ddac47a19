"""The page about a run: whole in itself, true to the figures, and shown by a real browser."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from conftest import pack_splits, synthetic_splits
from PIL import Image

from shards import UserError, open_split
from trainer.checkpoint.completed_run import CompletedRun
from trainer.checkpoint.run_dir import RunDirectory
from trainer.checkpoint.trained_model import load_trained_model
from trainer.evaluate.calibration import calibration_error, reliability
from trainer.report import error_gallery, run_page
from trainer.report.__main__ import main as report_main
from trainer.report.compare_page import render_page
from trainer.report.learning_curves import learning_curves
from trainer.report.svg import Bins, Line, confusion_chart, distribution_chart, line_chart, reliability_chart
from trainer.run import main as run_main

if TYPE_CHECKING:
    from playwright.sync_api import Browser
    from playwright.sync_api import Page as BrowserPage


class Page(HTMLParser):
    """The tags of a page, the addresses it refers to and its text; complains about tags that do not close."""

    _VOID = frozenset({"meta", "img", "rect", "circle", "path", "br"})

    def __init__(self, source: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.of_scripts: set[str] = set()
        self.text = ""
        self._open: list[str] = []
        self.feed(source)
        assert self._open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        given = [value or "" for name, value in attributes if name in ("src", "href")]
        self.addresses += [value for value in given if not value.startswith("#")]
        if tag == "script":
            self.of_scripts |= {name for name, _ in attributes}
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
        "run: {baselines: {'an <early> network': 0.985, nearest neighbor: 0.5}}\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["trainer.run", str(recipe), f"run.dir={directory}"])
        assert run_main() == 0
    return directory


def test_the_page_is_whole_in_itself_and_true(run: Path) -> None:
    page = Page((run / "report.html").read_text())
    assert page.addresses
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert not {"src", "href"} & page.of_scripts
    assert "link" not in page.tags
    summary = json.loads((run / "summary.json").read_text())
    assert f"{summary['accuracy']:.2%}" in page.text
    assert f"{summary['macro_f1']:.2%}" in page.text
    assert "a <b> name" in page.text, "names are escaped"
    assert "Published test accuracy: an <early> network 98.50%, nearest neighbor 50.00%." in page.text
    manifest = open_split(load_trained_model(run).config.data.shards, "train").manifest
    counts = summary["class_counts"]
    assert sum(counts) < sum(manifest.counts) and "the validation split included" not in page.text
    assert f"The most frequent class has {max(counts):,}, {max(counts) / min(counts):.1f} times as many" in page.text


def test_the_confusion_matrix_of_the_validation_split_is_shown(run: Path) -> None:
    """Its diagonal and sum are the accuracy and the samples of the validation split; cells name their counts."""
    validation = json.loads((run / "summary.json").read_text())["decision"]["validation"]
    matrix = np.load(run / "predictions.npz")["validation_confusion"]
    assert (matrix.sum(), np.trace(matrix)) == (validation["samples"], round(validation["accuracy"] * matrix.sum()))
    source = (run / "report.html").read_text()
    shown = source.partition("Confusion matrix of the validation split")[2].partition("</figure>")[0]
    cells = re.findall(r"<title>(\d) → (\d): (\d+) of (\d+)", shown)
    expected = [(t, p, matrix[t, p], matrix[t].sum()) for t, p in np.argwhere(matrix)]
    assert sorted(tuple(map(int, cell)) for cell in cells) == sorted(tuple(map(int, cell)) for cell in expected)


def test_accuracy_and_macro_f1_are_drawn_by_tau(run: Path) -> None:
    curve = json.loads((run / "summary.json").read_text())["decision"]["curve"]
    assert len(curve) > 10
    points = re.findall(r"<title>(accuracy|macro F1), τ (-?[\d.]+): ([\d.]+%)", (run / "report.html").read_text())
    keys = {"accuracy": "accuracy", "macro F1": "macro_f1"}
    assert points == [(name, str(each["tau"]), f"{each[key]:.2%}") for name, key in keys.items() for each in curve]


def test_the_most_confused_pair_is_shown_with_its_count(run: Path) -> None:
    predictions = np.load(run / "predictions.npz")
    wrong = predictions["labels"] != predictions["predicted"]
    pairs, counts = np.unique(
        np.stack([predictions["labels"][wrong], predictions["predicted"][wrong]]), axis=1, return_counts=True
    )
    text = re.sub(r"\s+", " ", Page((run / "report.html").read_text()).text)
    true, predicted = pairs[:, counts.argmax()]
    assert counts.max() > 1, "the run is to make mistakes"
    first = re.search(r"(\d) → (\d) (\d+) images", text)
    assert first is not None
    assert int(first[3]) == counts.max()
    assert f"{true} → {predicted} {counts.max()} images" in text


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    sync_api = pytest.importorskip("playwright.sync_api")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium on this machine")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield opened
        opened.close()


def show(browser: Browser, page: Path, **options: Any) -> tuple[BrowserPage, list[str]]:
    """A page in a browser, and a list of what it complains of or asks for from elsewhere, which goes on growing."""
    shown = browser.new_page(**options)
    faults: list[str] = []
    shown.on("console", lambda message: faults.append(message.text))
    shown.on("pageerror", lambda error: faults.append(str(error)))
    shown.on("request", lambda request: faults.append(request.url) if request.url.startswith("http") else None)
    shown.goto(page.as_uri())
    return shown, faults


def test_the_gallery_shows_the_pictures_of_a_choice(run: Path, browser: Browser) -> None:
    predictions = np.load(run / "predictions.npz")
    labels, predicted = predictions["labels"], predictions["predicted"]
    shown, faults = show(browser, run / "report.html")
    truth, prediction = shown.locator("#gallery select").all()
    status = shown.locator("#gallery output")
    wrong, counts = np.unique((labels * 10 + predicted)[labels != predicted], return_counts=True)
    assert status.inner_text().startswith(f"{counts.max()} error"), "the most confused pair comes first"

    pair = wrong[counts.argmin()]
    truth.select_option(str(pair // 10))
    prediction.select_option(str(pair % 10))
    pictures = shown.locator("#gallery li img")
    assert pictures.count() == counts.min()
    rows = predictions["rows"][(labels == pair // 10) & (predicted == pair % 10)]
    found = {pictures.nth(number).get_attribute("alt") for number in range(pictures.count())}
    assert found == {f"{pair // 10} → {pair % 10}, row {row}" for row in rows}
    assert shown.locator("rect.chosen").get_attribute("data-predicted") == str(pair % 10)
    assert all(shown.evaluate("[...document.images].map((image) => image.complete && image.naturalWidth > 0)"))

    prediction.select_option("")
    assert status.inner_text().startswith(f"{((labels == pair // 10) & (predicted != labels)).sum()} error")
    shown.locator("#matrix rect.hit").first.click()
    assert "correct" in status.inner_text()
    shown.get_by_role("button", name="F1").click()
    values = shown.locator("table.sortable tbody td:nth-child(6)").all_inner_texts()
    assert values == sorted(values, key=lambda text: -float(text.removesuffix("%")))
    assert faults == []


def test_the_page_is_whole_without_scripts(run: Path, browser: Browser) -> None:
    shown, _ = show(browser, run / "report.html", java_script_enabled=False)
    assert not shown.locator("#gallery").is_visible()
    assert shown.locator(".pair img").first.is_visible()
    assert shown.locator("#matrix svg").is_visible()


def test_the_page_fits_and_can_be_read(run: Path, browser: Browser) -> None:
    for width, scheme in ((380, "light"), (1100, "dark")):
        shown, _ = show(browser, run / "report.html", viewport={"width": width, "height": 800}, color_scheme=scheme)
        assert shown.evaluate("document.documentElement.scrollWidth") == width
        widths = shown.evaluate("[...document.querySelectorAll('figure.chart')].map((each) => each.clientWidth)")
        assert len(widths) > 7 and max(widths) < 500, "the texts of all charts have about the same size"
        for place in (".muted", ".tick", "th", "a"):
            assert contrast(shown, place) >= 4.5, (scheme, place)
        picture = Image.open(io.BytesIO(shown.screenshot())).convert("P")
        assert len(picture.getcolors()) > 20, "more than an empty page"
        shown.emulate_media(media="print")
        assert contrast(shown, ".muted") >= 4.5
        assert shown.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--paper')") == "#fafaf9"
        shown.close()


def contrast(shown: BrowserPage, place: str) -> float:
    """Of a text to the card that it stands on. WCAG 2.2, section 1.4.3: (L1 + 0.05) / (L2 + 0.05)."""
    colours = shown.evaluate(
        """(place) => {
          const style = getComputedStyle(document.querySelector(place));
          const card = getComputedStyle(document.querySelector("figure")).backgroundColor;
          return [document.querySelector(place).closest("svg") ? style.fill : style.color, card];
        }""",
        place,
    )
    high, low = sorted(map(luminance, colours), reverse=True)
    return (high + 0.05) / (low + 0.05)


def luminance(colour: str) -> float:
    """Of a colour rgb(r, g, b)."""
    shares = np.array([int(number) for number in re.findall(r"\d+", colour)[:3]]) / 255
    linear = np.where(shares <= 0.04045, shares / 12.92, ((shares + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def test_it_is_written_again_as_it_was(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (run / "report.html").read_bytes()
    (run / "report.html").unlink()
    monkeypatch.setattr(sys, "argv", ["trainer.report", str(run)])
    assert report_main() == 0
    assert (run / "report.html").read_bytes() == before


def test_runs_are_compared(
    run: Path, tmp_path: Path, digits_set: Path, monkeypatch: pytest.MonkeyPatch, browser: Browser
) -> None:
    other = tmp_path / "other"
    recipe = run.parent / "a <b> name.yaml"
    monkeypatch.setattr(sys, "argv", ["trainer.run", str(recipe), f"run.dir={other}", "optim.lr=0.002"])
    assert run_main() == 0
    out = tmp_path / "compared.html"
    monkeypatch.setattr(sys, "argv", ["trainer.report", str(run), str(other), "--out", str(out)])
    assert report_main() == 0
    shown, faults = show(browser, out)
    settings = shown.locator("#settings ~ div table").first
    assert settings.locator("tbody tr").all_inner_texts() == ["optim.lr\t0.0003\t0.002"]
    figures = shown.locator("#metrics ~ div tbody tr").all_inner_texts()
    first, second = (np.load(each / "predictions.npz") for each in (run, other))
    only_other = ((first["labels"] != first["predicted"]) & (second["labels"] == second["predicted"])).sum()
    assert [row for row in figures if "only this run" in row and row.endswith(f"\t{only_other}")]
    assert shown.locator("#curves ~ .charts figure").first.locator("path.line").count() == 2
    assert faults == []
    Page(out.read_text())


def test_runs_without_validation_and_of_other_classes_have_pages_too(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = pack_splits(synthetic_splits(120, 30, 3, (16, 20, 3), transposed=False), tmp_path / "set")
    other = tmp_path / "other"
    recipe = tmp_path / "colour.yaml"
    recipe.write_text(
        f"data: {{shards: '{shards}', resolution: 12, val_fraction: 0}}\nmodel: {{name: three_block_cnn}}\n"
        "loader: {batch_size: 32}\noptim: {lr: 1.0e-5}\ntrainer: {epochs: 1, precision: fp32}\n"
    )
    monkeypatch.setattr(sys, "argv", ["trainer.run", str(recipe), f"run.dir={other}"])
    assert run_main() == 0
    page = Page((other / "report.html").read_text())
    assert "Validation accuracy" not in page.text
    compared = Page(render_page([CompletedRun.open(run), CompletedRun.open(other)]))
    assert "The data sets differ" in compared.text
    assert "The runs have different classes" in compared.text
    assert "only this run classifies" not in compared.text


def test_what_cannot_be_compared_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="named twice"):
        render_page([CompletedRun.open(run), CompletedRun.open(run)])
    with pytest.raises(UserError, match="9 runs"):
        render_page([CompletedRun.open(run)] * 9)


def test_pictures_stay_within_their_bound(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_split(load_trained_model(run).config.data.shards, "test")
    predictions = dict(np.load(run / "predictions.npz"))
    full = error_gallery.build_gallery(store, predictions)
    assert full["shown"] == full["errors"] == (predictions["labels"] != predictions["predicted"]).sum()
    monkeypatch.setattr(error_gallery, "_MAX_BYTES", 4000)
    small = error_gallery.build_gallery(store, predictions)
    pictures = [picture for cell in small["cells"] for picture in cell["pictures"]]
    assert 0 < sum(len(address) for address, _, _ in pictures) <= 4000
    most = max((cell for cell in small["cells"] if cell["true"] != cell["predicted"]), key=lambda cell: cell["count"])
    assert most["pictures"], "the most frequent error has a picture before others have two"
    assert max(len(cell["pictures"]) for cell in small["cells"]) <= 2 or small["shown"] == full["shown"]


def test_the_gallery_holds_the_pairs_that_occur_among_many_classes(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An array by pair of classes would have 10^12 entries."""
    store = open_split(load_trained_model(run).config.data.shards, "test")
    rows = np.arange(4)
    manifest = store.manifest.model_copy(update={"classes": tuple(map(str, range(1_000_000)))})
    predictions = {
        "rows": store.rows[rows],
        "labels": np.array([5, 999_999, 999_999, 7]),
        "predicted": np.array([5, 3, 3, 999_998]),
        "confidence": np.array([0.9, 0.5, 0.6, 0.7], np.float32),
    }
    monkeypatch.setattr(store, "manifest", manifest)
    found = error_gallery.build_gallery(store, predictions)
    cells = {(cell["true"], cell["predicted"]): (cell["count"], len(cell["pictures"])) for cell in found["cells"]}
    assert cells == {(5, 5): (1, 1), (7, 999_998): (1, 1), (999_999, 3): (2, 2)}
    assert (found["errors"], found["shown"]) == (3, 3)


def test_a_report_on_many_classes_has_no_matrix_and_the_worst_classes(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (run / "report.html").read_text()
    monkeypatch.setattr(run_page, "MAX_MATRIX_CLASSES", 4)
    monkeypatch.setattr(run_page, "MAX_CLASS_ROWS", 2)
    directory, store = RunDirectory(run), open_split(load_trained_model(run).config.data.shards, "test")
    train = open_split(load_trained_model(run).config.data.shards, "train").manifest
    history = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    run_page.write(run, train, store, directory.read_summary(), history)
    page = (run / "report.html").read_text()
    # A run of an earlier version does not state the training images of each class.
    summary = directory.read_summary()
    del summary["class_counts"]
    run_page.write(run, train, store, summary, history)
    earlier = Page((run / "report.html").read_text())
    assert f"The most frequent class has {max(train.counts):,}" in earlier.text
    assert "the validation split included" in earlier.text
    with pytest.raises(UserError, match=r"summary\.json"):
        run_page.write(run, train, store, {**directory.read_summary(), "class_counts": [3, 4]}, history)
    (run / "report.html").write_text(before)
    Page(page)
    assert "The matrix is drawn for up to 4 classes; this data set has" in page
    assert "with the lowest F1" in page
    assert page.count('<td class="amount"') == 2


def test_a_reliability_diagram_names_its_bins() -> None:
    confidence = np.array([0.95] * 30 + [0.5] * 10, np.float32)
    correct = np.array([True] * 27 + [False] * 3 + [True] * 5 + [False] * 5)
    chart = reliability_chart([Bins("<after>", reliability(confidence, correct), "series1")], "accuracy by confidence")
    Page(chart)
    assert "&lt;after&gt;: 30 images, confidence 95.00%, accuracy 90.00%" in chart
    assert calibration_error(confidence, correct) == pytest.approx(30 / 40 * 0.05, abs=1e-6)


def test_metrics_are_drawn_at_their_epochs() -> None:
    """Epochs whose images are all mixed have no training accuracy."""
    history = [{"train_loss": 1.0, "validation": {"accuracy": 0.5}} for _ in range(3)]
    history[2]["train_accuracy"] = 0.9
    charts = {chart["title"]: chart["svg"] for chart in learning_curves(history)}
    assert list(charts) == ["Loss", "Accuracy"]
    assert "training accuracy, epoch 3: 90.00%" in charts["Accuracy"]
    assert "training accuracy, epoch 1" not in charts["Accuracy"]


@pytest.mark.parametrize("values", [[1.0, 1.0], [0.0, 0.0], [0.97, 1.0], [0.0, 0.02]])
def test_a_chart_of_shares_has_no_tick_beyond_all_or_below_none(values: list[float]) -> None:
    chart = line_chart([Line("accuracy", values, "series1")], "accuracy by epoch", is_percent=True)
    ticks = [float(text) for text in re.findall(r">(-?[0-9.]+)%<", chart)]
    assert len(ticks) > 1 and min(ticks) >= 0 and max(ticks) <= 100


def test_line_chart_survives_one_epoch_and_equal_values() -> None:
    for values in ([0.5], [0.5, 0.5], [1e-9, 2e-9], [1e-12], [0.0, 1e-15], [float("nan"), 1.0]):
        chart = line_chart([Line("loss", values, "series1")], "loss by epoch")
        assert "nan" not in chart
        Page(chart)


def test_confusion_chart_names_every_cell_that_is_not_empty() -> None:
    counts = np.array([[8, 2], [0, 5]])
    chart = confusion_chart(counts, ("<a>", "b"))
    assert chart.count("<title>") == 3
    assert "&lt;a&gt; → b: 2 of 10 (20.00%)" in chart


def test_a_distribution_chart_has_a_bar_for_each_class_by_frequency() -> None:
    chart = distribution_chart((5, 20, 0), ("<a>", "b", "c"))
    Page(chart)
    titles = re.findall("<title>(.*?)</title>", chart)
    assert titles == [
        "b: 20 training images (80.00%)",
        "&lt;a&gt;: 5 training images (20.00%)",
        "c: 0 training images (0.00%)",
    ]
    heights = [float(height) for height in re.findall(r'<rect [^>]*height="([\d.]+)"', chart)]
    assert heights == pytest.approx([150, 37.5, 0])
    assert 'aria-label="Training images of each class, from b (20) to c (0)"' in chart


def test_a_distribution_chart_of_many_classes_keeps_the_most_and_the_least_frequent() -> None:
    chart = distribution_chart(range(1, 5001), [f"class {number}" for number in range(5000)])
    titles = re.findall("<title>(.*?):", chart)
    assert len(titles) == 640 and (titles[0], titles[-1]) == ("class 4999", "class 0")
