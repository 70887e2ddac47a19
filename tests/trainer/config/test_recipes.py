"""Every recipe runs on data in the official layout: on small synthetic copies, packed as its head says."""

from __future__ import annotations

import itertools
import json
import math
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from support.image_files import png, smooth
from support.official_layouts import cifar10_files, write_emnist, write_mnist, write_numtadb
from support.raw_files import write_tar
from torch import nn

from pipeline.shard import main as pack_main
from pipeline.transforms.augmentation import Augmentation
from pipeline.transforms.preprocess import Preprocessing
from shards import open_split
from trainer.config.load import load
from trainer.data.training_data import open_data
from trainer.models.factory import make_model
from trainer.run import main as run_main
from trainer.runtime.distributed import World

RECIPES = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml") if path.stem != "quickstart")
BATCH = 8
# Of a copy of a few images a share that is at least one of each class; no network, and nothing compiled.
SMALL = (
    "device=cpu",
    f"loader.batch_size={BATCH}",
    "data.val_fraction=0.25",
    "trainer.precision=fp32",
    "model.pretrained=false",
    "logging.wandb=off",
)


def packing_of(recipe: str) -> list[str]:
    """Arguments of the packing command in the head of a recipe."""
    head = (ROOT / "configs" / f"{recipe}.yaml").read_text().partition("\ndata:")[0]
    return shlex.split(re.search(r"python -m pipeline\.shard ([^&\n]*)", head)[1])


def write_raw(source: str, split: str, directory: Path) -> Path:
    """A synthetic copy of what the packing command reads."""
    if source == "cifar10":
        directory.mkdir()
        files = {f"cifar-10-batches-bin/{name}": content for name, content in cifar10_files(24, 20).items()}
        write_tar(directory / "cifar-10-binary.tar.gz", files, "w:gz")
        return directory
    if source == "folder":
        for number, image in enumerate(smooth(24, 64, 64, channels=3)):
            path = directory / "ab"[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(image))
        return directory
    if source == "numtadb":
        return write_numtadb(directory, 40)
    if source == "mnist":
        return write_mnist(directory, 120, 20)
    return write_emnist(directory, split, 4 * 62, 62)


class Packed:
    """Sets packed from synthetic raw files by the commands of recipes, each once."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __call__(self, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> Path:
        arguments = [*arguments]
        source = arguments[0]
        split = arguments[arguments.index("--split") + 1] if "--split" in arguments else "byclass"
        out = self.directory / f"{source}-{split}"
        if not out.exists():
            raw = write_raw(source, split, self.directory / f"raw-{source}-{split}")
            if "--raw" in arguments:
                arguments[arguments.index("--raw") + 1] = str(raw)
            else:
                arguments += ["--raw", str(raw)]
            called(monkeypatch, pack_main, *arguments, "--out", out)
        return out


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    return Packed(tmp_path_factory.mktemp("packed"))


def called(monkeypatch: pytest.MonkeyPatch, main: object, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    assert main() in (0, None)


@pytest.mark.parametrize("recipe", RECIPES)
def test_takes_a_step_on_data_in_the_official_layout(
    recipe: str, packed: Packed, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = packed(*packing_of(recipe), monkeypatch=monkeypatch)
    called(monkeypatch, run_main, ROOT / "configs" / f"{recipe}.yaml", "--dry-run", f"data.shards={shards}", *SMALL)
    loss = float(re.search(r"one step\s+loss ([\d.]+)", capsys.readouterr().out)[1])
    assert math.isfinite(loss) and loss > 0


def test_pixels_go_from_minus_one_to_one(packed: Packed, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = packed("mnist", monkeypatch=monkeypatch)
    config = load(ROOT / "configs" / "mnist_sgd.yaml", [f"data.shards={shards}", *SMALL])
    data = open_data(config, World(rank=0, size=1, device=torch.device("cpu")))
    images = torch.cat([batch.images for batch in data.test.batches()])
    assert (float(images.min()), float(images.max())) == pytest.approx((-1, 1), abs=1e-6)
    store = open_split(shards, "test")
    raw = np.empty((len(store), *store.manifest.image_shape), np.uint8)
    store.gather(np.arange(len(store)), raw)
    assert float(images.mean()) == pytest.approx(raw.mean() / 127.5 - 1, abs=1e-4)


def trained(monkeypatch: pytest.MonkeyPatch, recipe: str, shards: Path, run: Path, *overrides: str) -> dict:
    arguments = (
        ROOT / "configs" / f"{recipe}.yaml",
        f"data.shards={shards}",
        f"run.dir={run}",
        "trainer.epochs=1",
        *SMALL,
        *overrides,
    )
    called(monkeypatch, run_main, *arguments)
    return json.loads((run / "summary.json").read_text())


@pytest.mark.parametrize("recipe", ["cifar10_batchnorm", "mnist_sgd"])
def test_runs_to_its_report(recipe: str, packed: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = packed(*packing_of(recipe), monkeypatch=monkeypatch)
    assert trained(monkeypatch, recipe, shards, tmp_path / "run")["samples"] == 20
    assert (tmp_path / "run" / "report.html").exists()


# Table 1 of the published system on NumtaDB: input, Conv2D (in, out, kernel, stride, padding), Linear (in, out). ReLU
# follows each of them but the last, and MaxPool2D (2, 2) each convolution.
NUMTADB_NETWORKS = {
    "numtadb_model1": (64, [(3, 16, 3, 1, 1), (16, 32, 3, 1, 1), (32, 32, 3, 1, 1)], [2048, 1024, 512, 10]),
    "numtadb_lenet": (28, [(3, 6, 5, 1, 0), (6, 16, 5, 1, 0)], [256, 120, 84, 10]),
    "numtadb_model2": (48, [(3, 6, 5, 1, 0), (6, 16, 5, 1, 0), (16, 32, 3, 1, 1)], [512, 120, 84, 10]),
    "numtadb_model3": (48, [(3, 16, 3, 1, 1), (16, 32, 3, 1, 1), (32, 32, 3, 1, 1)], [1152, 1024, 512, 10]),
}


@pytest.mark.parametrize("recipe", NUMTADB_NETWORKS)
def test_numtadb_recipes_are_those_of_the_published_system(recipe: str) -> None:
    """Its final models: inverted, cropped, dilated images, contour cutout, rate 0.01, plateau of macro F1."""
    side, convolutions, dense = NUMTADB_NETWORKS[recipe]
    expected = []
    for channels, filters, kernel, stride, padding in convolutions:
        expected += [f"conv {channels} {filters} {kernel} {stride} {padding}", "ReLU", "pool 2 2"]
    for inputs, outputs in itertools.pairwise(dense):
        expected += [f"linear {inputs} {outputs}", "ReLU"]
    config = load(ROOT / "configs" / f"{recipe}.yaml", [])
    found = []
    for layer in make_model(config.model, 1, 10).modules():
        if isinstance(layer, nn.Conv2d):
            sizes = (layer.kernel_size[0], layer.stride[0], layer.padding[0])
            found.append(" ".join(map(str, ("conv", layer.in_channels, layer.out_channels, *sizes))))
        elif isinstance(layer, nn.Linear):
            found.append(f"linear {layer.in_features} {layer.out_features}")
        elif isinstance(layer, nn.MaxPool2d):
            found.append(f"pool {layer.kernel_size} {layer.stride}")
        elif isinstance(layer, nn.ReLU):
            found.append("ReLU")
    assert found == expected[:-1]
    assert config.data.resolution == side
    steps = Preprocessing("auto", crop_to_foreground=0.0, foreground_opening_radius=1, dilation_radius=1)
    assert config.data.preprocessing() == steps
    assert config.augment.augmentation() == Augmentation(erase=0.5, erase_at="contour")
    assert (config.optim.lr, config.schedule.name, config.trainer.monitor) == (0.01, "plateau", "macro_f1")
    assert config.mixup.prob == 0 and config.loss.label_smoothing == 0 and config.loss.class_weights == "none"


def test_bengali_digits_begin_with_weights_from_emnist(
    packed: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the head of numtadb_model2.yaml says; at next to no learning rate the weights stay what they were."""
    digits = packed("emnist", "--split", "digits", monkeypatch=monkeypatch)
    trained(monkeypatch, "numtadb_model2", digits, tmp_path / "digits")
    bengali = packed(*packing_of("numtadb_model2"), monkeypatch=monkeypatch)
    begun = tmp_path / "digits" / "checkpoints" / "best.pt"
    overrides = (f"model.init_checkpoint={begun}", "optim.lr=1e-12", "schedule.min_lr=0")
    summary = trained(monkeypatch, "numtadb_model2", bengali, tmp_path / "run", *overrides)
    assert summary["samples"] == 40
    before = torch.load(begun, weights_only=True)["model"]
    after = torch.load(tmp_path / "run" / "checkpoints" / "best.pt", weights_only=True)["model"]
    gray = {name.removeprefix("backbone."): weights for name, weights in before.items()}  # a gray image is repeated
    torch.testing.assert_close(after, gray, atol=1e-8, rtol=0)
