"""Shards that others have written: found out without trusting them, indexed beside, and trained on as they are."""

from __future__ import annotations

import errno
import gzip
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any, NoReturn

import numpy as np
import pytest
from conftest import ROOT, assert_user_error, pack_splits, run_module, synthetic_splits
from hypothesis import given, settings
from hypothesis import strategies as st
from support.raw_files import picture, pixels, refusal
from support.synthetic_records import foreign_samples, foreign_set, synthetic_file, write_foreign
from support.version_2 import downgrade
from wds2idx import IndexCreator
from webdataset.tariterators import base_plus_ext

import shards.index
from shards import Manifest, UserError, open_split
from shards.index import index, main, read_classes
from shards.manifest import ARRAYS, SPLITS
from shards.open import open_store
from shards.stores.base import Store
from shards.stores.image_header import MAX_BYTES
from shards.stores.record_index import index_content, index_line, name_in_index, read_component_ranges, split_name
from shards.stores.tar_members import Member, read_members
from shards.verify.check import check_split

PICTURE = picture(pixels(5, 7, 3))
LABEL = b"1"


@pytest.fixture(scope="module")
def indexed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 + 20 samples in shards of 25 by webdataset's own writer, indexed. Not to be changed."""
    out = foreign_set(tmp_path_factory.mktemp("foreign") / "birds")
    index(out, None)
    return out


def members_by_tarfile(path: Path) -> list[Member]:
    with tarfile.open(path) as archive:
        return [Member(member.name, member.offset_data, member.size) for member in archive if member.isreg()]


def tar(*members: tuple[str, bytes] | tarfile.TarInfo, form: int = tarfile.USTAR_FORMAT) -> bytes:
    """A tar file of files (name and content) and of what else a TarInfo may be."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                archive.addfile(info, io.BytesIO(member[1]))
    return file.getvalue()


def special(name: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    info.linkname = "/etc/passwd"
    return info


def part(directory: Path, *shards: bytes) -> Path:
    directory.mkdir(parents=True)
    for number, content in enumerate(shards):
        (directory / f"{number}.tar").write_bytes(content)
    return directory


def digests(directory: Path) -> set[tuple[str, str]]:
    return {(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in directory.rglob("*.tar")}


# The members of a tar file.

names = st.text(
    st.characters(codec="utf-8", exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=150
)


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["GNU", "PAX"])
def test_names_longer_than_a_block_are_read(tmp_path: Path, form: int) -> None:
    """The extended header of a name then takes several blocks, at a place that is a multiple of few of them."""
    path = part(tmp_path / "part", tar(*((f"{n}" * 700 + ".jpg", b"abc") for n in range(3)), form=form)) / "0.tar"
    assert [(member.name, member.size) for member in read_members(path)] == [
        (f"{n}" * 700 + ".jpg", 3) for n in range(3)
    ]
    assert list(read_members(path)) == members_by_tarfile(path)


def test_an_extended_header_has_at_most_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shards.stores.tar_members._MAX_EXTENDED_HEADER", 600)
    allowed, refused = (
        part(tmp_path / str(length), tar(("a" * length, b"abc"), form=tarfile.GNU_FORMAT)) / "0.tar"
        for length in (599, 600)  # a byte ends the name
    )
    assert [member.name for member in read_members(allowed)] == ["a" * 599]
    error = refusal(lambda: list(read_members(refused)))
    assert "an extended header of 601 bytes, more than 600" in error.found


@settings(max_examples=150)
@given(
    files=st.lists(st.tuples(names.filter(lambda name: name[-1] != "/"), st.binary(max_size=1200)), max_size=8),
    form=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    mtime=st.floats(0, 2e9),
)
def test_members_are_those_that_tarfile_finds(
    tmp_path_factory: pytest.TempPathFactory, files: list[tuple[str, bytes]], form: int, mtime: float
) -> None:
    path = tmp_path_factory.mktemp("tar") / "a.tar"
    with tarfile.open(path, "w", format=form) as archive:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), mtime if form == tarfile.PAX_FORMAT else int(mtime)
            archive.addfile(info, io.BytesIO(content))
    assert list(read_members(path)) == members_by_tarfile(path)


def records(*numbers: int) -> list[tuple[str, bytes]]:
    return [member for n in numbers for member in ((f"{n}.jpg", PICTURE), (f"{n}.cls", b"%d" % (n % 2)))]


@pytest.mark.parametrize("zeros", [0, 512, 9000])
def test_records_behind_the_end_of_a_tar_are_read(tmp_path: Path, zeros: int) -> None:
    """As `cat a.tar b.tar`, `tar -A` with `-i`, and appends leave them."""
    directory = part(tmp_path / "train", tar(*records(0, 1)) + bytes(zeros // 512 * 512) + tar(*records(2, 3, 4)))
    assert index(directory, None)[0].counts == (3, 2)
    store = open_store(directory)
    assert store.labels.tolist() == [0, 1, 0, 1, 0]
    assert all(image.tobytes() == PICTURE for image in store.read(np.arange(5)))
    assert check_split(directory)[1] == []


@pytest.mark.parametrize(
    "behind, words",
    [
        (b"garbage", "ends inside a header"),
        (b"x" * 600, "damaged header"),
        (tar(*records(2, 3))[:600], "claims"),
        (tar(*records(1)), "comes twice"),
        (tar(("1.png", PICTURE)), "several pictures"),
        (tar(("2.jpg", PICTURE)), "no label"),
    ],
    ids=["garbage", "block of garbage", "interrupted append", "same key", "key across the border", "half a record"],
)
def test_what_follows_the_end_of_a_tar_is_never_ignored(tmp_path: Path, behind: bytes, words: str) -> None:
    directory = part(tmp_path / "train", tar(*records(0, 1)) + behind)
    error = refusal(lambda: index(directory, None))
    assert str(directory / "0.tar") in error.found and words in error.found
    assert_nothing_written(directory)


def test_directories_are_passed_over_and_ustar_prefixes_put_together(tmp_path: Path) -> None:
    long = "/".join(["directory"] * 20) + "/a.jpg"
    content = tar(special("n01/", tarfile.DIRTYPE), (long, b"1"), ("n01/b.cls", b""))
    path = part(tmp_path / "part", content) / "0.tar"
    assert [member.name for member in read_members(path)] == [long, "n01/b.cls"]


def test_sizes_of_base_256_are_read(tmp_path: Path) -> None:
    content = bytearray(tar(("a.jpg", b"abc")))
    content[124:136] = b"\x80" + (3).to_bytes(11, "big")
    content[148:156] = b"%06o\0 " % (sum(content[:148]) + 8 * 32 + sum(content[156:512]))
    path = part(tmp_path / "part", bytes(content)) / "0.tar"
    assert list(read_members(path)) == [Member("a.jpg", 512, 3)] == members_by_tarfile(path)


@given(names)
def test_names_are_divided_as_webdataset_divides_them(name: str) -> None:
    """But for names that hold a line break, which its pattern does not expect, and those that end in a dot."""
    if "\n" in name or name.endswith("."):
        return
    key, component = base_plus_ext(name)
    if key is None or name.startswith("__"):
        return
    assert split_name(name) == (key, component.lower())


@pytest.mark.parametrize(
    ("name", "divided"),
    [
        ("a.jpg", ("a", "jpg")),
        ("n01.b/c/d.seg.PNG", ("n01.b/c/d", "seg.png")),
        ("a b.JPEG", ("a b", "jpeg")),
        ("./a.cls", ("./a", "cls")),
        (".DS_Store", None),
        ("n01/._a.jpg", None),
        ("README", None),
        ("a.", None),
        ("__info__.json", ("__info__", "json")),
        ("__meta__/a.jpg", None),
        ("__meta__", None),
    ],
)
def test_names_that_belong_to_no_record_are_passed_over(name: str, divided: tuple[str, str] | None) -> None:
    assert split_name(name) == divided


member_places = st.tuples(st.integers(0, 2**62), st.integers(0, 2**40))


@given(
    st.lists(st.tuples(names, member_places, member_places), min_size=1, max_size=6),
    st.sampled_from(["jpg", "jpeg", "png", "webp", "bmp", "left.png"]),
    st.sampled_from(["cls", "cls.txt"]),
)
def test_an_index_keeps_places_whatever_the_names(records: list[tuple], picture: str, label: str) -> None:
    lines = []
    for name, *places in records:
        components = zip((picture, label), places, strict=True)
        lines.append(index_line({kind: Member(f"{name}.{kind}", *place) for kind, place in components}))
    content = index_content(lines)
    found = read_component_ranges(content)
    assert found.tolist() == [[list(place) for place in places] for _, *places in records]
    assert name_in_index(content, len(records) - 1).endswith(f".{picture}")


# Whole sets.


def assert_is(store: Store, samples: list[dict]) -> None:
    """A store holds the pictures and labels of webdataset samples, in order."""
    kinds = ("jpg", "png", "webp", "bmp")
    expected = [next(sample[kind] for kind in kinds if kind in sample) for sample in samples]
    assert [image.tobytes() for image in store.read(np.arange(len(store)))] == expected
    assert store.labels.tolist() == [sample["cls"] for sample in samples]
    assert store.rows.tolist() == list(range(len(samples)))


def test_what_webdataset_wrote_is_read(indexed: Path) -> None:
    for name, count in (("train", 60), ("test", 20)):
        store = open_split(indexed, name)
        assert_is(store, foreign_samples(count))
        manifest = store.manifest
        assert (manifest.name, manifest.split, manifest.classes) == ("birds", name, ("0", "1"))
        assert manifest.counts == (count // 2, count // 2)
        assert manifest.image_shape == (None, None, 3)
        assert check_split(indexed / name)[1] == []
    assert [shard.samples for shard in open_split(indexed, "train").manifest.shards] == [25, 25, 10]


def test_shards_stay_as_they_are_and_only_indices_arrays_and_manifests_come(tmp_path: Path) -> None:
    out = foreign_set(tmp_path / "set")
    before = digests(out)
    index(out, None)
    assert digests(out) == before
    assert {path.suffix for path in out.rglob("*") if path.is_file()} == {".tar", ".idx", ".json", ".npy"}
    assert sorted(path.name for path in (out / "test").iterdir()) == sorted(
        ["manifest.json", "s-00000.idx", "s-00000.tar", *ARRAYS]
    )


@pytest.mark.parametrize("options", [{}, {"mtime": 0}, {"mtime": 1.5, "user": "someone"}], ids=["now", "no PAX", "PAX"])
def test_whatever_the_writers_options(tmp_path: Path, options: dict) -> None:
    samples = foreign_samples(12)
    samples[3]["__key__"] = "n00/" + "long" * 50
    samples[4]["__key__"] = "ñandú/a b%20c"
    directory = write_foreign(tmp_path / "train", samples, **options)
    index(directory, None)
    assert_is(open_store(directory), samples)
    assert check_split(directory)[1] == []


def test_indices_are_those_of_wds2idx_which_are_kept(tmp_path: Path) -> None:
    out = foreign_set(tmp_path / "set")
    by_dali = {}
    for path in out.rglob("*.tar"):
        with IndexCreator(str(path), str(path.with_suffix(".idx")), verbose=False) as creator:
            creator.create_index()
        by_dali[path.with_suffix(".idx")] = path.with_suffix(".idx").read_bytes()
    index(out, None)
    assert all(path.read_bytes() == content for path, content in by_dali.items())
    for path in by_dali:
        path.unlink()
        (path.parent / "manifest.json").unlink(missing_ok=True)
    index(out, None)
    assert {path: path.read_bytes() for path in by_dali} == by_dali


def test_an_index_with_capitals_that_says_the_same_is_kept(tmp_path: Path) -> None:
    directory = part(tmp_path / "train", tar(("a.JPG", PICTURE), ("a.CLS", LABEL)))
    path = directory / "0.idx"
    path.write_text(f"v1.2 1\nJPG 512 {len(PICTURE)} a.JPG CLS 1536 1 a.CLS\n")
    before = path.read_bytes()
    index(directory, None)
    assert path.read_bytes() == before
    assert open_store(directory).labels.tolist() == [1]


@pytest.mark.parametrize(
    "old", ["v1.1 1\njpg 512 9 cls 1536 1\n", "", "v1.2 1\njpg 512 8 a.jpg cls 1536 1 a.cls\n", "\xff"]
)
def test_an_index_that_says_something_else_is_in_the_way(tmp_path: Path, old: str) -> None:
    directory = part(tmp_path / "train", tar(("a.jpg", PICTURE), ("a.cls", LABEL)))
    (directory / "0.idx").write_bytes(old.encode("latin-1"))
    error = refusal(lambda: index(directory, None))
    assert str(directory / "0.idx") in error.found
    assert error.hint.endswith(f"rm {directory / '0.idx'}")
    assert (directory / "0.idx").read_bytes() == old.encode("latin-1")
    assert not (directory / "manifest.json").exists()


def test_a_complete_index_on_a_read_only_disk_needs_no_lock(indexed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise UserError("a lock", "none", "")

    monkeypatch.setattr(shards.index, "file_lock", refuse)
    assert [manifest.samples for manifest in index(indexed, None)] == [60, 20]


def test_indexing_again_changes_nothing_and_changed_shards_are_not_passed_off(tmp_path: Path) -> None:
    out = foreign_set(tmp_path / "set")
    first = index(out, None)
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert index(out, None) == first
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == times
    (out / "train" / "s-00002.tar").unlink()
    (out / "train" / "s-00002.idx").unlink()
    error = refusal(lambda: index(out, None))
    (out / "train" / "manifest.json").unlink()
    hint = refusal(lambda: index(out, None)).hint  # the arrays are of other shards still
    subprocess.run(error.hint[error.hint.index("rm ") :].replace("rm ", "rm -f "), shell=True, check=True)
    assert hint.endswith("rm " + " ".join(str(out / "train" / name) for name in ARRAYS))
    assert index(out, None)[0].samples == 50


def test_indexing_a_data_set_of_version_2_upgrades_it(tmp_path: Path) -> None:
    out = foreign_set(tmp_path / "set")
    expected = index(out, None)
    downgrade(out)
    assert Manifest.read(out / "train").version == 2
    assert index(out, None) == expected
    assert [Manifest.read(out / split) for split in ("train", "test")] == list(expected)
    assert check_split(out / "train")[1] == []


def test_an_array_of_others_is_in_the_way(tmp_path: Path) -> None:
    out = foreign_set(tmp_path / "set")
    (out / "train" / "labels.npy").write_bytes(b"mine")
    assert str(out / "train" / "labels.npy") in refusal(lambda: index(out, None)).found
    assert (out / "train" / "labels.npy").read_bytes() == b"mine"
    assert not (out / "train" / "manifest.json").exists()


def test_one_part_alone_can_be_indexed(tmp_path: Path) -> None:
    for name, dataset, expected in (("test", "birds", "test"), ("held out", "held out", "train")):
        directory = write_foreign(tmp_path / "birds" / name, foreign_samples(8))
        (manifest,) = index(directory, None)
        assert (manifest.dataset, manifest.split) == (dataset, expected)
        assert_is(open_store(directory), foreign_samples(8))


def test_a_val_part_is_indexed_too_and_all_parts_have_the_same_classes_and_channels(tmp_path: Path) -> None:
    gray = [{"__key__": f"{n}", "png": picture(pixels(6, 6, 1, seed=n)), "cls": 0} for n in range(4)]
    colour = [{"__key__": f"{n}", "jpg": picture(pixels(6, 6, 3, seed=n), "JPEG"), "cls": 2} for n in range(4)]
    for name, samples in (("train", gray), ("test", gray), ("val", colour)):
        write_foreign(tmp_path / "set" / name, samples)
    manifests = index(tmp_path / "set", None)
    assert [manifest.split for manifest in manifests] == ["train", "test", "val"]
    assert {manifest.image_shape for manifest in manifests} == {(None, None, 3)}
    assert {manifest.classes for manifest in manifests} == {("0", "1", "2")}
    assert [manifest.counts for manifest in manifests] == [(4, 0, 0), (4, 0, 0), (0, 0, 4)]


def flat(directory: Path, *names: str) -> Path:
    """Shards side by side, each with two records of its own."""
    directory.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(tar(*records(2 * number, 2 * number + 1)))
    return directory


def shard_names(directory: Path) -> dict[str, list[str]]:
    return {manifest.split: [shard.name for shard in manifest.shards] for manifest in index(directory, None)}


@pytest.mark.parametrize(
    "train, test, val",
    [
        (["train-00000-of-00002.tar", "train-00001-of-00002.tar"], ["test-00000.tar"], ["validation-00000.tar"]),
        (["set-train-0000.tar"], ["set-test-00.tar"], ["set-val-00.tar"]),
        (["a_train_0.tar"], ["a_eval_0.tar"], ["a_dev_0.tar"]),
        (["training.tar"], ["testing.tar"], ["valid.tar"]),
        (["Train0.tar"], ["TEST0.tar"], ["dev0.tar"]),
        (["training/0.tar", "training/1.tar"], ["evaluation/0.tar"], ["validation/0.tar"]),
        (["train/0.tar"], ["test/0.tar"], ["dev/0.tar"]),
        (["cars-train/0.tar"], ["cars-test/1.tar"], ["cars_valid/2.tar"]),
    ],
    ids=lambda names: names[0],
)
@pytest.mark.parametrize("symbolic", [True, False], ids=["symbolic links", "hard links"])
def test_splits_side_by_side_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train: list[str], test: list[str], val: list[str], symbolic: bool
) -> None:
    def refuse(link: Path, target: str) -> NoReturn:
        raise OSError(errno.EINVAL, "A required privilege is not held by the client", str(link))

    if not symbolic:  # as on Windows without the privilege
        monkeypatch.setattr(Path, "symlink_to", refuse)
    out = flat(tmp_path / "birds", *train, *test, *val)
    splits = dict(zip(SPLITS, (train, test, val), strict=True))
    expected = {split: [Path(name).name for name in names] for split, names in splits.items()}
    before = digests(out)
    for _ in range(2):  # indexing again changes nothing
        assert shard_names(out) == expected
    assert digests(out) == before
    for split, names in splits.items():
        assert open_split(out, split).labels.tolist() == [0, 1] * len(names)
        assert check_split(out / split)[1] == []


@pytest.mark.parametrize(
    "names", [["set-train-0000.tar", "set-validation-00.tar"], ["train/0.tar", "validation/1.tar"]]
)
def test_val_is_the_test_split_where_there_is_none(tmp_path: Path, names: list[str]) -> None:
    assert {*shard_names(flat(tmp_path, *names))} == {"train", "test"}
    assert check_split(tmp_path / "test")[1] == []
    assert "data.shards=" in run_module("shards.index", tmp_path).stdout


@pytest.mark.parametrize(
    "names, words",
    [
        (["train-0.tar", "val-0.tar", "extra-0.tar"], "extra-0.tar, whose name says no split"),
        (["train-val-0.tar", "test-0.tar"], "train-val-0.tar, named after the splits train and val"),
        (["train/train-0.tar", "train/val-0.tar", "test/0.tar"], None),
        (["train/0.tar", "test/0.tar", "extra/0.tar"], "extra, which is named after no split"),
        (
            ["train/0.tar", "test/0.tar", "train-test/0.tar"],
            "train-test, which is named after no split, or after several",
        ),
        (["train/0.tar", "test/0.tar", "testing/0.tar"], "testing, a second test split"),
        (["train/0.tar", "val-0.tar"], "train, a directory of shards beside val-0.tar"),
        (["train/0.tar", "test/0.tar", "train/1.TAR"], "1.TAR, which is compressed, or named otherwise"),
        (["train/0.tar", "test/0.tar", "train/1.tar.gz"], "1.tar.gz, which is compressed"),
        (["val-0.tar", "test-0.tar"], "without train"),
    ],
    ids=str,
)
def test_no_shard_is_indexed_as_another_split_or_left_out(tmp_path: Path, names: list[str], words: str | None) -> None:
    flat(tmp_path / "birds", *names)
    error = refusal(lambda: index(tmp_path / "birds" / ("" if words else "train"), None))
    assert (words or "val-0.tar, whose name says") in error.found
    assert_nothing_written(tmp_path / "birds")


@pytest.mark.parametrize("member", [("a.cls", b"cat"), ("a.json", b'{"label": 1}'), ("a.txt", b"cat")])
def test_shards_with_other_labels_get_an_advice_for_all_records(tmp_path: Path, member: tuple[str, bytes]) -> None:
    for split in ("train", "test"):
        part(tmp_path / split, tar(("a.jpg", PICTURE), member))
    error = refusal(lambda: index(tmp_path, None))
    assert "unpack the images into one directory per class" in error.hint


def test_the_advice_of_a_single_split_leads_to_a_data_set(tmp_path: Path) -> None:
    shown = run_module("shards.index", flat(tmp_path / "birds" / "train", "0.tar")).stdout
    assert f"then: python -m shards.index {tmp_path / 'birds'}" in shown
    flat(tmp_path / "birds" / "test", "0.tar")
    assert f"data.shards={tmp_path / 'birds'}" in run_module("shards.index", tmp_path / "birds").stdout


def test_splits_that_were_indexed_alone_and_differ_are_not_recommended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign_set(tmp_path, train=4, test=1)
    for split in ("train", "test"):
        monkeypatch.setattr("sys.argv", ["index", str(tmp_path / split)])
        assert main() == 0
    *_, advice = capsys.readouterr().out.splitlines()
    subprocess.run(advice.replace("python", sys.executable), shell=True, check=True, cwd=ROOT)
    assert len({Manifest.read(tmp_path / split).classes for split in ("train", "test")}) == 1


def test_a_relative_path_names_the_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (write_foreign(tmp_path / "birds" / "train", foreign_samples(4)) / "notes").mkdir()
    monkeypatch.chdir(tmp_path / "birds" / "train" / "notes")
    monkeypatch.setattr("sys.argv", ["index", ".."])
    assert main() == 0
    assert Manifest.read(tmp_path / "birds" / "train").dataset == "birds"
    assert f"python -m shards.index {tmp_path / 'birds'}\n" in capsys.readouterr().out


def test_only_local_shards_are_indexed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["index", "s3://bucket/name"])
    with pytest.raises(UserError, match="s3://bucket/name, which is not on this machine"):
        main()


def test_two_commands_at_once_give_one_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, active, barrier = write_foreign(tmp_path / "train", foreign_samples(4)), [], Barrier(2)
    scan, write = shards.index._scan_split, shards.index.write_file

    def scan_together(*arguments: Any) -> Any:
        scans = scan(*arguments)
        barrier.wait(10)
        return scans

    def write_alone(path: Path, content: bytes) -> None:
        active.append(path)
        time.sleep(0.01)
        assert active == [path], "another command writes too"
        write(path, content)
        active.clear()

    monkeypatch.setattr(shards.index, "_scan_split", scan_together)
    monkeypatch.setattr(shards.index, "write_file", write_alone)
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(lambda _: index(directory, None), range(2))
    assert one == other and check_split(directory)[1] == []
    assert not (directory / ".index.lock").exists()


@pytest.mark.parametrize(("name", "words"), [("a\\b.tar", "backslash"), ("a\x07.tar", "control"), ("山\u3000.tar", "")])
def test_names_of_shards_are_valid_everywhere(tmp_path: Path, name: str, words: str) -> None:
    directory = flat(tmp_path / "山\u3000\x07", f"train/{name}", "test/0.tar")
    if words:
        assert words in refusal(lambda: index(directory, None)).found
        assert_nothing_written(directory)
    else:
        assert index(directory, None)[0].dataset == "山\u3000\\x07"


def test_gray_pictures_make_a_gray_set(tmp_path: Path) -> None:
    samples = [
        {"__key__": "a", "png": picture(pixels(6, 6, 1)), "cls": 0},
        {"__key__": "b", "jpg": picture(pixels(6, 6, 1), "JPEG"), "cls": 1},
        {"__key__": "c", "bmp": picture(pixels(6, 6, 1), "BMP"), "cls": 1},
    ]
    assert index(write_foreign(tmp_path / "train", samples), None)[0].image_shape == (None, None, 1)


def test_components_are_chosen_and_others_passed_over(tmp_path: Path) -> None:
    shard = tar(
        ("README", b"hello"),
        ("n/a.mask.png", b"no picture"),
        ("n/a.jpg", PICTURE),
        ("n/._a.jpg", b"what a Mac leaves"),
        ("n/a.txt", b""),
        ("n/a.cls.txt", b"7"),
        ("n/a.cls", b" 1\n"),
        ("__meta__/a.jpg", b""),
        ("b.left.png", PICTURE),
        ("b.cls.txt", b"0"),
    )
    directory = part(tmp_path / "train", shard)
    (directory / "._0.tar").write_bytes(b"what a Mac leaves")
    index(directory, None)
    store = open_store(directory)
    assert [image.tobytes() for image in store.read(np.arange(2))] == [PICTURE] * 2
    assert store.labels.tolist() == [1, 0]


def test_rows_in_the_shards_are_heeded(tmp_path: Path) -> None:
    directory = part(tmp_path / "train", tar(("a.jpg", PICTURE), ("a.cls", LABEL), ("a.row", b"812")))
    index(directory, None)
    assert open_store(directory).rows.tolist() == [812]


# Classes.


def test_classes_are_named_by_a_file(tmp_path: Path) -> None:
    out = foreign_set(tmp_path / "set")
    (tmp_path / "classes.txt").write_text("\ufeffgrèbe\n heron \nstork\n")  # as Windows writes it
    process = run_module("shards.index", out, "--classes", tmp_path / "classes.txt")
    assert process.returncode == 0, process.stderr
    assert "train: 60 images of 3 classes in 3 shards" in process.stdout
    assert Manifest.read(out / "test").classes == ("grèbe", "heron", "stork")
    assert Manifest.read(out / "test").counts == (10, 10, 0)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a\n\nb\n", "line 2 is empty"),
        (b"a\nb\na\n", "line 3 repeats 'a'"),
        (b"", "line 1 is empty"),
        (b"\xff\xfe", "UTF-8"),
    ],
)
def test_a_file_of_classes_that_names_none_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "classes.txt"
    path.write_bytes(content)
    assert words in refusal(lambda: read_classes(path)).found
    assert str(tmp_path / "none") in refusal(lambda: read_classes(tmp_path / "none")).found


@pytest.mark.parametrize("name", ["/dev/zero", "fifo", "loop"])
def test_a_file_of_classes_is_a_regular_file(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    process = run_module("shards.index", foreign_set(tmp_path / "set"), "--classes", tmp_path / name, timeout=60)
    assert_user_error(process, f"{tmp_path / name}")


def test_special_characters_of_names_are_percent_encoded_in_an_index() -> None:
    line = index_line({"jpg": Member("a b%\u00e9\n.jpg", 512, 3), "cls": Member("a~!$&.cls", 1536, 1)})
    assert line == "jpg 512 3 a%20b%25%C3%A9%0A.jpg cls 1536 1 a~!$&.cls"


def test_class_names_cannot_control_the_terminal(tmp_path: Path) -> None:
    out = foreign_set(tmp_path / "set")
    (tmp_path / "classes.txt").write_text("a\n\x1b[2Jb\n\u202ec\n")
    assert index(out, read_classes(tmp_path / "classes.txt"))[0].classes == ("a", "\\x1b[2Jb", "\\u202ec")


def test_labels_beyond_the_named_classes_are_refused(tmp_path: Path) -> None:
    out = foreign_set(tmp_path / "set")
    error = refusal(lambda: index(out, ("only",)))
    assert "label 1" in error.found
    assert_nothing_written(out)


# What is refused.


def assert_nothing_written(directory: Path) -> None:
    assert {path.suffix for path in directory.rglob("*") if path.is_file()} <= {".tar", ".TAR", ".gz", ".tgz"}


GOOD = (("g.jpg", PICTURE), ("g.cls", LABEL))
HOSTILE: dict[str, tuple[bytes, str]] = {
    "no picture": (tar(("a.cls", LABEL), ("a.json", b"{}")), "'a' has no picture"),
    "blocks of ours": (tar(("0.images.npy", b""), ("0.labels.npy", b"")), "images.npy and labels.npy"),
    "no label": (tar(("a.jpg", PICTURE)), "'a' has no label"),
    "picture without its label": (tar(*GOOD, ("a.jpg", PICTURE), ("b.cls", LABEL)), "'a' has no label"),
    "two pictures": (tar(("a.jpg", PICTURE), ("a.png", PICTURE), ("a.cls", LABEL)), "several pictures (jpg and png)"),
    "same key later": (tar(("g.jpg", PICTURE), ("g.cls", LABEL), ("h.cls", LABEL), ("h.jpg", PICTURE), *GOOD), "'g'"),
    "same file twice": (tar(("g.jpg", PICTURE), ("g.jpg", PICTURE), ("g.cls", LABEL)), "'g.jpg' comes twice"),
    "label is a word": (tar(("a.jpg", PICTURE), ("a.cls", b"cat")), "b'cat'"),
    "label is a fraction": (tar(("a.jpg", PICTURE), ("a.cls", b"1.0")), "b'1.0'"),
    "label below 0": (tar(("a.jpg", PICTURE), ("a.cls", b"-1")), "b'-1'"),
    "label in two words": (tar(("a.jpg", PICTURE), ("a.cls", b"1 2")), "b'1 2'"),
    "label is empty": (tar(("a.jpg", PICTURE), ("a.cls", b"")), "b''"),
    "label is pickled": (tar(("a.jpg", PICTURE), ("a.cls", b"cos\nsystem\n(S'true'\ntR.")), "cos"),
    "label is huge": (tar(("a.jpg", PICTURE), ("a.cls", b"9" * 30)), "b'9999"),
    "label is large": (tar(("a.jpg", PICTURE), ("a.cls", b"1000000")), "1000000, a label outside 0 .. 999999"),
    "row is a word": (tar(("a.jpg", PICTURE), ("a.cls", LABEL), ("a.row", b"first")), "b'first'"),
    "row of some": (tar(*GOOD, ("a.jpg", PICTURE), ("a.cls", LABEL), ("a.row", b"1")), "'a' has a row, unlike"),
    "no picture inside": (tar(("a.jpg", b"#!/bin/sh\ntouch /tmp/x"), ("a.cls", LABEL)), "'a.jpg' is no JPEG"),
    "empty picture": (tar(("a.jpg", b""), ("a.cls", LABEL)), "an empty file"),
    "half a header": (tar(("a.jpg", PICTURE[:20]), ("a.cls", LABEL)), "ends inside its header"),
    "a GIF": (tar(("a.jpg", picture(pixels(4, 4, 1), "GIF")), ("a.cls", LABEL)), "it begins with b'GIF8"),
    "a bomb": (tar(("a.png", PICTURE[:16] + b"\0\1\0\0" * 2 + PICTURE[24:]), ("a.cls", LABEL)), "65536 x 65536"),
    "symbolic link": (tar(*GOOD, special("a.jpg", tarfile.SYMTYPE)), "'a.jpg' is a symbolic link"),
    "hard link": (tar(*GOOD, special("a.jpg", tarfile.LNKTYPE)), "'a.jpg' is a hard link"),
    "device": (tar(*GOOD, special("a.jpg", tarfile.CHRTYPE)), "'a.jpg' is a device"),
    "pipe": (tar(*GOOD, special("a.jpg", tarfile.FIFOTYPE)), "'a.jpg' is a pipe"),
    "sparse": (tar(*GOOD, special("a.jpg", tarfile.GNUTYPE_SPARSE)), "'a.jpg' is a sparse file"),
    "compressed": (gzip.compress(tar(*GOOD)), "no uncompressed tar file"),
    "a picture": (PICTURE * 10, "no uncompressed tar file"),
    "empty file": (b"", "ends without the zeros"),
    "without records": (tar(("README", b"hello")), "without any record"),
    "without its end": (tar(*GOOD).rstrip(b"\0").ljust(512 * 4, b"\0")[:2048], "ends without the zeros"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_shard_is_refused_by_name_and_nothing_is_written(tmp_path: Path, case: str) -> None:
    content, words = HOSTILE[case]
    directory = part(tmp_path / "train", tar(*GOOD), content)
    error = refusal(lambda: index(directory, None))
    assert str(directory / "1.tar") in error.found
    assert words in error.found
    assert_nothing_written(directory)


def header_with(form: int, change: Callable[[bytearray], None]) -> bytes:
    """A tar file whose first header was changed, with a check sum that agrees."""
    content = bytearray(tar(("a" * 120 + ".jpg", b"abc"), form=form))
    change(content)
    content[148:156] = b"%06o\0 " % (sum(content[:148]) + 8 * 32 + sum(content[156:512]))
    return bytes(content)


def size_field(text: bytes) -> Callable[[bytearray], None]:
    def change(content: bytearray) -> None:
        content[124:136] = text

    return change


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["GNU", "PAX"])
@pytest.mark.parametrize(
    "size, fault",
    [
        (b"77777777777\0", "claims 8,589,934,591 bytes"),
        (b"\x80" + b"\x7f" * 11, "claims 154,135,671,558,081,661,678,616,447 bytes"),
        (b"\xff" * 12, f"the invalid size {bytes([255] * 12)!r} (header at byte 0)"),
        (b"-0000000001\0", "the invalid size b'-0000000001\\x00' (header at byte 0)"),
        (b"0o000000003\0", "the invalid size b'0o000000003\\x00' (header at byte 0)"),
        (b"          9x", "it is no uncompressed tar file (header at byte 0)"),
    ],
)
def test_a_header_that_claims_terabytes_takes_no_memory(tmp_path: Path, form: int, size: bytes, fault: str) -> None:
    directory = part(tmp_path / "train", header_with(form, size_field(size)))
    found = refusal(lambda: index(directory, None)).found
    assert fault in found
    assert found.endswith(" (header at byte 0)")


@pytest.mark.parametrize(
    "records",
    [
        b"30 path=a.jpg\n",
        b"8 path=",
        b"x path=a\n",
        b"-5 path=a\n",
        b"99999999999 path=a.jpg\n",
        b"18 size=-10000000\n\n",
    ],
)
def test_damaged_pax_headers_are_refused(tmp_path: Path, records: bytes) -> None:
    info = tarfile.TarInfo("p")
    info.type, info.size = tarfile.XHDTYPE, len(records)
    content = info.tobuf(tarfile.USTAR_FORMAT) + records.ljust(512, b"\0") + tar(("a.jpg", PICTURE))
    directory = part(tmp_path / "train", content)
    assert "header at byte 0" in refusal(lambda: index(directory, None)).found


def test_a_picture_that_claims_gigabytes_is_refused_unread(tmp_path: Path) -> None:
    info = tarfile.TarInfo("a.jpg")
    info.size = 5 << 30
    directory = part(tmp_path / "train", info.tobuf(tarfile.GNU_FORMAT))
    label = tar(("a.cls", LABEL))
    with open(directory / "0.tar", "r+b") as file:
        file.seek(512 + info.size)  # a hole, which takes no room
        file.write(label)
    assert f"'a.jpg' is of {5 << 30:,} bytes, more than {MAX_BYTES:,}" in refusal(lambda: index(directory, None)).found


def test_a_shard_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    directory = write_foreign(tmp_path / "train", foreign_samples(4))
    path = directory / "s-00000.tar"
    content = path.read_bytes()
    end = len(content.rstrip(b"\0")) // 512 * 512 + 512
    for length in [*range(0, end, 256), end - 1, end]:
        path.write_bytes(content[:length])
        assert str(path) in refusal(lambda: index(directory, None)).found
    assert_nothing_written(directory)
    path.write_bytes(content[: end + 1024])
    index(directory, None)


@pytest.mark.parametrize("bits", [0x01, pytest.param(0x80, marks=pytest.mark.slow)])
def test_a_flipped_bit_anywhere_is_refused_or_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    """A changed pixel, or a letter in a component that is not needed, cannot be told; everything else must be."""
    monkeypatch.setattr("shards.index.write_file", Path.write_bytes)  # without waiting for the disk
    shard = tar(("n/a.jpg", PICTURE), ("n/a.cls", b"3"), ("n/a.txt", b"words"), form=tarfile.PAX_FORMAT)
    directory = part(tmp_path / "train", shard)
    refused = 0
    for place in range(0, len(shard.rstrip(b"\0")), 2):
        changed = bytearray(shard)
        changed[place] ^= bits
        (directory / "0.tar").write_bytes(changed)
        try:
            index(directory, None)
        except UserError as error:
            refused += 1
            assert str(directory / "0.tar") in error.found
            assert_nothing_written(directory)
        else:
            assert len(open_store(directory)) == 1
            (directory / "0.idx").unlink()
            for name in ("manifest.json", *ARRAYS):
                (directory / name).unlink()
    assert refused > 3 * 250, "every byte of the three headers"


def test_shards_of_different_origin_are_refused(tmp_path: Path) -> None:
    with_row = tar(("a.jpg", PICTURE), ("a.cls", LABEL), ("a.row", b"0"))
    error = refusal(lambda: index(part(tmp_path / "train", tar(*GOOD), with_row), None))
    assert "1.tar with rows" in error.found and "0.tar without" in error.found
    error = refusal(lambda: index(part(tmp_path / "twice", with_row, with_row), None))
    assert "twice: 0 as the row (.row) of several records" in error.found


def test_a_record_without_a_class_number_gets_a_hint_that_helps(tmp_path: Path) -> None:
    shard = tar(("a.jpg", PICTURE), ("a.json", b'{"label": 1}'))
    assert (
        "class number of every record as a component cls"
        in refusal(lambda: index(part(tmp_path / "train", shard), None)).hint
    )


def test_directories_that_are_no_sets_say_what_they_lack(tmp_path: Path) -> None:
    assert "no such directory" in refusal(lambda: index(tmp_path / "none", None)).found
    (tmp_path / "empty").mkdir()
    assert "without .tar files" in refusal(lambda: index(tmp_path / "empty", None)).found
    compressed = tmp_path / "compressed"
    compressed.mkdir()
    (compressed / "a.tar.gz").write_bytes(gzip.compress(tar(*GOOD)))
    assert "a.tar.gz" in refusal(lambda: index(compressed, None)).found
    write_foreign(tmp_path / "set" / "train", foreign_samples(4))
    error = refusal(lambda: index(tmp_path / "set", None))
    assert "without test" in error.found
    assert_nothing_written(tmp_path / "set")


def test_whoever_would_train_on_shards_that_are_not_indexed_is_told_how(tmp_path: Path) -> None:
    out = foreign_set(tmp_path / "set", train=4, test=4)
    assert f"python -m shards.index {out}" in refusal(lambda: open_split(out, "train")).hint
    assert f"python -m shards.index {out}" in refusal(lambda: open_store(out / "test")).hint
    flat = write_foreign(tmp_path / "flat", foreign_samples(4))
    assert f"python -m shards.index {flat}" in refusal(lambda: open_store(flat)).hint


def test_the_command_ends_with_one_message(tmp_path: Path) -> None:
    directory = part(tmp_path / "train", tar(("a.cls", LABEL)))
    assert_user_error(run_module("shards.index", directory), str(directory / "0.tar"), "'a'", "no picture")


def test_a_place_that_may_not_be_written_to_is_the_users_to_mend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = write_foreign(tmp_path / "train", foreign_samples(4))

    def refuse(path: Path, content: bytes) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("shards.index.write_file", refuse)
    assert "Permission denied" in refusal(lambda: index(directory, None)).found
    assert_nothing_written(directory)


def test_damage_after_indexing_is_found(indexed: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(indexed, tmp_path / "set"))
    path = copy / "train" / "s-00001.tar"
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as archive:
        member = next(member for member in archive if member.name.endswith(".png"))
    content[member.offset_data + member.size // 2] ^= 0x04
    path.write_bytes(content)
    faults = check_split(copy / "train")[1]
    assert any("SHA-256" in fault and path.name in fault for fault in faults)
    assert any(f"{path}: record {member.name.removesuffix('.png')}: a picture that" in fault for fault in faults)


def test_synthetic_files_are_of_four_kinds() -> None:
    assert {synthetic_file(number, 0).extension for number in range(8)} == {"png", "jpg", "webp", "bmp"}


@pytest.mark.parametrize("name", ["", "train"])
@pytest.mark.parametrize("store", ["tar", "zarr"])
def test_a_packed_data_set_needs_no_index(tmp_path: Path, store: str, name: str) -> None:
    """Its records hold blocks, which are no pictures; the hint was to remove them."""
    directory = pack_splits(synthetic_splits(train=20, test=5), tmp_path / "set", store=store)
    error = refusal(lambda: index(directory / name, None))
    assert f"{directory}/train, a split of a packed data set" in error.found
    assert error.hint.endswith(f"data.shards={directory}")
