"""Mean and deviation of the model input: exact, the same for both transforms, and measured only when they must be."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import pack_splits, synthetic_splits
from support.transform_reference import model_input
from support.version_2 import downgrade

import pipeline.packing.pack
from pipeline import normalization
from pipeline.normalization import DatasetStats, compute_stats, load_or_compute_stats, packed_stats
from pipeline.sampler import SequentialBatchSampler
from pipeline.transforms.preprocess import Preprocessing
from pipeline.transforms.spec import TransformSpec
from shards import open_split
from shards.atomic import with_checksum, without_checksum
from shards.manifest import PixelStatistics, StoreKind
from shards.stores import sample_arrays
from shards.stores.base import Store
from shards.verify import check

CPU = torch.device("cpu")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """A packed set of its own, to be written into."""
    return pack_splits(synthetic_splits(train=150, test=20), tmp_path / "set")


@pytest.fixture
def store(packed: Path) -> Store:
    return open_split(packed, "train")


def from_reference(store: Store, resolution: int, interpolation: str = "linear") -> tuple[np.ndarray, np.ndarray]:
    images = np.empty((len(store), *store.manifest.image_shape), np.uint8)
    store.gather(np.arange(len(store)), images)
    channels = images.shape[3]
    pixels = model_input(
        images, resolution, interpolation, store.manifest.transposed, (0.0,) * channels, (1.0,) * channels
    )
    return pixels.mean(axis=(0, 2, 3)), pixels.std(axis=(0, 2, 3))


@pytest.mark.parametrize("backend", ["torch", "dali"])
@pytest.mark.parametrize(("resolution", "interpolation"), [(28, "linear"), (14, "linear"), (56, "cubic")])
@pytest.mark.parametrize(("shape", "transposed"), [((28, 28, 1), True), ((20, 31, 3), False)], ids=["gray", "rgb"])
def test_measures_mean_and_deviation_of_the_model_input(
    tmp_path: Path,
    device: torch.device,
    backend: str,
    resolution: int,
    interpolation: str,
    shape: tuple[int, int, int],
    transposed: bool,
) -> None:
    parts = synthetic_splits(train=150, test=20, shape=shape, transposed=transposed)
    store = open_split(pack_splits(parts, tmp_path / "set"), "train")
    measured = compute_stats(store, TransformSpec.of(store.manifest, resolution, interpolation), backend, device)
    mean, std = from_reference(store, resolution, interpolation)
    assert measured.samples == 150
    assert np.abs(np.array(measured.mean) - mean).max() < 1e-6
    assert np.abs(np.array(measured.std) - std).max() < 1e-6


@pytest.mark.parametrize(("resolution", "batch_size"), [(14, 12), (28, 12), (56, 3), (100, 1)])
def test_the_batches_of_the_statistics_have_bounded_bytes(
    store: Store, resolution: int, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The larger of the raw images and the model input counts."""
    spec, sizes = TransformSpec.of(store.manifest, resolution), []

    def sampler(samples: np.ndarray, size: int) -> SequentialBatchSampler:
        sizes.append(size)
        return SequentialBatchSampler(samples, size)

    expected = compute_stats(store, spec, "torch", CPU)
    monkeypatch.setattr(normalization, "_MAX_BATCH_BYTES", 3 * 4 * 56 * 56)
    monkeypatch.setattr(normalization, "SequentialBatchSampler", sampler)
    found = compute_stats(store, spec, "torch", CPU)
    assert sizes == [batch_size]
    assert (found.mean, found.std) == (pytest.approx(expected.mean, abs=1e-6), pytest.approx(expected.std, abs=1e-6))


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize(("store", "samples"), [("tar", 1), ("tar", 300), ("zarr", 150)])
def test_packing_computes_the_statistics_of_the_stored_pixels(
    tmp_path: Path, store: StoreKind, samples: int, transposed: bool
) -> None:
    """Also of parts of several shards and of blocks larger than what is added up at once."""
    parts = synthetic_splits(train=samples, test=20, shape=(20, 31, 3), transposed=transposed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.packing.pack, "SHARD_BYTES", 280 * 20 * 31 * 3)
        packed = pack_splits(parts, tmp_path / "set", block_size=270 if samples == 300 else 40, store=store)
    train = open_split(packed, "train")
    images = train.read(np.arange(samples)).astype(object if samples == 1 else np.int64)
    assert train.manifest.statistics is not None
    assert list(train.manifest.statistics.sums) == images.sum(axis=(0, 1, 2)).tolist()
    assert list(train.manifest.statistics.squares) == (images**2).sum(axis=(0, 1, 2)).tolist()
    found = packed_stats(train.manifest, TransformSpec.of(train.manifest, "20x31"))
    assert found is not None and found.samples == samples
    pixels = images.astype(np.float64) / 255
    np.testing.assert_allclose(found.mean, pixels.mean(axis=(0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(found.std, pixels.std(axis=(0, 1, 2)), rtol=1e-12)


@pytest.mark.parametrize("kind", ["tar", "zarr"])
def test_statistics_are_of_the_first_images(tmp_path: Path, kind: StoreKind, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (sample_arrays, check):
        monkeypatch.setattr(module, "STATISTICS_SAMPLES", 70)
    monkeypatch.setattr(pipeline.packing.pack, "SHARD_BYTES", 40 * 28 * 28)
    packed = pack_splits(synthetic_splits(train=150, test=20), tmp_path / "set", block_size=20, store=kind)
    store = open_split(packed, "train")
    images = store.read(np.arange(70)).astype(np.int64)
    expected = PixelStatistics(samples=70, sums=(images.sum(),), squares=((images**2).sum(),))
    assert store.manifest.statistics == expected
    assert check.check_split(packed / "train")[1] == []
    wrong = expected.model_copy(update={"squares": (expected.squares[0] + 1,)})
    store.manifest.model_copy(update={"statistics": wrong}).write(packed / "train")
    assert "statistics of the pixels differ" in check.check_split(packed / "train")[1][0]


def test_statistics_of_packing_serve_the_stored_pixels_only(
    packed: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = packed_stats(store.manifest, TransformSpec.of(store.manifest, 28))
    measured = compute_stats(store, TransformSpec.of(store.manifest, 28), "torch", CPU)
    assert found is not None
    assert (found.mean, found.std) == (pytest.approx(measured.mean, abs=1e-6), pytest.approx(measured.std, abs=1e-6))
    for other in (
        TransformSpec.of(store.manifest, 27),
        TransformSpec.of(store.manifest, 28, preprocessing=Preprocessing(invert=True)),
    ):
        assert packed_stats(store.manifest, other) is None
    monkeypatch.setattr(normalization, "compute_stats", _must_not_measure)
    spec = TransformSpec.of(store.manifest, 28)
    assert load_or_compute_stats(store, packed / "train", spec, "torch", CPU) == found
    assert not (packed / "train" / "statistics").exists()


def test_statistics_that_were_measured_before_an_upgrade_are_kept(tmp_path: Path) -> None:
    from shards.convert import upgrade  # imports zarr, which a GPU machine may lack

    packed = downgrade(pack_splits(synthetic_splits(train=100, test=10), tmp_path / "set"))
    store = open_split(packed, "train")
    spec = TransformSpec.of(store.manifest, 28)
    measured = load_or_compute_stats(store, packed / "train", spec, "torch", CPU)
    upgrade(packed)
    store = open_split(packed, "train")
    assert packed_stats(store.manifest, spec) not in (None, measured), "else the last bits would not tell"
    assert load_or_compute_stats(store, packed / "train", spec, "torch", CPU) == measured


def test_the_normalised_input_has_mean_0_and_deviation_1(store: Store) -> None:
    spec = TransformSpec.of(store.manifest, 20)
    measured = compute_stats(store, spec, "torch", CPU)
    again = compute_stats(store, spec.with_normalization(measured.mean, measured.std), "torch", CPU)
    assert again == measured, "the spec's own normalisation must not change what is measured"
    images = np.empty((len(store), *store.manifest.image_shape), np.uint8)
    store.gather(np.arange(len(store)), images)
    pixels = model_input(images, 20, "linear", True, measured.mean, measured.std)
    assert abs(pixels.mean()) < 1e-5
    assert pixels.std() == pytest.approx(1, abs=1e-5)


def test_blank_images_are_not_divided_by_nothing(tmp_path: Path) -> None:
    parts = tuple(
        dataclasses.replace(part, read=lambda rows: np.full((len(rows), 28, 28, 1), 51, np.uint8))
        for part in synthetic_splits(train=30, test=10)
    )
    blank = open_split(pack_splits(parts, tmp_path / "set"), "train")
    measured = compute_stats(blank, TransformSpec.of(blank.manifest, 28), "torch", CPU)
    assert measured.mean == pytest.approx((0.2,), abs=1e-6)
    assert measured.std == (1.0,)
    found = packed_stats(blank.manifest, TransformSpec.of(blank.manifest, 28))
    assert found is not None and (found.mean, found.std) == (pytest.approx((0.2,)), (1.0,))


def test_is_measured_once_and_then_read(packed: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = TransformSpec.of(store.manifest, 20)
    first = load_or_compute_stats(store, packed / "train", spec, "torch", CPU)
    assert first == compute_stats(store, spec, "torch", CPU)
    monkeypatch.setattr(normalization, "compute_stats", _must_not_measure)
    assert load_or_compute_stats(store, packed / "train", spec, "torch", CPU) == first


def test_what_the_file_says_is_what_is_used(packed: Path, store: Store) -> None:
    spec = TransformSpec.of(store.manifest, 20)
    load_or_compute_stats(store, packed / "train", spec, "torch", CPU)
    path = _only_file(packed)
    path.write_text(json.dumps(with_checksum(without_checksum(json.loads(path.read_text())) | {"mean": [0.25]})))
    assert load_or_compute_stats(store, packed / "train", spec, "torch", CPU).mean == (0.25,)


def test_sizes_and_interpolations_are_kept_apart(packed: Path, store: Store) -> None:
    specs = [TransformSpec.of(store.manifest, *kind) for kind in ((20, "linear"), (20, "cubic"), (40, "linear"))]
    assert len({load_or_compute_stats(store, packed / "train", spec, "torch", CPU) for spec in specs}) == 3
    for spec in specs:
        assert load_or_compute_stats(store, packed / "train", spec, "torch", CPU) == compute_stats(
            store, spec, "torch", CPU
        )


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: json.dumps(
            with_checksum(without_checksum(json.loads(text)) | {"manifest": "0" * 64, "mean": [0.25]})
        ),
        lambda text: json.dumps(with_checksum({"mean": [0.25], "std": [1.0], "samples": 3})),
        lambda text: json.dumps(without_checksum(json.loads(text))),
        lambda text: json.dumps(json.loads(text) | {"mean": [0.25]}),
        lambda text: text[: len(text) // 2],
        lambda text: "",
    ],
    ids=["another pack's", "without a digest", "without a checksum", "changed", "cut", "empty"],
)
def test_a_file_that_is_not_of_this_pack_is_measured_anew(packed: Path, store: Store, spoil) -> None:
    spec = TransformSpec.of(store.manifest, 20)
    first = load_or_compute_stats(store, packed / "train", spec, "torch", CPU)
    path = _only_file(packed)
    whole = path.read_text()
    path.write_text(spoil(whole))
    assert load_or_compute_stats(store, packed / "train", spec, "torch", CPU) == first
    assert path.read_text() == whole


def test_no_flipped_bit_changes_the_statistics(packed: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = TransformSpec.of(store.manifest, 20)
    expected = load_or_compute_stats(store, packed / "train", spec, "torch", CPU)
    monkeypatch.setattr(normalization, "compute_stats", lambda *_: expected)
    monkeypatch.setattr(normalization, "write_json", lambda *_: None)
    path = _only_file(packed)
    content = path.read_bytes()
    for bit in range(0, 8 * len(content), 11):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        assert load_or_compute_stats(store, packed / "train", spec, "torch", CPU) == expected


def test_a_place_that_cannot_be_written_only_warns(
    packed: Path, store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(path: Path, content: str) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(normalization, "write_json", refuse)
    spec = TransformSpec.of(store.manifest, 20)
    with caplog.at_level(logging.WARNING):
        assert load_or_compute_stats(store, packed / "train", spec, "torch", CPU) == compute_stats(
            store, spec, "torch", CPU
        )
    assert "Permission denied" in caplog.text
    assert "computed again" in caplog.text


def _must_not_measure(*arguments: object) -> DatasetStats:
    raise AssertionError("computed again")


def _only_file(packed: Path) -> Path:
    (path,) = (packed / "train" / "statistics").iterdir()
    return path
