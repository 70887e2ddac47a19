"""Records of one picture each: what was packed is what is read, others read it, and damage is named."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from conftest import assert_user_error, run_module
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nvidia.dali import fn, pipeline_def
from support.raw_files import refusal
from support.synthetic_records import FORMATS, image_splits, pack_pictures
from support.version_2 import downgrade
from wds2idx import IndexCreator

from pipeline.readers.raw_split import RawSplit
from shards import Manifest, UserError, open_split
from shards.manifest import ARRAYS, MANIFEST_NAME
from shards.open import open_files
from shards.stores.base import Block, EncodedImage, Layout, Store
from shards.stores.image_header import MAX_BYTES
from shards.stores.record_index import check_within
from shards.stores.records import RecordStore, RecordWriter
from shards.stores.sample_arrays import array_dtypes, write_array
from shards.verify.check import check_split


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 + 40 pictures in four formats, two classes, 50 to a shard. Not to be changed."""
    return pack_pictures(tmp_path_factory.mktemp("records") / "set")


@pytest.fixture(scope="module")
def raw() -> RawSplit:
    return image_splits()[0]


@pytest.fixture(scope="module")
def store(packed: Path) -> Store:
    return open_split(packed, "train")


@pytest.fixture
def old(copy: Path) -> Path:
    """The train part in version 2, to be damaged."""
    return downgrade(copy)


@pytest.fixture
def copy(packed: Path, tmp_path: Path) -> Path:
    """The train part, to be damaged."""
    return Path(shutil.copytree(packed / "train", tmp_path / "train"))


def files_of(store: Store, samples: np.ndarray) -> list[bytes]:
    return [image.tobytes() for image in store.read(samples)]


class TestStore:
    """The contract of `Store`, for picture files."""

    def test_manifest_tells_of_the_raw_part(self, store: Store, raw: RawSplit) -> None:
        manifest = store.manifest
        assert (manifest.store, manifest.encoded, manifest.block_size) == ("records", True, 1)
        assert manifest.image_shape == (None, None, 3)
        assert manifest.classes == raw.classes
        assert manifest.counts == tuple(np.bincount(raw.labels))
        assert [shard.samples for shard in manifest.shards] == [50, 50, 20]
        assert isinstance(store, RecordStore)

    def test_every_row_is_there_once_with_its_label(self, store: Store, raw: RawSplit) -> None:
        assert len(store) == 120
        assert (store.rows.dtype, store.labels.dtype) == (np.uint32, np.uint8)
        np.testing.assert_array_equal(np.sort(store.rows), np.arange(120))
        np.testing.assert_array_equal(store.labels, raw.labels[store.rows])

    def test_order_at_rest_is_shuffled(self, store: Store) -> None:
        assert set(store.labels[:15]) == {0, 1}

    @pytest.mark.parametrize(
        "samples",
        [
            np.arange(120),
            np.arange(120)[::-1],
            np.random.default_rng(0).integers(0, 120, 400),
            np.array([119, 0, 50, 0]),
            np.array([], np.int64),
        ],
        ids=["all", "backwards", "at random with repeats", "across shards", "none"],
    )
    def test_pictures_are_those_of_the_rows(self, store: Store, raw: RawSplit, samples: np.ndarray) -> None:
        images = store.read(samples)
        assert all(image.dtype == np.uint8 and image.ndim == 1 for image in images)
        assert [image.tobytes() for image in images] == [file.content for file in raw.read(store.rows[samples])]

    @pytest.mark.parametrize("outside", [-1, 120, 10**9])
    def test_a_position_outside_raises_index_error(self, store: Store, outside: int) -> None:
        with pytest.raises(IndexError, match=str(outside)):
            store.read(np.array([0, outside, 1]))

    def test_what_was_read_cannot_change_the_store(self, store: Store) -> None:
        with pytest.raises(ValueError, match="read-only"):
            store.read(np.array([0]))[0][:] = 0

    def test_a_place_names_shard_and_file(self, store: Store, packed: Path, raw: RawSplit) -> None:
        for sample in (0, 49, 50, 119):
            extension = raw.read(store.rows[[sample]])[0].extension
            expected = packed / "train" / f"shard-{sample // 50:05d}.tar"
            assert store.describe_sample(sample) == f"{expected}: {sample:08d}.{extension}"

    def test_reading_again_opens_no_file(self, store: Store) -> None:
        store.read(np.arange(120))
        before = len(os.listdir("/proc/self/fd"))
        store.read(np.arange(120))
        assert len(os.listdir("/proc/self/fd")) == before


extensions = st.sampled_from(["jpg", "png", "webp", "bmp", "jpeg"])
records = st.tuples(st.binary(min_size=1, max_size=1500), extensions, st.integers(0, 10**17), st.integers(0, 10**17))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(samples=st.lists(records, min_size=1, max_size=40), shard_size=st.integers(1, 45))
def test_what_is_written_is_read(samples: list[tuple[bytes, str, int, int]], shard_size: int) -> None:
    """Whatever the bytes, in however many shards, handed over in blocks of any size."""
    contents, kinds, labels, rows = zip(*samples, strict=True)
    classes = sorted(set(labels))
    labels, rows = np.searchsorted(classes, labels), np.array(rows)
    files = list(map(EncodedImage, contents, kinds))
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        layout = Layout(len(samples), (None, None, 3), 1, shard_size)
        written = []
        for number in range(layout.shards):
            places = layout.samples_of(number)
            blocks = [
                Block(first, [files[i] for i in several], labels[several], rows[several])
                for first in range(places.start, places.stop, 7)
                if len(several := np.arange(first, min(first + 7, places.stop)))
            ]
            written.append(RecordWriter(directory, layout).write_shard(number, blocks))
        manifest = manifest_of(written, len(samples), np.bincount(labels, minlength=len(classes)))
        contents_of_version_3 = (labels, rows, np.concatenate([each.blocks for each in written]))
        each = zip(ARRAYS, array_dtypes(len(classes), rows.max()), contents_of_version_3, strict=True)
        arrays = [write_array(directory / name, dtype, len(values), [values]) for name, dtype, values in each]
        store = open_files(directory, manifest.model_copy(update={"files": (*manifest.files, *arrays), "version": 3}))
        assert files_of(store, np.arange(len(samples))) == list(contents)
        assert store.labels.tolist() == labels.tolist()
        assert store.rows.tolist() == rows.tolist()


def manifest_of(written: list, samples: int, counts: np.ndarray) -> Manifest:
    return Manifest(
        store="records",
        dataset="written",
        variant="",
        split="train",
        classes=tuple(map(str, range(len(counts)))),
        counts=tuple(counts.tolist()),
        image_shape=(None, None, 3),
        transposed=False,
        samples=samples,
        block_size=1,
        seed=0,
        version=2,
        shards=tuple(each.shard for each in written),
        files=tuple(file for each in written for file in each.files),
        raw=(),
        versions={},
    )


def tars(packed: Path) -> list[Path]:
    return sorted((packed / "train").glob("*.tar"))


def test_index_is_what_dali_makes(packed: Path, tmp_path: Path) -> None:
    for tar in tars(packed):
        made_by_dali = tmp_path / f"{tar.stem}.idx"
        with IndexCreator(str(tar), str(made_by_dali), verbose=False) as creator:
            creator.create_index()
        assert tar.with_suffix(".idx").read_bytes() == made_by_dali.read_bytes()


def test_webdataset_reads_what_the_store_reads(packed: Path, store: Store) -> None:
    samples = list(webdataset.WebDataset([str(tar) for tar in tars(packed)], shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [f"{number:08d}" for number in range(120)]
    pictures = [next(sample[extension] for extension in FORMATS if extension in sample) for sample in samples]
    assert pictures == files_of(store, np.arange(120))
    decoded = webdataset.WebDataset([str(tar) for tar in tars(packed)], shardshuffle=False).decode()
    assert [sample["cls"] for sample in decoded] == store.labels.tolist()
    assert [int(sample["row"]) for sample in samples] == store.rows.tolist()


@pipeline_def(batch_size=1, num_threads=1, device_id=None)
def reading(paths: list[str], index_paths: list[str]):
    return tuple(
        fn.readers.webdataset(
            paths=paths,
            index_paths=index_paths,
            ext=[";".join(FORMATS), "cls", "row"],
            missing_component_behavior="error",
            name="reader",
        )
    )


def test_dali_reads_what_the_store_reads(packed: Path, store: Store) -> None:
    paths = [str(tar) for tar in tars(packed)]
    graph = reading(paths, [path.removesuffix("tar") + "idx" for path in paths])
    graph.build()
    found = [[np.array(output[0]).tobytes() for output in graph.run()] for _ in range(graph.epoch_size("reader"))]
    pictures, labels, rows = map(list, zip(*found, strict=True))
    assert pictures == files_of(store, np.arange(120))
    assert [int(label) for label in labels] == store.labels.tolist()
    assert [int(row) for row in rows] == store.rows.tolist()


def test_tar_lists_a_shard_whose_members_have_a_fixed_date_owner_and_mode(packed: Path) -> None:
    tar = tars(packed)[-1]
    listed = subprocess.run(["tar", "tf", tar], capture_output=True, text=True, check=True)
    assert listed.stderr == ""
    with tarfile.open(tar) as archive:
        members = archive.getmembers()
    assert [member.name for member in members] == listed.stdout.split()
    keys = [key for key, _ in itertools.groupby(member.name.partition(".")[0] for member in members)]
    assert keys == [f"{number:08d}" for number in range(100, 120)]
    for member in members:
        assert (member.mtime, member.mode, member.type) == (0, 0o444, tarfile.REGTYPE)
        assert (member.uid, member.gid, member.uname, member.gname) == (0, 0, "", "")
        assert not member.pax_headers


def test_same_input_gives_the_same_bytes_by_any_number_of_workers(packed: Path, tmp_path: Path) -> None:
    again = pack_pictures(tmp_path / "again", workers=3)
    for path in packed.rglob("*"):
        if path.is_file():
            assert (again / path.relative_to(packed)).read_bytes() == path.read_bytes(), path


# Damage.


def faults_of(part: Path) -> list[str]:
    return check_split(part)[1]


def agree(part: Path) -> None:
    """Let the manifest tell of the files as they are, as someone who means harm would."""
    manifest = Manifest.read(part)
    fields = {
        name: tuple(
            entry.model_copy(update={"bytes": (part / entry.name).stat().st_size, "sha256": digest(part / entry.name)})
            for entry in getattr(manifest, name)
        )
        for name in ("shards", "files")
    }
    manifest.model_copy(update=fields).write(part)


def digest(path: Path) -> str:
    """SHA-256, of small files only."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.stat().st_size < 1 << 24 else "0" * 64


def replace(path: Path, old: bytes, new: bytes) -> None:
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new, 1))


def open_damaged(part: Path) -> UserError:
    return refusal(lambda: open_files(part, Manifest.read(part)))


def test_a_whole_pack_has_no_faults(packed: Path) -> None:
    assert faults_of(packed / "train") == faults_of(packed / "test") == []
    process = run_module("shards.verify", packed)
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize("suffix", [".tar", ".idx"])
@pytest.mark.parametrize("change", ["missing", "empty", "cut off", "longer"])
def test_a_missing_or_shorter_file_of_version_2_is_refused_and_named(old: Path, suffix: str, change: str) -> None:
    path = old / f"shard-00001{suffix}"
    content = path.read_bytes()
    path.write_bytes(
        {"empty": b"", "cut off": content[: len(content) // 2], "longer": content + b"\0"}.get(change, b"")
    )
    if change == "missing":
        path.unlink()
    assert path.name in open_damaged(old).found
    assert any(path.name in fault for fault in faults_of(old))


def test_a_flipped_byte_of_a_picture_names_shard_and_record(copy: Path, store: Store) -> None:
    path = copy / "shard-00001.tar"
    with tarfile.open(path) as archive:
        png = next(member for member in archive if member.name.endswith(".png"))
    content = bytearray(path.read_bytes())
    content[png.offset_data + png.size // 2] ^= 0x10
    path.write_bytes(content)
    faults = "\n".join(faults_of(copy))
    assert f"{path}: record {png.name.removesuffix('.png')}: a picture that cannot be decoded" in faults
    assert "shard-00000" not in faults and "shard-00002" not in faults


@pytest.mark.parametrize(
    ("component", "text", "words"),
    [
        ("cls", b"x", "b'x'"),
        ("cls", b"-", "b'-'"),
        ("cls", b"7", "label 7 outside 0 .. 1"),
        ("row", b"~", "b'~"),
    ],
)
def test_a_label_or_row_of_version_2_that_is_none_names_the_record(
    old: Path, component: str, text: bytes, words: str
) -> None:
    path = old / "shard-00001.tar"
    with tarfile.open(path) as archive:
        member = archive.getmember(f"00000061.{component}")
    content = bytearray(path.read_bytes())
    content[member.offset_data : member.offset_data + 1] = text
    path.write_bytes(content)
    error = open_damaged(old)
    assert f"{path}: 00000061." in error.found
    assert words in error.found
    assert any(f"{path}: record 00000061: " in fault for fault in faults_of(old))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"v1.2 50", b"v1.1 50"),
        (b"v1.2 50", b"v1.2 49"),
        (b"v1.2 50", b"v1.2 5000000000"),
        (b" cls ", b" txt "),
        (b" row ", b" raw "),
        (b" cls ", b" cls  "),
        (b" cls 1", b" cls -1"),
        (b" cls 1", b" cls 99999999999999999999"),
        (b" cls 1", b" cls 999999999999"),
        (b" cls 1", b" cls 1e3"),
        (b"\n", b"\n\n"),
        (b" cls ", b" cl\xff "),
        (b" cls ", b"\ncls "),
    ],
)
def test_an_index_of_version_2_that_does_not_fit_is_refused_and_named(copy: Path, old: bytes, new: bytes) -> None:
    """The manifest agrees in size, so that only the content can tell."""
    split = downgrade(copy)
    path = split / "shard-00001.idx"
    replace(path, old, new)
    agree(split)
    assert "shard-00001.idx" in open_damaged(split).found
    assert any("shard-00001.idx" in fault for fault in faults_of(split))


def test_a_record_of_version_2_that_claims_gigabytes_is_refused_before_it_is_read(old: Path) -> None:
    path = old / "shard-00001.tar"
    os.truncate(path, 4 << 30)  # a hole, which takes no room
    index = path.with_suffix(".idx")
    component, offset, size, *_ = index.read_text().splitlines()[1].split()
    replace(index, f"{component} {offset} {size} ".encode(), f"{component} {offset} {3 << 30} ".encode())
    agree(old)
    assert f"more than {MAX_BYTES:,}" in open_damaged(old).found


@pytest.mark.parametrize("name", ["shard-00002.tar", "shard-00002.idx"])
def test_any_flipped_byte_is_found_and_never_a_traceback(copy: Path, name: str) -> None:
    path = copy / name
    content = path.read_bytes()
    for place in range(0, len(content), 3 if name.endswith(".idx") else 127):
        changed = bytearray(content)
        changed[place] ^= 0x11
        path.write_bytes(changed)
        try:
            files_of(open_files(copy, Manifest.read(copy)), np.arange(120))
        except UserError as error:
            assert "shard-00002" in error.found
    path.write_bytes(changed)
    assert any(name in fault for fault in faults_of(copy))


def test_a_shard_that_shrinks_while_it_is_used_is_named(copy: Path) -> None:
    store = open_files(copy, Manifest.read(copy))
    path = copy / "shard-00001.tar"
    os.truncate(path, 3000)
    error = refusal(lambda: store.read(np.arange(40, 60)))
    assert error.found.startswith(f"{path}, which was replaced, changed or removed")
    path.unlink()
    assert str(path) in refusal(lambda: store.read(np.arange(40, 60))).found


def test_shards_of_version_2_with_rows_and_without_do_not_go_together(old: Path) -> None:
    index = old / "shard-00001.idx"
    lines = index.read_text().splitlines()
    without = "\n".join([lines[0], *(" ".join(line.split()[:8]) for line in lines[1:]), ""])
    index.write_text(without)
    agree(old)
    assert "shards with rows and shards without" in open_damaged(old).found


def test_a_row_of_version_2_that_comes_twice_is_found(old: Path) -> None:
    path = old / "shard-00000.tar"
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as archive:
        rows = [member for member in archive if member.name.endswith(".row")]
    first, second = next(two for two in itertools.combinations(rows, 2) if two[0].size == two[1].size)
    content[first.offset_data : first.offset_data + first.size] = content[second.offset_data :][: second.size]
    path.write_bytes(content)
    agree(old)
    assert faults_of(old) == [f"{old}: a source row is packed twice"]


def test_a_manifest_that_claims_another_store_is_refused(copy: Path) -> None:
    path = copy / MANIFEST_NAME
    manifest = json.loads(path.read_text()) | {"store": "tar"}
    del manifest["sha256"]  # else its checksum is what refuses it
    path.write_text(json.dumps(manifest))
    assert "in a store of tar" in refusal(lambda: Manifest.read(copy)).found


def test_the_command_names_damage_and_says_what_to_do(copy: Path) -> None:
    (copy / "shard-00001.idx").unlink()
    assert_user_error(run_module("shards.verify", copy), "shard-00001.idx", "missing")


@pytest.mark.parametrize(
    ("offset", "size", "inside"),
    [(0, 10, True), (9, 1, True), (0, 11, False), (1, 10, False), (10, 1, False), (-1, 5, False), (3, 0, False)],
)
def test_byte_ranges_are_not_empty_and_end_inside_the_shard(offset: int, size: int, inside: bool) -> None:
    ranges = np.array([[[4, 2], [offset, size]]])
    if inside:
        check_within(ranges, 10)
    else:
        with pytest.raises(ValueError, match="outside the 10 bytes"):
            check_within(ranges, 10)
