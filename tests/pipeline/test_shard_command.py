"""`python -m pipeline.shard` as a user meets it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, assert_user_error, run_module
from support.raw_files import picture, pixels, write_tree

from pipeline import shard
from shards import Manifest, UserError, open_split
from shards.cli import run_command
from shards.verify.check import check_split


def run_here(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run the command in this process, through the same `run_command` as a process of its own."""
    monkeypatch.setattr(sys, "argv", ["pipeline.shard", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        run_command(shard.main)
    return ended.value.code


class Command:
    """The command in this process, and what it printed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def __call__(self, *arguments: object) -> subprocess.CompletedProcess:
        self._capsys.readouterr()
        status = run_here(self._monkeypatch, *arguments)
        output = self._capsys.readouterr()
        return subprocess.CompletedProcess(arguments, status, output.out, output.err)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Command:
    return Command(monkeypatch, capsys)


def snapshot(directory: Path) -> dict[str, tuple[int, bytes]]:
    """Time of change and content of everything below a directory."""
    return {
        str(path.relative_to(directory)): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in directory.rglob("*")
    }


def test_a_complete_pack_of_other_files_says_that_they_were_not_read(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name of a data set keeps the spaces of all scripts, and has no control characters."""
    monkeypatch.chdir(tmp_path)
    raw = "文\u3000字\x07"
    for parent in ("first", "second"):
        write_tree(tmp_path / parent / raw, {f"{n % 2}/{n}.png": picture(pixels(seed=n)) for n in range(8)})
    first = command("folder", "--raw", tmp_path / "first" / raw, "--test-fraction", "0.5")
    assert "文\u3000字\\x07: packed 8 images" in first.stdout
    again = command("folder", "--raw", tmp_path / "second" / raw, "--test-fraction", "0.5")
    assert f": already packed; {tmp_path}/second/{raw} was not read (--force packs again)" in again.stdout


class TestByProcess:
    def test_packs_then_finds_it_packed_and_touches_nothing(self, tmp_path: Path) -> None:
        """Into the default place, below the directory in which the command is run."""
        first = run_module("pipeline.shard", "digits", cwd=tmp_path)
        assert first.returncode == 0, first.stderr
        assert re.search(r"digits: packed 1,797 images in .* images/s\)", first.stdout)
        out = tmp_path / "data" / "shards" / "digits"
        assert [entry.name for entry in out.parent.iterdir()] == ["digits"]
        for part, samples in (("train", 1438), ("test", 359)):
            manifest, faults = check_split(out / part)
            assert (faults, manifest.samples, manifest.dataset, manifest.variant) == ([], samples, "digits", "")
            assert re.search(rf"{part} +{samples:,} images of 10 classes in 1 shard,", first.stdout)

        before = snapshot(tmp_path)
        second = run_module("pipeline.shard", "digits", cwd=tmp_path)
        assert second.returncode == 0, second.stderr
        assert "already packed" in second.stdout
        assert snapshot(tmp_path) == before

    def test_a_mistake_ends_in_one_message(self, tmp_path: Path) -> None:
        process = run_module("pipeline.shard", "minst", "--out", tmp_path / "out")
        assert_user_error(process, "'minst'", "emnist, fashionmnist", "did you mean mnist?")
        assert len(process.stderr.splitlines()) == 3
        assert process.stdout == ""
        assert list(tmp_path.iterdir()) == []

    def test_help_loads_neither_torch_nor_dali(self) -> None:
        code = """
import runpy, sys
sys.argv = ["pipeline.shard", "--help"]
try:
    runpy.run_module("pipeline.shard", run_name="__main__")
except SystemExit as ended:
    assert not ended.code
print("LOADED", *sorted({name.partition(".")[0] for name in sys.modules}))
"""
        process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert process.returncode == 0, process.stderr
        text, _, loaded = process.stdout.rpartition("LOADED")
        for words in ("--split", "--raw", "--out", "--block-size", "--seed", "--dry-run", "--force", "emnist:"):
            assert words in text
        assert {"pipeline", "shards", "numpy"} <= set(loaded.split())
        assert not {"torch", "torchvision", "timm", "nvidia", "sklearn", "wandb"} & set(loaded.split())


@pytest.fixture
def out(command: Command, tmp_path: Path) -> Path:
    """A pack of the digits with seed 0, to be changed."""
    out = tmp_path / "packs" / "digits"
    assert command("digits", "--out", out).returncode == 0
    return out


class TestExistingPack:
    @pytest.mark.parametrize(
        "option, value, found", [("--seed", 7, "with seed 0"), ("--block-size", 64, "with block size 512")]
    )
    def test_other_settings_are_refused_unless_forced(
        self, command: Command, out: Path, option: str, value: int, found: str
    ) -> None:
        before = snapshot(out)
        assert_user_error(command("digits", "--out", out, option, value), str(out), found, "--force")
        assert snapshot(out) == before

        assert command("digits", "--out", out, option, value, "--force").returncode == 0
        manifest, faults = check_split(out / "train")
        assert faults == []
        assert value in (manifest.seed, manifest.block_size)
        assert [entry.name for entry in out.parent.iterdir()] == ["digits"]

    def test_force_packs_again_even_with_the_same_settings(self, command: Command, out: Path) -> None:
        """The bytes are the same, the files are new."""
        shard_path = out / "train" / "shard-00000.tar"
        before = shard_path.stat().st_ino, shard_path.read_bytes()
        with open(shard_path, "rb"):  # keeps the inode's number from being used again
            assert "packed 1,797 images" in command("digits", "--out", out, "--force").stdout
            assert shard_path.stat().st_ino != before[0]
        assert shard_path.read_bytes() == before[1]

    def test_another_data_set_is_refused(self, command: Command, out: Path, tmp_path: Path) -> None:
        process = command("mnist", "--out", out, "--raw", tmp_path / "none")
        assert_user_error(process, str(out), "data set 'digits'", "--force")
        assert not (tmp_path / "none").exists()

    def test_an_open_store_outlives_the_replacement_of_its_pack(self, command: Command, out: Path) -> None:
        store = open_split(out, "train")
        rows = store.rows.tolist()
        assert command("digits", "--out", out, "--seed", 1, "--force").returncode == 0
        assert store.rows.tolist() == rows
        assert open_split(out, "train").rows.tolist() != rows

    def test_a_pack_without_one_manifest_is_not_taken_for_complete(self, command: Command, out: Path) -> None:
        (out / "test" / "manifest.json").unlink()
        with pytest.raises(UserError):
            open_split(out, "test")
        assert_user_error(command("digits", "--out", out), str(out), "not a complete pack")
        assert_user_error(command("digits", "--out", out, "--force"), str(out), "not a complete pack")


class TestOut:
    def test_an_empty_directory_is_filled(self, command: Command, tmp_path: Path) -> None:
        out = tmp_path / "empty"
        out.mkdir()
        assert command("digits", "--out", out).returncode == 0
        assert Manifest.read(out / "train").samples == 1438

    @pytest.mark.parametrize("options", [(), ("--force",)])
    def test_a_directory_of_something_else_is_refused(
        self, command: Command, tmp_path: Path, options: tuple[str, ...]
    ) -> None:
        out = tmp_path / "thesis"
        out.mkdir()
        (out / "chapter.tex").write_text("two years of work")
        process = command("digits", "--out", out, *options)
        assert_user_error(process, str(out), "not a complete pack", "choose another --out")
        assert snapshot(tmp_path).keys() == {"thesis", "thesis/chapter.tex"}

    @pytest.mark.parametrize("options", [(), ("--force",)])
    def test_a_file_is_refused(self, command: Command, tmp_path: Path, options: tuple[str, ...]) -> None:
        out = tmp_path / "file"
        out.write_text("text")
        assert_user_error(command("digits", "--out", out, *options), str(out))
        assert out.read_text() == "text"

    def test_below_a_file_is_refused(self, command: Command, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("text")
        assert_user_error(command("digits", "--out", tmp_path / "file" / "set"), str(tmp_path / "file"))

    @pytest.mark.skipif(sys.platform != "linux", reason="no place that refuses root as well")
    @pytest.mark.parametrize("options", [(), ("--force",), ("--dry-run",)])
    @pytest.mark.parametrize("out", ["/proc/none", "/proc/none/deeper/set", "/proc", "/"])
    def test_a_place_where_nobody_may_write_is_refused(
        self, command: Command, out: str, options: tuple[str, ...]
    ) -> None:
        process = command("digits", "--out", out, *options)
        if options == ("--dry-run",) and "none" in out:
            assert process.returncode == 0
        else:
            assert_user_error(process)
            assert str(Path(out).parent if "deeper" in out else out) in process.stderr.splitlines()[0]


def test_near_duplicates_are_listed_beside_the_packed_set(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    ended = command("digits", "--out", tmp_path / "sets" / "mine", "--near-duplicates", "report")
    report = tmp_path / "sets" / "mine.near-duplicates.csv"
    assert f"listed in {report}" in ended.stdout + ended.stderr
    assert report.read_text().startswith("part,row,label,")
    assert list((tmp_path / "elsewhere").iterdir()) == []
    report.unlink()
    again = command("digits", "--out", tmp_path / "sets" / "mine", "--near-duplicates", "report-all")
    assert not report.exists()
    assert "near-duplicates: not searched" in again.stdout


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Eight images of two classes, one directory per class."""
    return write_tree(tmp_path / "raw", {f"{n % 2}/{n}.png": picture(pixels(seed=n)) for n in range(8)})


@pytest.mark.parametrize("out", ["", "packed/set", "packed"])
def test_the_output_may_be_inside_the_raw_files(
    command: Command, images: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    monkeypatch.chdir(images)
    options = ("--raw", ".", "--test-fraction", 0.5, *(("--out", out) if out else ()))
    for force in ((), ("--force",)):
        assert command("folder", *options, *force).returncode == 0
        (packed,) = {path.parent.parent for path in images.rglob("train/manifest.json")}
        assert open_split(packed, "train").manifest.classes == ("0", "1")
        assert out or packed.name == "raw", "the name of the directory"
        (packed / "preview.png").write_bytes(picture(pixels()))


def test_one_class_of_readable_images_is_not_packed(command: Command, images: Path, tmp_path: Path) -> None:
    for path in (images / "1").iterdir():
        path.write_bytes(path.read_bytes()[:-20])
    ended = command("folder", "--raw", images, "--out", tmp_path / "out", "--test-fraction", 0.5, "--skip-bad")
    assert_user_error(ended, "readable images of one class in the train split")


class TestExclude:
    """`--exclude FILE` leaves out the images that a table lists."""

    def pack(self, command: Command, images: Path, table: str, *options: object) -> subprocess.CompletedProcess:
        listed = images.parent / "listed.csv"
        listed.write_text(table)
        out = images.parent / "out"
        options = (*options, "--out", out, "--test-fraction", 0.5, "--exclude", listed)
        return command("folder", "--raw", images, *options)

    def test_other_images_stay_in_their_split(self, command: Command, images: Path, tmp_path: Path) -> None:
        command("folder", "--raw", images, "--out", tmp_path / "all", "--test-fraction", 0.5)
        everything = {name: open_split(tmp_path / "all", name) for name in ("train", "test")}
        row, test_row = everything["train"].rows[0], everything["test"].rows[1]
        label = everything["train"].manifest.classes[everything["train"].labels[0]]
        process = self.pack(command, images, f"part,row,label,why\ntrain,{row},{label},blurred\n")
        assert process.returncode == 0, process.stderr
        packed = {name: open_split(tmp_path / "out", name) for name in ("train", "test")}
        assert set(packed["train"].rows) == set(everything["train"].rows) - {row}
        assert set(packed["test"].rows) == set(everything["test"].rows)
        assert_user_error(self.pack(command, images, f"part,row\ntest,{test_row}\n"), "exclude", "--force")
        assert self.pack(command, images, f"part,row\ntest,{test_row}\n", "--force").returncode == 0
        assert set(open_split(tmp_path / "out", "test").rows) == set(everything["test"].rows) - {test_row}

    @pytest.mark.parametrize(
        ("table", "found"),
        [
            ("part,row\ntrain,99\n", "line 2: row 99 of the train split, which is no image"),
            ("part,row\nval,0\n", "line 2: row 0 of the val split, which is no image"),
            ("part,row\ntrain,first\n", "row first of the train split"),
            (f"part,row\ntrain,{'9' * 5000}\n", "line 2: row 999"),
            ("row,name\n1,x\n", "a column of splits, named part"),
            ("part,row\n", "only one line"),
        ],
    )
    def test_a_table_of_other_images_is_refused(self, command: Command, images: Path, table: str, found: str) -> None:
        assert_user_error(self.pack(command, images, table), found)

    def test_a_table_with_other_labels_is_refused(self, command: Command, images: Path, tmp_path: Path) -> None:
        command("folder", "--raw", images, "--out", tmp_path / "all", "--test-fraction", 0.5)
        train = open_split(tmp_path / "all", "train")
        other = train.manifest.classes[1 - train.labels[0]]
        table = f"part,row,label\ntrain,{train.rows[0]},{other}\n"
        assert_user_error(self.pack(command, images, table), f"listed as {other} but labelled")

    def test_labels_are_compared_without_outer_blanks(self, command: Command, images: Path, tmp_path: Path) -> None:
        (images / "1").rename(images / " 1 ")
        command("folder", "--raw", images, "--out", tmp_path / "all", "--test-fraction", 0.5)
        train = open_split(tmp_path / "all", "train")
        row = train.rows[train.labels == train.manifest.classes.index(" 1 ")][0]
        assert self.pack(command, images, f"part,row,label\ntrain,{row}, 1 \n").returncode == 0

    def test_a_split_keeps_an_image(self, command: Command, images: Path, tmp_path: Path) -> None:
        command("folder", "--raw", images, "--out", tmp_path / "all", "--test-fraction", 0.5)
        table = "part,row\n" + "".join(f"test,{row}\n" for row in open_split(tmp_path / "all", "test").rows)
        assert_user_error(self.pack(command, images, table), "all 4 images of the test split")

    def test_a_missing_table_is_named(self, command: Command, images: Path, tmp_path: Path) -> None:
        assert_user_error(command("folder", "--raw", images, "--exclude", tmp_path / "none.csv"), "none.csv")


class TestHints:
    """The command that a hint names does what it says."""

    def test_a_table_in_place_of_its_directory(self, command: Command, images: Path, tmp_path: Path) -> None:
        rows = "".join(f"{n % 2}/{n}.png,{n % 2}\n" for n in range(8))
        (images / "labels.csv").write_text("path,label\n" + rows)
        options = ("--out", tmp_path / "out", "--test-fraction", 0.5)
        process = command("folder", "--raw", images / "labels.csv", *options)
        assert_user_error(process, "labels.csv, a .csv file", f"--raw {images}")
        assert command("folder", "--raw", images, *options).returncode == 0

    def test_images_that_are_not_packed(self, command: Command, images: Path, tmp_path: Path) -> None:
        with pytest.raises(UserError) as caught:
            open_split(images, "train")
        arguments = caught.value.hint.partition("python -m pipeline.shard ")[2].split()
        arguments[-1] = str(tmp_path / "out")
        assert arguments[:3] == ["folder", "--raw", str(images)]
        assert command(*arguments, "--test-fraction", 0.5).returncode == 0
        assert len(open_split(tmp_path / "out", "train")) == 4

    @pytest.mark.parametrize(
        "name, words",
        [
            ("emnist-balanced", "emnist --split balanced --out"),
            ("mnist", "mnist --out"),
            ("cifar100-coarse/train", "cifar100 --split coarse --out"),
            ("mine", "SOURCE --out"),
        ],
    )
    def test_a_data_set_that_is_not_there(self, command: Command, tmp_path: Path, name: str, words: str) -> None:
        with pytest.raises(UserError) as caught:
            Manifest.read(tmp_path / name)
        hint = caught.value.hint
        assert f"python -m pipeline.shard {words} {tmp_path / name.partition('/')[0]}" in hint
        if "SOURCE" not in hint:
            arguments = hint.partition("python -m pipeline.shard ")[2].split()
            assert command(*arguments, "--dry-run", "--raw", tmp_path).returncode == 0


class TestDryRun:
    def test_writes_nothing(self, command: Command, tmp_path: Path) -> None:
        process = command("emnist", "--raw", tmp_path / "raw", "--out", tmp_path / "out", "--dry-run")
        assert process.returncode == 0
        assert "would download https://" in process.stdout
        assert f"would write {tmp_path}/out, one" in process.stdout
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("options", [(), ("--dry-run",), ("--split", "present"), ("--val-fraction", "0.1")])
    def test_a_download_that_could_not_be_packed_is_refused(
        self, command: Command, tmp_path: Path, options: tuple[str, ...]
    ) -> None:
        """39.5 GB that have no test split."""
        kept = [f"--split {options[1]} "] if "--split" in options else []
        assert_user_error(
            command("quickdraw", "--raw", tmp_path / "raw", "--out", tmp_path / "out", *options),
            "quickdraw without --test-fraction",
            f"python -m pipeline.shard quickdraw {' '.join(kept)}--raw {tmp_path}/raw --test-fraction 0.1",
        )
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("option", ["--test-fraction", "--val-fraction"])
    def test_the_hint_for_a_fraction_is_a_fraction(self, command: Command, tmp_path: Path, option: str) -> None:
        assert_user_error(command("digits", option, "1.5", "--out", tmp_path / "out"), f"hint: {option} 0.2")

    def test_says_that_a_complete_pack_would_be_left_alone(self, command: Command, out: Path) -> None:
        before = snapshot(out)
        process = command("digits", "--out", out, "--dry-run")
        assert (process.returncode, process.stdout) == (0, "digits: would leave the complete pack alone\n")
        forced = command("digits", "--out", out, "--dry-run", "--force")
        assert f"would write {out}, one" in forced.stdout
        assert snapshot(out) == before

    def test_counts_images_and_classes(self, command: Command, images: Path, tmp_path: Path) -> None:
        process = command("folder", "--raw", images, "--out", tmp_path / "out", "--test-fraction", 0.25, "--dry-run")
        assert process.returncode == 0 and not (tmp_path / "out").exists()
        assert "  train  6 images of 2 classes\n  test   2 images of 2 classes\n" in process.stdout

    def test_refuses_what_the_run_would_refuse(self, command: Command, out: Path) -> None:
        assert_user_error(command("digits", "--out", out, "--seed", 1, "--dry-run"), "with seed 0", "--force")


class TestArguments:
    @pytest.mark.parametrize(
        "arguments, words",
        [
            (("emnist", "--split", "byclas"), ("'byclas'", "byclass, bymerge, balanced", "--split byclass")),
            (("digits", "--split", "train"), ("'train'", "no --split: digits has none")),
            (("digits", "--block-size", 0), ("--block-size 0", "1 ..")),
            (("digits", "--block-size", -512), ("--block-size -512",)),
            (("digits", "--block-size", 2**21), ("--block-size 2097152",)),
            (("digits", "--seed", -1), ("--seed -1", "0 ..")),
            (("digits", "--seed", 2**63), (f"--seed {2**63}",)),
        ],
    )
    def test_a_wrong_one_is_named(
        self, command: Command, tmp_path: Path, arguments: tuple[object, ...], words: tuple[str, ...]
    ) -> None:
        assert_user_error(command(*arguments, "--out", tmp_path / "out", "--raw", tmp_path / "raw"), *words)
        assert list(tmp_path.iterdir()) == []

    def test_raw_that_is_a_file_is_named(self, command: Command, tmp_path: Path) -> None:
        archive = tmp_path / "gzip.zip"
        archive.write_bytes(b"PK")
        process = command("emnist", "--raw", archive, "--out", tmp_path / "out")
        assert_user_error(process, str(archive), "a directory", f"--raw {tmp_path}")

    @pytest.mark.parametrize("arguments", [("digits", "--block-size", "many"), ("digits", "--blocksize", "5"), ()])
    def test_what_cannot_be_parsed_shows_the_usage(self, command: Command, arguments: tuple[str, ...]) -> None:
        process = command(*arguments)
        assert process.returncode == 2
        assert process.stderr.startswith("usage: python -m pipeline.shard")

    def test_the_largest_seed_and_the_smallest_block_work(self, command: Command, tmp_path: Path) -> None:
        out = tmp_path / "out"
        assert command("digits", "--out", out, "--seed", 2**63 - 1, "--block-size", 1).returncode == 0
        manifest, faults = check_split(out / "test")
        assert (faults, manifest.seed, len(np.load(out / "test" / "blocks.npy"))) == ([], 2**63 - 1, 359)


@pytest.mark.parametrize("source", ["folder", "npz", "parquet", "emnist"])
@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_raw_files_without_an_end_are_refused(tmp_path: Path, source: str, kind: str) -> None:
    path = tmp_path / "raw"
    if kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    process = run_module("pipeline.shard", source, "--raw", path, "--out", tmp_path / "out", cwd=tmp_path, timeout=60)
    assert_user_error(process, f"{path} is not a regular file")
    assert sorted(tmp_path.iterdir()) == [path]


def test_a_published_file_that_is_a_pipe_is_refused(tmp_path: Path) -> None:
    for name in (
        "train-images-idx3-ubyte",
        "train-labels-idx1-ubyte",
        "t10k-images-idx3-ubyte",
        "t10k-labels-idx1-ubyte",
    ):
        os.mkfifo(tmp_path / name)
    process = run_module("pipeline.shard", "mnist", "--raw", tmp_path, "--out", tmp_path / "out", timeout=60)
    assert process.returncode == 2
    assert "Traceback" not in process.stderr
