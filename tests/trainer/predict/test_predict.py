"""A finished run put to use: pictures in, classes and probabilities out, the same as in training."""

from __future__ import annotations

import csv
import json
import os
import socket
import struct
import sys
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import run_module
from numpy.typing import NDArray
from PIL import Image

from shards import UserError, open_split
from trainer.checkpoint import io as checkpoint
from trainer.checkpoint.trained_model import load_trained_model
from trainer.config.schema import ModelConfig
from trainer.export.ensemble import make_ensemble
from trainer.models.factory import make_model
from trainer.predict import __main__ as command
from trainer.predict.__main__ import main
from trainer.predict.input_files import Sample
from trainer.predict.predictor import Predictor, embedding_width, record_embeddings, upright_images

Predict = Callable[..., int]


@pytest.fixture
def predict(monkeypatch: pytest.MonkeyPatch) -> Predict:
    """The command, in this process; its exit status."""

    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["trainer.predict", *map(str, arguments)])
        return main()

    return run


def drawn_large(image: NDArray[np.uint8], random: np.random.Generator) -> Image.Image:
    """A light character as dark ink, enlarged, somewhere on a larger sheet of another shape."""
    side = int(random.integers(60, 240))
    width, height = (side + random.integers(20, 200, 2)).tolist()
    sheet = Image.new("L", (width, height), 0)
    place = (int(random.integers(5, width - side - 4)), int(random.integers(5, height - side - 4)))
    sheet.paste(Image.fromarray(image[..., 0]).resize((side, side), Image.Resampling.BICUBIC), place)
    return Image.fromarray(255 - np.asarray(sheet))


def said(predictor: Predictor, images: list[NDArray[np.uint8]]) -> NDArray[np.int64]:
    size = predictor.batch_size
    parts = [predictor.predict(images[start : start + size]) for start in range(0, len(images), size)]
    return np.concatenate([part.probabilities for part in parts]).argmax(axis=1)


@pytest.fixture(scope="module")
def pictures(digits_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve digits drawn large, in a directory of a directory, with a table of truth."""
    directory = tmp_path_factory.mktemp("pictures")
    store = open_split(digits_set, "test")
    random = np.random.default_rng(0)
    (directory / "inner").mkdir()
    lines = ["Label;FILENAME"]
    for number, image in enumerate(upright_images(store, np.arange(12))):
        drawn_large(image, random).save(directory / "inner" / f"{number}.png")
        lines.append(f"{store.manifest.classes[store.labels[number]]};inner/{number}.png")
    (directory / "truth.csv").write_text("\n".join(lines) + "\n")
    return directory


def test_it_predicts_what_the_run_predicted(digits_run: Path, digits_set: Path) -> None:
    """The same graph, model and temperature: the run's own answers to the test part come out, to rounding."""
    predictor = Predictor(digits_run)
    store = open_split(digits_set, "test")
    probabilities = []
    images = upright_images(store, np.arange(len(store)))
    for start in range(0, len(images), predictor.batch_size):
        probabilities.append(predictor.predict(images[start : start + predictor.batch_size]).probabilities)
    found = np.concatenate(probabilities)
    kept = np.load(digits_run / "predictions.npz")
    order = np.argsort(store.rows)
    np.testing.assert_array_equal(found.argmax(axis=1)[order], kept["predicted"])
    np.testing.assert_allclose(found.max(axis=1)[order], kept["confidence"], atol=1e-5)
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-5)


def test_digits_drawn_large_are_read_as_they_were(digits_run: Path, digits_set: Path, tmp_path: Path) -> None:
    predictor = Predictor(digits_run)
    store = open_split(digits_set, "test")
    images = upright_images(store, np.arange(len(store)))
    random = np.random.default_rng(1)
    taken = []
    for image in images:
        drawn_large(image, random).save(tmp_path / "drawn.png", compress_level=1)
        taken.append(predictor.adapter.adapt((tmp_path / "drawn.png").read_bytes()).image)
    agree = said(predictor, taken) == said(predictor, images)
    assert agree.mean() > 0.94
    raw = [np.asarray(drawn_large(image, random).resize((8, 8)))[..., None] for image in images]
    assert (said(predictor, raw) == said(predictor, images)).mean() < 0.5, "without the ink processing"


@pytest.mark.slow
def test_genuine_characters_drawn_large_are_read_as_they_were(shared_data: Path, tmp_path: Path) -> None:
    """EMNIST ByClass, 62 classes of which many differ in size alone (O and o), which is lost in the drawing."""
    shards, run = tmp_path / "emnist", tmp_path / "run"
    raw = ("--raw", shared_data / "emnist", "--out", shards)
    assert run_module("pipeline.shard", "emnist", *raw).returncode == 0
    settings = (f"data.shards={shards}", f"run.dir={run}", "data.train_fraction=0.3", "trainer.epochs=2")
    assert run_module("trainer.run", "configs/byclass_cpu.yaml", *settings, timeout=1200).returncode == 0
    predictor = Predictor(run)
    store = open_split(shards, "test")
    images = upright_images(store, np.arange(1000))
    random = np.random.default_rng(1)
    taken = []
    for image in images:
        drawn_large(image, random).save(tmp_path / "drawn.png", compress_level=1)
        taken.append(predictor.adapter.adapt((tmp_path / "drawn.png").read_bytes()).image)
    before, after, labels = said(predictor, images), said(predictor, taken), store.labels[:1000]
    assert (before == after).mean() > 0.88
    assert (after == labels).mean() > (before == labels).mean() - 0.06


def test_files_are_predicted_and_faults_are_told(digits_run: Path, pictures: Path, tmp_path: Path) -> None:
    Image.new("RGB", (40, 30), "white").save(tmp_path / "blank.png")
    (tmp_path / "broken.png").write_bytes((pictures / "inner" / "0.png").read_bytes()[:200])
    (tmp_path / "text.png").write_text("no image in")
    outputs = ("--csv", tmp_path / "out.csv", "--json", tmp_path / "out.json", "--sheet", tmp_path / "out.sheet")
    process = run_module("trainer.predict", digits_run, tmp_path, pictures, *outputs)
    assert process.returncode == 1, process.stderr
    assert process.stderr == ""
    lines = {line.split()[0].rpartition("/")[2]: line for line in process.stdout.splitlines() if ".png" in line}
    assert "not predicted: low contrast" in lines["blank.png"]
    assert "truncated" in lines["broken.png"]
    assert "not a PNG" in lines["text.png"]
    assert "dark ink inverted" in lines["7.png"]
    assert "3 of 15 images unusable" in process.stdout
    assert "accuracy" not in process.stdout, "nobody told the truth"

    found = json.loads((tmp_path / "out.json").read_text())
    assert found["metrics"] is None
    assert found["classes"] == list("0123456789")
    assert len(found["predictions"]) == 15
    names = [one["file"].rpartition("/")[2] for one in found["predictions"]]
    assert names == ["blank.png", "broken.png", "text.png", *(f"{number}.png" for number in range(12))]
    for one in found["predictions"][3:]:
        assert sum(one["probabilities"]) == pytest.approx(1, abs=1e-4)
        assert one["predicted"] == found["classes"][int(np.argmax(one["probabilities"]))]
    with open(tmp_path / "out.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["predicted"] for row in rows] == [one["predicted"] or "" for one in found["predictions"]]
    assert float(rows[5]["p(3)"]) == found["predictions"][5]["probabilities"][3]
    sheet = Image.open(tmp_path / "out.sheet")
    assert sheet.format == "PNG"
    assert len(np.unique(np.asarray(sheet.convert("L")))) > 50


def test_a_table_of_truth_brings_the_figures(
    predict: Predict, digits_run: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(digits_run, pictures / "truth.csv", "--json", tmp_path / "out.json") == 0
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "out.json").read_text())
    right = sum(one["label"] == one["predicted"] for one in found["predictions"])
    assert right >= 10
    assert found["metrics"]["accuracy"] == pytest.approx(right / 12)
    assert found["metrics"]["samples"] == 12
    assert f"accuracy {right / 12:.2%}" in printed
    matrix = np.zeros((10, 10), int)
    for one in found["predictions"]:
        matrix[int(one["label"]), int(one["predicted"])] += 1
    assert found["metrics"]["confusion_matrix"] == matrix.tolist()
    lines = printed.partition("columns: predicted class)")[2].split("\n")[2:13]
    assert [[*map(int, line.split())] for line in lines] == [[*range(10)], *([n, *row] for n, row in enumerate(matrix))]
    assert "most frequent confusions" in printed or right == 12


def test_a_table_without_a_head_and_a_pattern(
    predict: Predict, digits_run: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [line.split(";") for line in (pictures / "truth.csv").read_text().splitlines()[1:]]
    table = pictures / "plain.csv"
    table.write_text("".join(f"{name},{label}\n" for label, name in lines))
    assert predict(digits_run, table) == 0
    assert "on 12 samples" in capsys.readouterr().out
    assert predict(digits_run, pictures / "**" / "1*.png") == 0
    printed = capsys.readouterr().out
    assert [number for number in range(12) if f"/{number}.png" in printed] == [1, 10, 11]


def test_a_packed_set_gives_the_figures_of_the_run(
    predict: Predict, digits_run: Path, digits_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = json.loads((digits_run / "summary.json").read_text())
    for place in (digits_set, digits_set / "test"):
        assert predict(digits_run, place, "--json", tmp_path / "out.json") == 0
        found = json.loads((tmp_path / "out.json").read_text())["metrics"]
        for name in ("accuracy", "macro_f1", "weighted_f1", "samples"):
            assert found[name] == summary[name]
        assert found["calibration_error"] == pytest.approx(summary["calibration"]["ece"], abs=1e-4)
        assert [row["f1"] for row in found["classes"]] != []
    assert "and 259 more" in capsys.readouterr().out


def test_mistakes_are_told(
    predict: Predict, digits_run: Path, synthetic_set: Path, pictures: Path, tmp_path: Path
) -> None:
    (tmp_path / "labels.csv").write_text("file,label\nx.png,Q\n")
    (tmp_path / "away.csv").write_text("file,label\nx.png,7\n")
    (tmp_path / "bare.csv").write_text("a,b\nx.png,7\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "excel.csv").write_bytes("file,label\né.png,7\n".encode("latin-1"))
    (tmp_path / "nothing.csv").touch()
    (pictures / "one_column.csv").write_text("0.png\n1.png\n")
    one_file = ("--csv", tmp_path / "out.txt", "--json", tmp_path / "empty" / ".." / "out.txt")
    for images, words in (
        ((tmp_path / "no.png",), r"no.png\n.*packed data set"),
        ((tmp_path / "empty",), "no image in"),
        ((tmp_path / "*.jpg",), "no file that matches"),
        ((tmp_path / "labels.csv",), "line 2: class 'Q'"),
        ((tmp_path / "away.csv",), "none of whose image files exists"),
        ((tmp_path / "bare.csv",), "columns a, b"),
        ((pictures / "one_column.csv",), r"columns 0.png\n.*\n.*file,label into its first line"),
        ((pictures, ""), "an empty name"),
        ((synthetic_set,), "with classes class 0"),
        ((tmp_path / "excel.csv",), r"excel.csv: line 2: byte 0xe9, which is not UTF-8\n.*\n.*CSV \(UTF-8\)"),
        ((tmp_path / "nothing.csv",), "nothing.csv: it is empty"),
        ((pictures, "--csv", tmp_path / "no" / "out.csv"), "no such directory"),
        ((pictures, *one_file), "two outputs in one file, .*out.txt"),
    ):
        with pytest.raises(UserError, match=words):
            predict(digits_run, *images)
    with pytest.raises(UserError, match="no checkpoint"):
        predict(tmp_path, pictures)
    with pytest.raises(UserError, match=f"exchange them: {digits_run} {pictures}"):
        predict(pictures, digits_run)


@pytest.fixture
def endless(tmp_path: Path) -> dict[str, Path]:
    """Paths that exist and have no end, no content or no meaning."""
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    (tmp_path / "loop.png").symlink_to("loop.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.png"))
    return {path.stem: path for path in tmp_path.iterdir()} | {"zero": Path("/dev/zero")}


@pytest.mark.parametrize("kind", ["fifo", "device", "socket", "zero"])
def test_what_has_no_end_is_refused(predict: Predict, digits_run: Path, endless: dict[str, Path], kind: str) -> None:
    with pytest.raises(UserError, match=f"{endless[kind]} is not a regular file"):
        predict(digits_run, endless[kind])
    table = endless["fifo"].with_name("table.csv")
    table.write_text(f"file,label\nx.png,7\n{endless[kind]},7\n")
    with pytest.raises(UserError, match=f"table.csv line 3: {endless[kind]} is not a regular file"):
        predict(digits_run, table)
    table.unlink()
    table.symlink_to(endless[kind])
    with pytest.raises(UserError, match="not a regular file"):
        predict(digits_run, table)


def test_a_directory_of_what_is_no_file(predict: Predict, digits_run: Path, endless: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="no image in"):
        predict(digits_run, endless["fifo"].parent)
    with pytest.raises(UserError, match="no such file"):
        predict(digits_run, endless["loop"])


def test_bombs_are_unusable_images(
    predict: Predict, digits_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    body = b"IHDR" + size
    head = (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + body
        + struct.pack(">I", zlib.crc32(body))
        + struct.pack(">I", 9)
        + b"IDAT"
    )
    (tmp_path / "bomb.png").write_bytes(head)
    with open(tmp_path / "large.png", "wb") as file:
        file.write(head)
        file.truncate(1 << 36)
    tracemalloc.start()
    try:
        assert predict(digits_run, tmp_path) == 1
        assert tracemalloc.get_traced_memory()[1] < 200 << 20
    finally:
        tracemalloc.stop()
    printed = capsys.readouterr().out
    assert "Image size (3600000000 pixels) exceeds limit" in printed
    assert "more than 268,435,456 bytes" in printed


def test_names_cannot_control_the_terminal_or_a_spreadsheet(
    predict: Predict,
    digits_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "=cmd|'\x1b[2J\u202egpj.png").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    assert predict(digits_run, next(Path().iterdir()), "--csv", "out.csv") == 1
    printed = capsys.readouterr().out
    assert printed.replace("\n", "").isprintable()
    assert "\\x1b[2J\\u202egpj.png" in printed
    (row,) = csv.DictReader(Path("out.csv").read_text().splitlines())
    assert row["file"] == "'=cmd|'\\x1b[2J\\u202egpj.png"


NETWORKS = ("test_efficientnet", "test_vit", "test_convnext", "test_resnet", "mobilenetv3_small_050")


@pytest.mark.parametrize("name", NETWORKS)
def test_embeddings_are_those_of_timm(name: str) -> None:
    model = timm.create_model(name, num_classes=3, in_chans=1, **({"img_size": 32} if "vit" in name else {})).eval()
    images = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    calls = record_embeddings(model)
    with torch.inference_mode():
        logits = model(images)
        expected = model.forward_head(model.forward_features(images), pre_logits=True)
        torch.testing.assert_close(calls[0], expected)
        assert embedding_width(model) == expected.shape[1]
        torch.testing.assert_close(model.get_classifier()(calls[0]), logits)


def test_embeddings_of_a_convolution_are_averaged_over_positions() -> None:
    model = make_model(ModelConfig(name="squeezenet1_1"), 1, 4).eval()
    images = torch.randn(2, 1, 64, 64)
    calls = record_embeddings(model)
    with torch.inference_mode():
        model(images)
        network = model.backbone if hasattr(model, "backbone") else model
        torch.testing.assert_close(calls[0], network.features(images).mean(dim=(2, 3)))
    assert embedding_width(model) == calls[0].shape[1]


def test_embeddings_of_all_inputs_are_written_in_their_order(
    predict: Predict, digits_run: Path, digits_set: Path, pictures: Path, tmp_path: Path
) -> None:
    (tmp_path / "damaged.png").write_bytes(b"no image")
    file = tmp_path / "embeddings.npy"
    inputs = (tmp_path / "damaged.png", digits_set / "test", pictures / "inner" / "0.png")
    assert predict(digits_run, *inputs, "--embeddings", file) == 1
    embeddings = np.load(file)
    assert embeddings.dtype == np.float32 and embeddings.shape == (361, 128)
    assert np.isnan(embeddings[0]).all() and not np.isnan(embeddings[1:]).any()

    predictor = Predictor(digits_run)
    store = open_split(digits_set, "test")
    network, config = predictor._model, predictor._config
    batch = upright_images(store, np.arange(32))
    with torch.inference_mode():
        images = predictor._transform(np.stack(batch))
        expected = network[:-2](images).numpy()  # without dropout and classifier
    assert config.trainer.test_time_augmentation == "none"
    np.testing.assert_allclose(embeddings[1:33], expected, atol=1e-5)
    assert predictor.predict(batch).embeddings.shape == (32, 0)

    assert predict(digits_run, tmp_path / "damaged.png", "--embeddings", file) == 1
    missing = np.load(file)
    assert missing.shape == (1, 128) and np.isnan(missing).all(), "the width is known without an image"


def test_embeddings_of_an_ensemble_lie_side_by_side(digits_run: Path, digits_set: Path, tmp_path: Path) -> None:
    trained = load_trained_model(digits_run)
    (tmp_path / "checkpoints").mkdir()
    checkpoint.save(tmp_path / "checkpoints" / checkpoint.BEST, make_ensemble([trained, trained]).state_dict())
    batch = upright_images(open_split(digits_set, "test"), np.arange(5))
    one, two = (Predictor(run, with_embeddings=True).predict(batch).embeddings for run in (digits_run, tmp_path))
    np.testing.assert_array_equal(two, np.concatenate([one, one], axis=1))


def test_memory_does_not_grow_with_the_images(
    digits_run: Path, digits_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 10,000 images, whose records alone would take 10 MB; all of them are in both files."""
    output, image = np.full(10, 0.1, np.float32), np.zeros((8, 8, 1), np.uint8)
    samples = (Sample(f"{number}.png", number % 10, None, "as stored") for number in range(10_000))
    monkeypatch.setattr(command, "predict", lambda *_: ((command.Prediction(each, output), image) for each in samples))
    files = tmp_path / "out.csv", tmp_path / "out.json"
    arguments = [digits_run, digits_set, "--device", "cpu", "--csv", files[0], "--json", files[1]]
    monkeypatch.setattr(sys, "argv", ["predict", *map(str, arguments)])
    tracemalloc.start()
    assert main() == 0
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5e6
    rows, found = list(csv.DictReader(files[0].open())), json.loads(files[1].read_text())
    assert [row["file"] for row in rows] == [each["file"] for each in found["predictions"]]
    assert len(rows) == 10_000 and rows[-1]["file"] == "9999.png" and float(rows[-1]["p(9)"]) == 0.1
    assert found["metrics"]["samples"] == 10_000 and found["metrics"]["accuracy"] == 0.1
