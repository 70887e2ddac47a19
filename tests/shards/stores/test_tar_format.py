"""The shards are plain WebDataset tars: others read them, and the same input gives the same bytes."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from conftest import pack_splits, synthetic_splits
from nvidia.dali import fn, pipeline_def
from support.version_2 import downgrade
from wds2idx import IndexCreator

import pipeline.packing.pack
from pipeline.packing.pack import DEFAULT_BLOCK_SIZE
from shards import Manifest, open_split
from shards.errors import CorruptError
from shards.stores.base import Store, block_key
from shards.stores.tar import COMPONENTS, read_block_index

BLOCK_SIZE = 32


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 colour images in shards of two blocks of 32: five shards, the last block of 12."""
    return pack_small(tmp_path_factory.mktemp("format") / "set", seed=0)


def pack_small(out: Path, seed: int) -> Path:
    parts = synthetic_splits(train=300, test=40, shape=(12, 10, 3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.packing.pack, "SHARD_BYTES", 2 * BLOCK_SIZE * 12 * 10 * 3)
        return pack_splits(parts, out, block_size=BLOCK_SIZE, seed=seed)


def tars(packed: Path) -> list[Path]:
    return sorted((packed / "train").glob("*.tar"))


def blocks_of(store: Store) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Images, labels and rows of each block, as the store gives them."""
    blocks = []
    for start in range(0, len(store), BLOCK_SIZE):
        samples = np.arange(start, min(start + BLOCK_SIZE, len(store)))
        images = np.empty((len(samples), *store.manifest.image_shape), np.uint8)
        store.gather(samples, images)
        blocks.append((images, store.labels[samples], store.rows[samples]))
    return blocks


def assert_blocks_equal(found: list[tuple], expected: list[tuple]) -> None:
    assert len(found) == len(expected)
    for found_arrays, expected_arrays in zip(found, expected, strict=True):
        for one, other in zip(found_arrays, expected_arrays, strict=True):
            np.testing.assert_array_equal(one, other)


def test_index_is_what_dali_makes(packed: Path, tmp_path: Path) -> None:
    assert len(tars(packed)) == 5
    for tar in tars(packed):
        made_by_dali = tmp_path / f"{tar.stem}.idx"
        with IndexCreator(str(tar), str(made_by_dali), verbose=False) as creator:
            creator.create_index()
        assert tar.with_suffix(".idx").read_bytes() == made_by_dali.read_bytes()


def test_index_gives_the_places_of_the_arrays(packed: Path) -> None:
    for tar in tars(packed):
        content = tar.read_bytes()
        with tarfile.open(tar) as archive:
            members = {member.name: archive.extractfile(member).read() for member in archive}
        first = int(min(members)[:8])
        for number, block in enumerate(read_block_index(tar.with_suffix(".idx").read_bytes()), start=first):
            for component, (offset, size) in zip(COMPONENTS, block, strict=True):
                expected = members.pop(f"{block_key(number)}.{component}")
                assert content[offset : offset + size] == expected
        assert not members


def test_webdataset_reads_what_the_store_reads(packed: Path) -> None:
    dataset = webdataset.WebDataset([str(tar) for tar in tars(packed)], shardshuffle=False).decode()
    samples = list(dataset)
    assert [sample["__key__"] for sample in samples] == [block_key(number) for number in range(10)]
    found = [tuple(sample[component] for component in COMPONENTS) for sample in samples]
    assert_blocks_equal(found, blocks_of(open_split(packed, "train")))


@pipeline_def(batch_size=1, num_threads=1, device_id=None)
def reading(paths: list[str], index_paths: list[str]):
    raw = fn.readers.webdataset(
        paths=paths, index_paths=index_paths, ext=list(COMPONENTS), missing_component_behavior="error", name="reader"
    )
    return tuple(fn.decoders.numpy(component) for component in raw)


def test_dali_reads_what_the_store_reads(packed: Path) -> None:
    paths = [str(tar) for tar in tars(packed)]
    graph = reading(paths, [path.removesuffix("tar") + "idx" for path in paths])
    graph.build()
    assert graph.epoch_size("reader") == 10
    found = [tuple(np.array(output[0]) for output in graph.run()) for _ in range(10)]
    assert_blocks_equal(found, blocks_of(open_split(packed, "train")))


def test_tar_lists_and_extracts_a_shard(packed: Path, tmp_path: Path) -> None:
    tar = tars(packed)[-1]
    listed = subprocess.run(["tar", "tf", tar], capture_output=True, text=True, check=True)
    assert listed.stdout.split() == [f"{block_key(n)}.{component}" for n in (8, 9) for component in COMPONENTS]
    assert listed.stderr == ""
    subprocess.run(["tar", "xf", tar, "-C", tmp_path, "00000009.rows.npy"], check=True)
    np.testing.assert_array_equal(np.load(tmp_path / "00000009.rows.npy"), open_split(packed, "train").rows[9 * 32 :])


def test_members_have_a_fixed_date_owner_and_mode(packed: Path) -> None:
    for tar in tars(packed):
        with tarfile.open(tar) as archive:
            for member in archive:
                assert (member.mtime, member.mode, member.type) == (0, 0o444, tarfile.REGTYPE)
                assert (member.uid, member.gid, member.uname, member.gname) == (0, 0, "", "")
                assert not member.pax_headers


def test_blocks_are_numbered_through_the_part(packed: Path) -> None:
    keys = []
    for tar in tars(packed):
        with tarfile.open(tar) as archive:
            keys += [member.name.partition(".")[0] for member in archive]
    assert [key for key, _ in itertools.groupby(keys)] == [block_key(number) for number in range(10)]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (b"'descr': '|u1'", b"'descr': '|i1'", "images.npy is not the array that the manifest describes"),
        (b"'shape': (32,)", b"'shape': (31,)", "labels.npy is not the array that the manifest describes"),
        (None, b"\5", "a label outside 0 .. 4"),
    ],
    ids=["another type", "fewer labels", "a label"],
)
def test_a_block_of_version_2_of_the_right_size_that_is_another_is_refused(
    packed: Path, tmp_path: Path, old: bytes | None, new: bytes, words: str
) -> None:
    train = downgrade(Path(shutil.copytree(packed, tmp_path / "set")) / "train")
    path = train / "shard-00001.tar"
    content = path.read_bytes()
    (_, (labels, size), _), *_ = read_block_index(path.with_suffix(".idx").read_bytes()).tolist()
    place = content.index(old) if old else labels + size - 32 * 8
    path.write_bytes(content[:place] + new + content[place + len(new) :])
    with pytest.raises(CorruptError) as caught:
        open_split(train.parent, "train")
    assert caught.value.found == f"{path}: block {block_key(2)}: {words}"


def contents(packed: Path) -> dict[str, bytes]:
    return {str(path.relative_to(packed)): path.read_bytes() for path in packed.rglob("*") if path.is_file()}


def test_same_input_and_seed_give_the_same_bytes(packed: Path, tmp_path: Path) -> None:
    first = contents(packed)
    assert {Path(name).suffix for name in first} == {".tar", ".idx", ".json", ".npy"}
    assert contents(pack_small(tmp_path / "again", seed=0)) == first


def test_another_seed_gives_other_bytes_of_the_same_samples(packed: Path, tmp_path: Path) -> None:
    first, other = contents(packed), contents(pack_small(tmp_path / "other", seed=1))
    assert first.keys() == other.keys()
    for name in first:
        # Where the blocks lie does not depend on what is in them.
        assert (first[name] == other[name]) == name.endswith(".idx"), name
    assert Manifest.read(packed / "train").counts == Manifest.read(tmp_path / "other" / "train").counts


def test_train_and_test_parts_of_a_seed_are_permuted_differently(tmp_path: Path) -> None:
    out = pack_splits(synthetic_splits(train=200, test=200), tmp_path / "set")
    assert open_split(out, "train").rows.tolist() != open_split(out, "test").rows.tolist()


def test_small_images_take_at_most_four_percent_more_than_their_pixels(tmp_path: Path) -> None:
    """Of 28x28 images with the default blocks; the index, the arrays and the manifest count too."""
    out = pack_splits(synthetic_splits(train=10_000, test=1), tmp_path / "set", block_size=DEFAULT_BLOCK_SIZE)
    on_disk = sum(path.stat().st_size for path in (out / "train").iterdir())
    assert 1.0 < on_disk / (10_000 * 784) <= 1.04
