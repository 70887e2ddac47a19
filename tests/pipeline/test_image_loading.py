"""Sets of image files, packed by us or written by others, through loader, statistics, preview and a training run."""

from __future__ import annotations

import base64
import io
import json
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import pack_splits
from PIL import Image
from support.raw_files import picture, pixels, refusal
from support.synthetic_records import foreign_set, pack_pictures, synthetic_image
from support.transform_reference import model_input

from pipeline import normalization
from pipeline.loader import Loader
from pipeline.preview import _GAP, _HEADER, _LABEL, _MARGIN, _TILE, contact_sheet, read_images
from pipeline.readers.raw_split import RawSplit
from pipeline.sampler import BatchSampler, SequentialBatchSampler, ShuffledBatchSampler
from pipeline.transforms.augmentation import Augmentation
from pipeline.transforms.build import build_transform
from pipeline.transforms.spec import TransformSpec
from shards import UserError, open_split
from shards.index import index
from shards.stores.base import Store
from shards.stores.image_header import decode
from trainer.evaluate.__main__ import main as evaluate_main
from trainer.report import error_gallery
from trainer.run import main as run_main

RESOLUTION = 20
TOLERANCE = 1e-5  # see test_picture_graph
CPU = torch.device("cpu")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 + 40 pictures of two classes, packed as records. Not to be changed."""
    return pack_pictures(tmp_path_factory.mktemp("packed") / "set")


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 + 40 pictures of two classes, by webdataset's own writer, indexed. Not to be changed."""
    out = foreign_set(tmp_path_factory.mktemp("foreign") / "set", train=120, test=40, shard_size=50)
    index(out, None)
    return out


@pytest.fixture(params=["packed", "foreign"])
def set_of_pictures(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def make_loader(store: Store, order: BatchSampler, device: torch.device, rank: int = 0, world_size: int = 1) -> Loader:
    transform = build_transform(TransformSpec.of(store.manifest, RESOLUTION), "dali", device, order.batch_size)
    return Loader(store, order, transform, device, rank=rank, world_size=world_size)


def expected(store: Store, samples: np.ndarray) -> np.ndarray:
    decoded = [decode(image, 3) for image in store.read(samples)]
    zeros, ones = (0.0,) * 3, (1.0,) * 3
    return np.concatenate([model_input(image[None], RESOLUTION, mean=zeros, std=ones) for image in decoded])


def test_batches_hold_what_order_and_store_say(set_of_pictures: Path, device: torch.device) -> None:
    store = open_split(set_of_pictures, "train")
    order = ShuffledBatchSampler(np.arange(len(store)), 30, 3)
    batches = list(make_loader(store, order, device).batches(epoch=2))
    assert len(batches) == 4
    for batch, step in zip(batches, order.steps(2, 0, 1), strict=True):
        allowed = TOLERANCE if device.type == "cpu" else 3 / 255
        assert np.abs(batch.images.cpu().numpy() - expected(store, step.samples)).max() <= allowed
        assert batch.labels.tolist() == store.labels[step.samples].tolist()
        assert batch.source_index.tolist() == store.rows[step.samples].tolist()
        assert {tensor.device.type for tensor in (batch.images, batch.labels, batch.source_index)} == {device.type}


def test_ranks_share_a_global_batch(set_of_pictures: Path) -> None:
    store = open_split(set_of_pictures, "train")
    order = ShuffledBatchSampler(np.arange(len(store)), 33, 3)
    alone = list(make_loader(store, order, CPU).batches(1))
    shares = [list(make_loader(store, order, CPU, rank, 2).batches(1)) for rank in range(2)]
    for whole, *parts in zip(alone, *shares, strict=True):
        assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
        assert torch.equal(torch.cat([part.source_index for part in parts]), whole.source_index)


def test_ranks_share_augmented_crops(packed: Path) -> None:
    store = open_split(packed, "train")
    augmentation = Augmentation(random_resized_crop=(0.1, 0.9), auto_augment="rand_augment")
    order = ShuffledBatchSampler(np.arange(len(store)), 40, 3, augmentation=augmentation)
    transform = build_transform(TransformSpec.of(store.manifest, RESOLUTION), "dali", CPU, 40, augmentation)
    alone = [batch.images.clone() for batch in Loader(store, order, transform, CPU).batches(1)]
    for rank in range(2):
        for batch in Loader(store, order, transform, CPU, rank=rank, world_size=2).batches(1):
            assert torch.equal(batch.images, alone[batch.step][20 * rank : 20 * rank + 20])
    resumed = next(Loader(store, order, transform, CPU).batches(1, 2))
    assert torch.equal(resumed.images, alone[2])
    step = next(iter(order.steps(1, 0, 1)))
    assert torch.equal(transform(store.read(step.samples), step.params), alone[0])


def test_a_picture_damaged_after_packing_is_named(packed: Path, tmp_path: Path, device: torch.device) -> None:
    copy = Path(shutil.copytree(packed, tmp_path / "set"))
    path = copy / "train" / "shard-00001.tar"
    with tarfile.open(path) as archive:
        member = next(member for member in archive if member.name.endswith(".png"))
    content = bytearray(path.read_bytes())
    content[member.offset_data + 50 : member.offset_data + 60] = bytes(10)
    path.write_bytes(content)
    sample = int(member.name[:8])
    for verify, fault in ((True, ": it was changed"), (False, " (row {}): a picture that cannot be decoded")):
        store = open_split(copy, "train", verify=verify)
        order = ShuffledBatchSampler(np.arange(120), 32, 0)
        error = refusal(lambda store=store, order=order: list(make_loader(store, order, device).batches()))
        assert error.found.startswith(f"{path}: {member.name}{fault.format(store.rows[sample])}")
        assert "shards.verify" in error.hint
        named = refusal(lambda store=store: read_images(store, np.array([sample])))
        assert named.found == error.found


def test_statistics_are_those_of_the_reference(set_of_pictures: Path, device: torch.device) -> None:
    store = open_split(set_of_pictures, "train")
    measured = normalization.compute_stats(store, TransformSpec.of(store.manifest, RESOLUTION), "dali", device)
    reference = expected(store, np.arange(len(store)))
    # Each picture counts the same, whatever its size. A quarter are JPEG files, which a GPU decodes itself.
    allowed = 1e-5 if device.type == "cpu" else 1e-3
    np.testing.assert_allclose(measured.mean, reference.mean(axis=(0, 2, 3)), atol=allowed)
    np.testing.assert_allclose(measured.std, reference.std(axis=(0, 2, 3)), atol=allowed)
    assert measured.samples == 120


def test_statistics_of_a_sorted_set_are_taken_from_everywhere(foreign: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_split(foreign, "train")
    assert np.all(np.diff(store.labels) >= 0), "sorted by class"
    monkeypatch.setattr(normalization, "_MAX_ENCODED_SAMPLES", 30)
    samples = normalization._select_samples(store)
    assert len(samples) == len(set(samples.tolist())) == 30
    assert np.bincount(store.labels[samples]).tolist() == [15, 15]
    assert normalization.compute_stats(store, TransformSpec.of(store.manifest, 8), "dali", CPU).samples == 30


def test_statistics_are_taken_from_few_shards(foreign: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of a remote data set may have to be fetched."""
    store = open_split(foreign, "train")
    bounds = store.shard_bounds.tolist()
    assert len(bounds) > 3
    monkeypatch.setattr(normalization, "_MAX_SHARDS", 2)
    samples = normalization._select_samples(store).tolist()
    second = (len(bounds) - 1) // 2
    assert samples == [*range(bounds[0], bounds[1]), *range(bounds[second], bounds[second + 1])]


def test_a_contact_sheet_shows_pictures_in_their_own_shape(tmp_path: Path) -> None:
    """Wide pictures: raw with paper above and below, processed squeezed into the square that the model sees."""
    wide = np.zeros((8, 32, 3), np.uint8)
    wide[:, 16:] = 255
    for part in ("train", "test"):
        (tmp_path / part).mkdir()
        with tarfile.open(tmp_path / part / "0.tar", "w") as archive:
            for name, content in (("a.png", picture(wide)), ("a.cls", b"0")):
                (tmp_path / name).write_bytes(content)
                archive.add(tmp_path / name, name)
    index(tmp_path, None)
    sheet = np.asarray(contact_sheet(open_split(tmp_path, "train"), 32).convert("L"))
    left = _MARGIN + _LABEL
    raw = sheet[_HEADER : _HEADER + _TILE, left : left + _TILE]
    processed = sheet[_HEADER : _HEADER + _TILE, left + _TILE + _GAP :][:, :_TILE]
    dark = np.argwhere(raw < 50)
    assert (dark.min(axis=0) == (_TILE * 3 // 8, 0)).all() and (dark.max(axis=0) <= (_TILE * 5 // 8, _TILE // 2)).all()
    assert (processed[:, : _TILE // 2 - 4] < 50).all() and (processed[:, _TILE // 2 + 4 :] > 200).all()


# A training run.


def recipe(directory: Path, shards: Path) -> Path:
    path = directory / "pictures.yaml"
    settings = {
        "data": {"shards": str(shards), "val_fraction": 0.1, "resolution": 32},
        "loader": {"batch_size": 12},
        "model": {"name": "three_block_cnn"},
        "optim": {"lr": 3e-3},
        "trainer": {"epochs": 1, "precision": "fp32"},
    }
    path.write_text(yaml.safe_dump(settings))
    return path


def train(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["trainer.run", *map(str, arguments)])
    return run_main()


def test_a_set_of_pictures_trains_and_is_reported(
    set_of_pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The classes are told apart by where a picture is bright, which one epoch suffices to see."""
    run = tmp_path / "run"
    assert train(monkeypatch, recipe(tmp_path, set_of_pictures), f"run.dir={run}") == 0
    assert "loader dali: decodes image files" in capsys.readouterr().out
    summary = json.loads((run / "summary.json").read_text())
    assert summary["samples"] == 40
    assert summary["accuracy"] > 0.6
    assert (run / "report.html").stat().st_size < 4 << 20
    predictions = np.load(run / "predictions.npz")
    store = open_split(set_of_pictures, "test")
    assert sorted(predictions["rows"].tolist()) == sorted(store.rows.tolist())

    monkeypatch.setattr(sys, "argv", ["evaluate", str(run), str(set_of_pictures), "--json", str(tmp_path / "e.json")])
    assert evaluate_main() == 0
    assert json.loads((tmp_path / "e.json").read_text())["accuracy"] == summary["accuracy"]


def test_the_report_shows_confused_pictures_small(tmp_path: Path) -> None:
    images = pixels(900, 300, 3)[None]
    splits = [RawSplit.from_arrays(name, images, np.zeros(1, np.int64), ("a",)) for name in ("train", "test")]
    (address,) = error_gallery.data_urls(open_split(pack_splits(tuple(splits), tmp_path), "test"), np.array([0]), 128)
    shown = Image.open(io.BytesIO(base64.b64decode(address.removeprefix("data:image/png;base64,"))))
    assert shown.size == (43, 128)


def test_the_torch_backend_is_refused_before_anything_runs(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError) as caught:
        train(monkeypatch, recipe(tmp_path, packed), f"run.dir={tmp_path / 'run'}", "loader.backend=torch")
    assert "DALI" in caught.value.expected
    assert not (tmp_path / "run").exists()


def test_a_dry_run_tells_of_picture_files(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(monkeypatch, recipe(tmp_path, packed), "--dry-run") == 0
    assert "raw images    image files, 3 channels, upright" in capsys.readouterr().out


def test_evaluation_covers_every_picture_once(set_of_pictures: Path) -> None:
    store = open_split(set_of_pictures, "test")
    order = SequentialBatchSampler(np.arange(len(store)), 16)
    batches = [batch for rank in range(3) for batch in make_loader(store, order, CPU, rank, 3).batches()]
    assert sorted(row for batch in batches for row in batch.source_index.tolist()) == sorted(store.rows.tolist())


def test_synthetic_classes_differ_in_where_they_are_bright() -> None:
    for label, bright in ((0, 0), (1, 1)):
        image = synthetic_image(5, label)
        halves = image[: len(image) // 2].mean(), image[len(image) // 2 :].mean()
        assert int(np.argmax(halves)) == bright
