"""From one store to the other and back: the same samples, the same bytes, all or nothing."""

from __future__ import annotations

import gc
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, assert_user_error, pack_splits, run_module, synthetic_splits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import warm_process
from support.synthetic_records import foreign_set, pack_pictures
from support.version_2 import downgrade

import pipeline.packing.pack
import shards.convert
import shards.stores.create
from pipeline.packing.pack import PackSettings, pack
from shards import Manifest, UserError, open_split
from shards.atomic import file_lock, staging_directory
from shards.convert import convert, main, upgrade
from shards.index import index
from shards.manifest import ARRAYS, MANIFEST_NAME, StoreKind
from shards.open import open_store
from shards.verify.check import check_split

SHAPE = (6, 5, 3)
BLOCK_SIZE = 16


@pytest.fixture(scope="module")
def tar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set in tars, with a val part and origins.csv: 150 + 40 + 30 images in shards of 48. Not to be changed."""
    train, test = synthetic_splits(train=150, test=70, shape=SHAPE)
    numbers = {name: np.array([f"{name}/{row}.png" for row in range(70)]) for name in ("val", "test")}
    parts = (
        replace(train, columns={"path": np.array([f'"{row}", é.png' for row in range(150)])}),
        replace(test.select(np.arange(0, 40)), columns={"path": numbers["test"][:40]}),
        replace(test.select(np.arange(40, 70), name="val"), columns={"path": numbers["val"][40:]}),
    )
    out = tmp_path_factory.mktemp("convert") / "tar"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.packing.pack, "SHARD_BYTES", 3 * BLOCK_SIZE * int(np.prod(SHAPE)))
        pack(lambda: parts, out, PackSettings("synthetic", block_size=BLOCK_SIZE, options={"size": 6}))
    return out


def content(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def assert_same_samples(one: Path, other: Path) -> None:
    for part in sorted(path.name for path in one.iterdir()):
        stores = open_split(one, part), open_split(other, part)
        everything = np.arange(len(stores[0]))
        np.testing.assert_array_equal(*(store.read(everything) for store in stores))
        np.testing.assert_array_equal(*(store.labels for store in stores))
        np.testing.assert_array_equal(*(store.rows for store in stores))


class TestRoundTrip:
    @pytest.mark.parametrize("compression", ["zstd", "none"])
    def test_tar_to_zarr_and_back_gives_the_same_bytes(self, tar: Path, tmp_path: Path, compression: str) -> None:
        convert(tar, tmp_path / "zarr", "zarr", compression)
        assert_same_samples(tar, tmp_path / "zarr")
        convert(tmp_path / "zarr", tmp_path / "back", "tar")
        assert content(tmp_path / "back") == content(tar)

    def test_zarr_to_tar_and_back_gives_the_same_bytes(self, tar: Path, tmp_path: Path) -> None:
        for source, target, store in (("tar", "zarr", "zarr"), ("zarr", "tar2", "tar"), ("tar2", "zarr2", "zarr")):
            convert(tar if source == "tar" else tmp_path / source, tmp_path / target, store)
        assert content(tmp_path / "zarr") == content(tmp_path / "zarr2")

    def test_conversion_gives_the_bytes_that_packing_gives(self, tmp_path: Path) -> None:
        parts = synthetic_splits(train=100, test=10, shape=SHAPE)
        pack_splits(parts, tmp_path / "tar", BLOCK_SIZE)
        pack_splits(parts, tmp_path / "zarr", BLOCK_SIZE, store="zarr")
        convert(tmp_path / "tar", tmp_path / "converted", "zarr")
        converted, packed = content(tmp_path / "converted"), content(tmp_path / "zarr")
        for part in ("train", "test"):
            # The manifest goes on telling which versions packed the set first.
            del converted[f"{part}/manifest.json"], packed[f"{part}/manifest.json"]
            manifests = [Manifest.read(tmp_path / name / part) for name in ("converted", "zarr")]
            assert manifests[0].digest() == manifests[1].digest()
        assert converted == packed

    def test_the_converted_is_whole(self, tar: Path, tmp_path: Path) -> None:
        convert(tar, tmp_path / "zarr", "zarr")
        for part in ("train", "test", "val"):
            manifest, faults = check_split(tmp_path / "zarr" / part)
            assert faults == []
            before = Manifest.read(tar / part)
            assert manifest.versions == before.versions
            assert manifest.options == {"size": 6, "compression": "zstd"}
            assert (tmp_path / "zarr" / part / "origins.csv").is_file()

    def test_measured_statistics_are_not_taken_along(self, tar: Path, tmp_path: Path) -> None:
        source = Path(shutil.copytree(tar, tmp_path / "tar"))
        (source / "train" / "statistics").mkdir()
        (source / "train" / "statistics" / "some.json").write_text("{}")
        convert(source, tmp_path / "zarr", "zarr")
        assert not (tmp_path / "zarr" / "train" / "statistics").exists()

    def test_one_part_alone(self, tar: Path, tmp_path: Path) -> None:
        convert(tar / "val", tmp_path / "zarr", "zarr")
        assert Manifest.read(tmp_path / "zarr").split == "val"
        convert(tmp_path / "zarr", tmp_path / "back", "tar")
        assert content(tmp_path / "back") == content(tar / "val")

    def test_to_the_same_store_with_another_compression(self, tar: Path, tmp_path: Path) -> None:
        convert(tar, tmp_path / "zstd", "zarr", "zstd")
        convert(tmp_path / "zstd", tmp_path / "none", "zarr", "none")
        assert_same_samples(tar, tmp_path / "none")
        convert(tmp_path / "none", tmp_path / "again", "zarr", "zstd")
        assert content(tmp_path / "again") == content(tmp_path / "zstd")

    def test_a_part_of_version_1(self, tar: Path, tmp_path: Path) -> None:
        source = downgrade(Path(shutil.copytree(tar, tmp_path / "old")))
        for part in source.iterdir():
            manifest = Manifest.read(part).model_dump(mode="json", exclude={"store", "options", "files"})
            (part / "origins.csv").unlink()
            (part / MANIFEST_NAME).write_text(Manifest(**{**manifest, "version": 1}).to_json())
        convert(source, tmp_path / "zarr", "zarr")
        assert_same_samples(source, tmp_path / "zarr")
        assert Manifest.read(tmp_path / "zarr" / "train").version == 3

    @settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
    @given(
        shape=st.tuples(st.integers(1, 7), st.integers(1, 7), st.sampled_from([1, 3])),
        samples=st.integers(1, 60),
        block_size=st.integers(1, 70),
        blocks_per_shard=st.integers(1, 5),
        classes=st.integers(1, 7),
        first=st.sampled_from(["tar", "zarr"]),
        compression=st.sampled_from(["zstd", "none"]),
    )
    def test_there_and_back(
        self,
        monkeypatch: pytest.MonkeyPatch,
        shape: tuple[int, int, int],
        samples: int,
        block_size: int,
        blocks_per_shard: int,
        classes: int,
        first: StoreKind,
        compression: str,
    ) -> None:
        monkeypatch.setattr(pipeline.packing.pack, "SHARD_BYTES", blocks_per_shard * block_size * int(np.prod(shape)))
        parts = synthetic_splits(train=samples, test=1, classes=classes, shape=shape)
        second: StoreKind = "zarr" if first == "tar" else "tar"
        with tempfile.TemporaryDirectory() as directory:
            names = [Path(directory) / name for name in ("packed", "converted", "back")]
            pack_splits(parts, names[0], block_size, store=first, compression=compression)
            convert(names[0], names[1], second, compression)
            assert_same_samples(names[0], names[1])
            convert(names[1], names[2], first, compression)
            assert content(names[0]) == content(names[2])

    def test_holds_no_more_than_a_shard_in_memory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """3,200 images of 3 KB in shards of 128; zarr-python has several copies of the shard that it writes.

        The sums of pixels are computed of 256 images at a time, in float32.

        Without the garbage collector, which in a process of many objects does not run between two shards.
        """
        raw, shard = 3200 * 3072, 128 * 3072
        monkeypatch.setattr(pipeline.packing.pack, "SHARD_BYTES", shard)
        source = pack_splits(synthetic_splits(train=3200, test=1, shape=(32, 32, 3)), tmp_path / "tar", 16)
        convert(source / "test", tmp_path / "warm", "zarr")  # imports, caches
        gc.collect()
        gc.disable()
        tracemalloc.start()
        try:
            convert(source, tmp_path / "zarr", "zarr")
            convert(tmp_path / "zarr", tmp_path / "back", "tar")
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
            gc.enable()
        assert peak < 8 * shard + 5 * 256 * 3072 < 0.75 * raw


class TestUpgrade:
    """A pack of version 2 in place; packing writes version 3."""

    @pytest.mark.parametrize("kind", ["tar", "zarr", "records", "indexed"])
    def test_gives_the_bytes_that_packing_gives(self, tar: Path, tmp_path: Path, kind: str) -> None:
        pack = tmp_path / "set"
        if kind == "records":
            pack_pictures(pack, records_per_shard=10, train=24, test=3)
        elif kind == "indexed":
            index(foreign_set(pack, train=24, test=6, shard_size=10), None)
        elif kind == "zarr":
            convert(tar, pack, "zarr")
        else:
            shutil.copytree(tar, pack)
        expected, identity = content(pack), Manifest.read(pack / "train").identity()
        downgrade(pack)
        assert content(pack) != expected
        assert Manifest.read(pack / "train").identity() == identity
        store, parts = open_split(pack, "train"), len(list(pack.glob("*/manifest.json")))
        before = [np.asarray(image).tobytes() for image in store.read(np.arange(len(store)))]
        assert len(upgrade(pack)) == parts
        assert content(pack) == expected
        assert [np.asarray(image).tobytes() for image in store.read(np.arange(len(store)))] == before, "it is open"
        assert upgrade(pack) == []
        assert content(pack) == expected

    def test_one_part_of_version_1(self, tar: Path, tmp_path: Path) -> None:
        part = downgrade(Path(shutil.copytree(tar / "train", tmp_path / "old")))
        fields = Manifest.read(part).model_dump(mode="json", exclude={"store", "options", "files"})
        old = Manifest(**{**fields, "version": 1})
        (part / MANIFEST_NAME).write_text(old.to_json())
        index = part / "shard-00000.idx"
        index.rename(part / "aside")
        assert check_split(part)[1] == [f"{index}: missing"]  # the manifest does not name it
        with pytest.raises(UserError, match=r"^error: index missing or damaged: [^\n]*\.idx: No such file") as caught:
            open_store(part)
        assert str(caught.value).count("error:") == 1
        (part / "aside").rename(index)
        [manifest] = upgrade(part)
        assert manifest == Manifest.read(part)
        kept = tuple(file for file in manifest.files if file.name != "origins.csv")
        assert old.identity() == manifest.model_copy(update={"files": kept}).identity()
        assert {file.name for file in manifest.files} == {f"shard-{n:05d}.idx" for n in range(4)} | set(ARRAYS)
        assert check_split(part)[1] == []

    @pytest.mark.parametrize("kind", ["tar", "zarr"])
    def test_the_identity_is_that_of_the_samples(self, tmp_path: Path, kind: StoreKind) -> None:
        def identity(name: str, order: int = 0, **changes: Any) -> str:
            parts = synthetic_splits(train=100, test=10, shape=SHAPE)
            pack_splits((replace(parts[0], **changes), parts[1]), tmp_path / name, BLOCK_SIZE, order, kind)
            return Manifest.read(tmp_path / name / "train").identity()

        train, _ = synthetic_splits(train=100, test=10, shape=SHAPE)
        exchanged = train.labels.copy()
        exchanged[[0, -1]] = exchanged[[-1, 0]]
        first = identity("first")
        assert identity("again") == first
        others = [
            identity("order", 1),
            identity("labels", labels=exchanged),
            identity("pixels", read=lambda rows: train.read(rows) ^ 1),
            identity("classes", classes=tuple("abcde")),
        ]
        assert len({first, *others}) == 5

    @pytest.mark.parametrize("name", ["shard-00001.tar", "shard-00001.idx", "origins.csv", "samples.zarr/rows/c/1"])
    def test_a_damaged_split_is_left_as_it_is(self, tar: Path, tmp_path: Path, name: str) -> None:
        pack = tmp_path / "set"
        if "zarr" in name:
            convert(tar, pack, "zarr")
        else:
            shutil.copytree(tar, pack)
        path = downgrade(pack) / "train" / name
        changed = bytearray(path.read_bytes())
        changed[600 if name.endswith(".tar") else 30] ^= 1
        path.write_bytes(changed)
        before = content(pack / "train")
        with pytest.raises(UserError) as caught:
            upgrade(pack)
        assert str(path.with_suffix("")) in caught.value.found
        assert content(pack / "train") == before

    def test_a_split_that_another_process_upgrades_is_left_to_it(self, tar: Path, tmp_path: Path) -> None:
        """The other process may have been given the data set or the split."""
        pack = downgrade(Path(shutil.copytree(tar, tmp_path / "set")))
        before = content(pack)
        with file_lock(pack / "train" / ".upgrade.lock"):
            for directory in (pack, pack / "train"):
                with pytest.raises(UserError, match="another process, which upgrades"):
                    upgrade(directory)
        assert content(pack) == before
        assert len(upgrade(pack)) == 3

    def test_by_the_command(self, tar: Path, tmp_path: Path) -> None:
        pack = downgrade(Path(shutil.copytree(tar, tmp_path / "set")))
        process = run_module("shards.convert", pack)
        assert process.returncode == 0, process.stderr
        assert "train  150 images, upgraded to format version 3" in process.stdout
        assert content(pack) == content(tar)
        assert "has format version 3 already" in run_module("shards.convert", pack).stdout
        for arguments in ((pack, "--store", "zarr"), (pack, tmp_path / "new")):
            process = run_module("shards.convert", *arguments)
            assert process.returncode == 2
            assert "DST and --store go together" in process.stderr

    @pytest.mark.parametrize("arguments", [["s3://b/a"], ["{tar}", "s3://b/a", "--store", "zarr"]])
    def test_what_is_written_is_local(
        self, tar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
    ) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", ["convert", *(word.format(tar=tar) for word in arguments)])
        with pytest.raises(UserError, match="s3://b/a, which is not on this machine"):
            main()
        monkeypatch.setattr("sys.argv", ["convert", str(tar), (tmp_path / "out").as_uri(), "--store", "tar"])
        assert main() == 0
        assert content(tmp_path / "out") == content(tar) and os.listdir(tmp_path) == ["out"]


class TestAllOrNothing:
    def test_a_damaged_source_is_refused(self, tar: Path, tmp_path: Path) -> None:
        source = Path(shutil.copytree(tar, tmp_path / "tar"))
        for name in ("train/shard-00001.tar", "test/shard-00000.idx", "val/origins.csv"):
            path = source / name
            whole = path.read_bytes()
            path.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
            with pytest.raises(UserError) as caught:
                convert(source, tmp_path / "zarr", "zarr")
            assert str(path) in caught.value.found
            assert f"python -m shards.verify {source}" in caught.value.hint
            path.write_bytes(whole)
        assert [path.name for path in tmp_path.iterdir()] == ["tar"]

    def test_what_is_written_wrong_is_found(self, tar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """As by a bad memory: hashes and checksums are right, but of other pixels."""

        def wrong_writer(*arguments):
            writer = shards.stores.create.make_writer(*arguments)
            write_shard = writer.write_shard

            def write_wrongly(number, blocks):
                return write_shard(
                    number, (block._replace(images=block.images ^ (block.first == 112)) for block in blocks)
                )

            writer.write_shard = write_wrongly
            return writer

        monkeypatch.setattr(shards.convert, "make_writer", wrong_writer)
        for store in ("tar", "zarr"):
            with pytest.raises(UserError, match="block 00000007"):
                convert(tar, tmp_path / "out", store)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGKILL])
    def test_killed_in_the_middle_leaves_no_pack(self, tmp_path: Path, sign: signal.Signals) -> None:
        pack_splits(synthetic_splits(train=40_000, test=10, shape=(16, 16, 1)), tmp_path / "tar", 64)
        target = tmp_path / "zarr"
        command = [sys.executable, "-m", "shards.convert", tmp_path / "tar", target, "--store", "zarr"]
        process = warm_process.Popen(list(map(str, command)), cwd=ROOT, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while not list(staging_directory(target).glob("*/new/train")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(sign)
        assert process.wait(60) != 0
        assert not target.exists()
        if sign == signal.SIGTERM:
            assert [path.name for path in tmp_path.iterdir()] == ["tar"]
        # The next one clears away what was left.
        convert(tmp_path / "tar", target, "zarr")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["tar", "zarr"]

    def test_a_failure_leaves_the_pack_that_was_there(
        self, tar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        convert(tar, tmp_path / "out", "zarr")
        before = content(tmp_path / "out")

        def fail(*_: object) -> None:
            raise OSError("disk on fire")

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="disk on fire"):
            convert(tar, tmp_path / "out", "tar", force=True)
        monkeypatch.undo()
        assert content(tmp_path / "out") == before
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


class TestCommand:
    def test_there_and_back(self, tar: Path, tmp_path: Path) -> None:
        process = run_module("shards.convert", tar, tmp_path / "zarr", "--store", "zarr")
        assert process.returncode == 0, process.stderr
        assert re.search(r"train +150 images, each compared: [\d.]+ MB of tar to [\d.]+ MB of zarr", process.stdout)
        assert process.stdout.count("compared") == 3
        process = run_module(
            "shards.convert", tmp_path / "zarr", tmp_path / "back", "--store=tar", "--compression=none"
        )
        assert process.returncode == 0
        assert process.stderr == "warning: --compression has no effect on a store of tar\n"
        assert content(tmp_path / "back") == content(tar)

    def test_a_pack_is_replaced_only_with_force(self, tar: Path, tmp_path: Path) -> None:
        convert(tar, tmp_path / "out", "zarr")
        process = run_module("shards.convert", tar, tmp_path / "out", "--store", "tar")
        assert_user_error(process, f"{tmp_path}/out, a complete pack", "--force")
        process = run_module("shards.convert", tar, tmp_path / "out", "--store", "tar", "--force")
        assert process.returncode == 0, process.stderr
        assert content(tmp_path / "out") == content(tar)

    def test_what_is_no_pack_is_never_replaced(self, tar: Path, tmp_path: Path) -> None:
        (tmp_path / "mine").write_text("precious")
        for target in (tmp_path, tmp_path / "mine"):
            process = run_module("shards.convert", tar, target, "--store", "zarr", "--force")
            assert_user_error(process, f"{target}, which exists and is not a complete pack")
        assert (tmp_path / "mine").read_text() == "precious"

    @pytest.mark.parametrize("target", [".", "..", "train", "train/new"])
    def test_source_and_target_are_apart(self, tar: Path, target: str) -> None:
        with pytest.raises(UserError, match="what is to be converted"):
            convert(tar, tar / target, "zarr", force=True)

    def test_what_is_missing_or_incomplete(self, tar: Path, tmp_path: Path) -> None:
        process = run_module("shards.convert", tmp_path / "nothing", tmp_path / "out", "--store", "zarr")
        assert_user_error(process, f"no such directory: {tmp_path}/nothing")
        source = Path(shutil.copytree(tar, tmp_path / "tar"))
        (source / "test" / MANIFEST_NAME).unlink()
        with pytest.raises(UserError, match=MANIFEST_NAME):
            convert(source, tmp_path / "out", "zarr")

    def test_picture_files_are_refused(self, tar: Path, tmp_path: Path) -> None:
        source = Path(shutil.copytree(tar / "test", tmp_path / "records"))
        manifest = Manifest.read(source).model_dump(mode="json")
        for shard in manifest["shards"]:
            shard["blocks_crc32"] = []
        manifest.update(store="records", image_shape=[None, None, 3], block_size=1)
        (source / MANIFEST_NAME).write_text(Manifest(**manifest).to_json())
        with pytest.raises(UserError) as caught:
            convert(source, tmp_path / "out", "zarr")
        assert "image files of different sizes" in caught.value.found
