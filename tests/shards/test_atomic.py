"""What is written appears whole or not at all, whatever kills the writer; here it is killed for real."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import gzip
import os
import resource
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
from conftest import ROOT, assert_user_error, pack_splits, run_module, synthetic_splits
from filelock import FileLock, Timeout
from support import warm_process

import shards.atomic
from pipeline.packing.pack import PackSettings, pack
from shards import UserError
from shards.atomic import (
    append_line,
    check_writable,
    file_lock,
    read_file,
    replace_directory,
    replace_file,
    staging_directory,
    write_file,
)
from shards.manifest import REQUIRED_SPLITS, is_packed_dataset
from shards.verify.check import check_split

IMAGES = 60_000


class Interrupted(Exception):
    """What goes wrong in the middle of writing."""


class TestReplaceFile:
    def test_the_new_content_takes_the_place_of_the_old(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        path.write_text("old")
        with replace_file(path) as file:
            file.write(b"new")
            assert path.read_text() == "old"
        assert path.read_text() == "new"
        assert list(tmp_path.iterdir()) == [path]

    @pytest.mark.parametrize("old", [None, "old"])
    def test_a_failure_leaves_what_was_there(self, tmp_path: Path, old: str | None) -> None:
        path = tmp_path / "file"
        if old:
            path.write_text(old)
        with pytest.raises(Interrupted), replace_file(path) as file:
            file.write(b"half")
            raise Interrupted
        assert [entry.read_text() for entry in tmp_path.iterdir()] == ([old] if old else [])

    def test_a_failure_to_rename_leaves_what_was_there(self, tmp_path: Path) -> None:
        """A directory stands where the file should go."""
        (tmp_path / "place").mkdir()
        with pytest.raises(OSError):
            write_file(tmp_path / "place", "text")
        assert [entry.name for entry in tmp_path.iterdir()] == ["place"]

    def test_the_leftover_of_a_killed_writer_is_overwritten(self, tmp_path: Path) -> None:
        (tmp_path / ".file.partial").write_text("a much longer text that a killed writer left")
        write_file(tmp_path / "file", "whole")
        assert {entry.name: entry.read_text() for entry in tmp_path.iterdir()} == {"file": "whole"}

    def test_a_pipe_is_written_to_and_a_link_stays(self, tmp_path: Path) -> None:
        pipe, link = tmp_path / "pipe", tmp_path / "link"
        os.mkfifo(pipe)
        link.symlink_to("file")
        with ThreadPoolExecutor(1) as pool:
            reader = pool.submit(pipe.read_text)
            for path in (pipe, link):
                check_writable(path)
                write_file(path, "text")
            assert reader.result() == "text"
        assert pipe.is_fifo() and link.is_symlink() and link.read_text() == "text"

    def test_text_is_written_as_utf8(self, tmp_path: Path) -> None:
        write_file(tmp_path / "file", "é ✓")
        assert (tmp_path / "file").read_bytes() == "é ✓".encode()


def write_version(directory: Path, text: str) -> None:
    (directory / "content").write_text(text)


def version(directory: Path) -> str:
    assert [entry.name for entry in directory.iterdir()] == ["content"]
    return (directory / "content").read_text()


class TestAppendLine:
    def test_each_line_is_complete(self, tmp_path: Path) -> None:
        path = tmp_path / "lines"
        append_line(path, "one")
        append_line(path, "two \u4e00")
        assert path.read_text(encoding="utf-8") == "one\ntwo \u4e00\n"

    @pytest.mark.parametrize("left", ["one\ntw", "tw"])
    def test_the_incomplete_line_of_a_killed_writer_is_removed(self, tmp_path: Path, left: str) -> None:
        (tmp_path / "lines").write_text(left)
        append_line(tmp_path / "lines", "three")
        assert (tmp_path / "lines").read_text() == left.removesuffix("tw") + "three\n"

    def test_a_full_disk_leaves_the_file_as_it_was(self, tmp_path: Path) -> None:
        """In the middle of the line."""
        path, limits = tmp_path / "lines", resource.getrlimit(resource.RLIMIT_FSIZE)
        append_line(path, "one")
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
        try:
            with pytest.raises(OSError) as caught:
                append_line(path, "x" * 100)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert caught.value.errno == errno.EFBIG and caught.value.filename == str(path)
        assert path.read_text() == "one\n"


@pytest.fixture(params=["EINVAL", "ENOSYS", "ENOTSUP"])
def no_sync(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that refuses to flush directories."""
    refuse_sync(monkeypatch, stat.S_ISDIR, getattr(errno, request.param))


def refuse_sync(monkeypatch: pytest.MonkeyPatch, is_refused: Callable[[int], bool], number: int) -> None:
    fsync = os.fsync

    def refuse(descriptor: int) -> None:
        if is_refused(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)


@pytest.mark.usefixtures("no_sync")
def test_a_file_system_that_cannot_flush_directories(tmp_path: Path) -> None:
    write_file(tmp_path / "file", "text")
    assert (tmp_path / "file").read_text() == "text"
    for text in ("old", "new"):
        with replace_directory(tmp_path / "target") as replacement:
            write_version(replacement.path, text)
            replacement.commit()
        assert version(tmp_path / "target") == text
    pack_splits(synthetic_splits(train=20, test=5), tmp_path / "set", store="zarr")
    assert check_split(tmp_path / "set" / "train")[1] == []


@pytest.mark.parametrize("kind, number", [(stat.S_ISDIR, errno.EIO), (stat.S_ISREG, errno.EINVAL)])
def test_a_flush_that_fails_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Callable[[int], bool], number: int
) -> None:
    refuse_sync(monkeypatch, kind, number)
    with pytest.raises(OSError) as caught:
        write_file(tmp_path / "file", "text")
    assert caught.value.errno == number


def test_a_file_system_without_locks_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", refuse)
    for _ in range(2):
        with file_lock(tmp_path / "lock"):
            pass
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path} is on a file system without locks: run one process at a time"
    ]


def stale(monkeypatch: pytest.MonkeyPatch, target: str, answers: list[bool]) -> None:
    """Let a function that locks or opens a file fail as on NFS, where another host has removed it, or not."""
    module, _, name = target.partition(".")
    function = getattr(sys.modules[module], name)

    def call(*arguments: object) -> object:
        is_unlock = name == "flock" and arguments[1] == fcntl.LOCK_UN
        if not is_unlock and answers and answers.pop(0):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return function(*arguments)

    monkeypatch.setattr(target, call)


@pytest.mark.parametrize("busy", [None, UserError("a writer", "none", "wait")], ids=["waits", "refuses"])
@pytest.mark.parametrize("function", ["fcntl.flock", "os.open"])
@pytest.mark.parametrize("times", [1, 3])
def test_a_lock_file_that_another_host_has_removed_is_created_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, times: int, busy: UserError | None
) -> None:
    answers = [True] * times
    stale(monkeypatch, function, answers)
    with file_lock(tmp_path / "lock", busy):
        assert answers == [] and (tmp_path / "lock").exists()
        with pytest.raises(Timeout):
            FileLock(tmp_path / "lock", timeout=0, is_singleton=False).acquire()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("seconds", [0.1, 10.0])
def test_a_lock_file_that_is_removed_during_the_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    """After the message about the wait, and before it."""
    monkeypatch.setattr(shards.atomic, "_WAIT_SILENTLY", seconds)
    holder = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(holder, fcntl.LOCK_EX)
    answers = [False] * 6 + [True]
    stale(monkeypatch, "fcntl.flock", answers)
    with ThreadPoolExecutor(1) as pool:
        released = pool.submit(lambda: (time.sleep(0.5), os.close(holder)))
        with file_lock(tmp_path / "lock"):
            assert answers == []
        released.result()


def test_a_lock_file_that_stays_stale_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards.atomic, "_WAIT_SILENTLY", 0.2)
    for function in ("fcntl.flock", "os.open"):
        with monkeypatch.context() as patch:
            stale(patch, function, [True] * 1000)
            with (
                pytest.raises(UserError, match=f"{os.strerror(errno.ESTALE)}: {tmp_path}/lock"),
                file_lock(tmp_path / "lock"),
            ):
                pytest.fail("locked")


@pytest.mark.parametrize("removes_open_files", [True, False])
def test_a_lock_file_is_removed_under_the_lock_if_the_system_removes_open_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, removes_open_files: bool
) -> None:
    """Windows does not; there, another process may hold the file again when it is to be removed."""
    path, held = tmp_path / "lock", []

    def unlink(self: Path, missing_ok: bool = False) -> None:
        try:
            with FileLock(path, timeout=0):
                held.append(False)
        except Timeout:
            held.append(True)
        if not removes_open_files:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(shards.atomic, "_REMOVES_OPEN_FILES", removes_open_files)
    monkeypatch.setattr(Path, "unlink", unlink)
    with file_lock(path):
        pass
    assert held == [removes_open_files]
    with FileLock(path, timeout=0):
        pass


@pytest.mark.skipif(os.name != "posix", reason="the lock is another function there")
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_acquisition_leaves_no_lock_and_no_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signum: int
) -> None:
    import fcntl

    flock = fcntl.flock

    def signalled(descriptor: int, operation: int) -> None:
        flock(descriptor, operation)
        os.kill(os.getpid(), signum)

    def handler(*_: object) -> NoReturn:
        raise Interrupted

    before = signal.signal(signum, handler)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(fcntl, "flock", signalled)
            with pytest.raises(Interrupted), replace_directory(tmp_path / "parent" / "target"):
                pytest.fail("the signal was lost")
        assert signal.getsignal(signum) is handler
        assert list(tmp_path.iterdir()) == []
        with replace_directory(tmp_path / "target") as replacement:
            replacement.commit()
    finally:
        signal.signal(signum, before)


def test_renames_wait_for_other_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows, where a virus scanner has each new file open at first."""
    replace, held = os.replace, list[Path]()

    def replace_later(source: Path, target: Path) -> None:
        if source not in held:
            held.append(source)
            raise PermissionError(errno.EACCES, "Permission denied", str(source))
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_later)
    monkeypatch.setattr(shards.atomic, "_exchange", lambda *_: False)
    monkeypatch.setattr(shards.atomic, "_RENAME_SECONDS", 10.0)
    write_file(tmp_path / "file", "new")
    for content in ("old", "new"):
        with replace_directory(tmp_path / "target") as replacement:
            write_version(replacement.path, content)
            replacement.commit()
    assert (tmp_path / "file").read_text() == version(tmp_path / "target") == "new"
    assert [path.name for path in held] == [".file.partial", "new", "target", "new"]


class TestReplaceDirectory:
    @pytest.fixture
    def target(self, tmp_path: Path) -> Path:
        return tmp_path / "some" / "where" / "target"

    @pytest.fixture
    def old(self, target: Path) -> Path:
        target.mkdir(parents=True)
        write_version(target, "old")
        return target

    def test_a_new_directory_appears_at_commit_and_not_before(self, target: Path) -> None:
        with replace_directory(target) as replacement:
            write_version(replacement.path, "new")
            assert not target.exists()
            replacement.commit()
            assert version(target) == "new"
        assert list(target.parent.iterdir()) == [target]

    def test_an_old_directory_stays_whole_until_commit(self, old: Path) -> None:
        with replace_directory(old) as replacement:
            write_version(replacement.path, "new")
            assert version(old) == "old"
            replacement.commit()
        assert version(old) == "new"
        assert list(old.parent.iterdir()) == [old]

    def test_without_commit_nothing_changes(self, old: Path) -> None:
        with replace_directory(old) as replacement:
            write_version(replacement.path, "new")
        assert version(old) == "old"
        assert list(old.parent.iterdir()) == [old]

    def test_a_failure_leaves_the_old(self, old: Path) -> None:
        with pytest.raises(Interrupted), replace_directory(old) as replacement:
            write_version(replacement.path, "half")
            raise Interrupted
        assert version(old) == "old"
        assert list(old.parent.iterdir()) == [old]

    def test_a_failure_between_the_two_renames_puts_the_old_back(
        self, old: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rename = os.replace
        monkeypatch.setattr(shards.atomic, "_exchange", lambda *_: False)  # as on a system without it

        def fail_at_the_second(source: Path, place: Path) -> None:
            if Path(source).name == "new":
                raise Interrupted
            rename(source, place)

        monkeypatch.setattr(shards.atomic.os, "replace", fail_at_the_second)
        with pytest.raises(Interrupted), replace_directory(old) as replacement:
            replacement.commit()
        assert version(old) == "old"
        assert list(old.parent.iterdir()) == [old]

    @pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
    def test_the_old_is_replaced_either_way(self, old: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool) -> None:
        if not exchange:
            monkeypatch.setattr(shards.atomic, "_exchange", lambda *_: False)
        with replace_directory(old) as replacement:
            write_version(replacement.path, "new")
            replacement.commit()
        assert version(old) == "new"
        assert list(old.parent.iterdir()) == [old]

    @pytest.mark.skipif(sys.platform != "linux", reason="other systems rename twice")
    def test_a_directory_exists_at_every_moment(self, old: Path) -> None:
        """Another thread replaces it, thirty times or more, while this one reads it."""
        found: set[str] = set()
        last = ""

        def replace_often() -> None:
            nonlocal last
            for number in range(10_000):
                if number >= 30 and len(found) > 2:
                    return
                last = f"new {number}"
                with replace_directory(old) as replacement:
                    write_version(replacement.path, last)
                    replacement.commit()

        with ThreadPoolExecutor(1) as pool:
            writer = pool.submit(replace_often)
            while not writer.done():
                found.add((old / "content").read_text())
            writer.result()
        assert len(found) > 2
        assert version(old) == last

    @pytest.mark.skipif(sys.platform != "linux", reason="other systems rename twice")
    def test_a_file_system_that_cannot_exchange_is_renamed_twice(self, old: Path, tmp_path: Path) -> None:
        """The target is a mount point or, here, gone: renameat2 refuses."""
        assert not shards.atomic._exchange(old, tmp_path / "missing")
        assert version(old) == "old"

    @pytest.mark.parametrize("change", ["created", "filled", "replaced"])
    def test_a_target_that_another_process_changes_meanwhile_is_left_alone(self, old: Path, change: str) -> None:
        target = old.with_name("new") if change == "created" else old
        with pytest.raises(UserError, match="by another process meanwhile") as caught, replace_directory(target) as new:
            write_version(new.path, "new")
            if change == "replaced":
                shutil.rmtree(old)
            target.mkdir(exist_ok=True)
            (target / "other").touch()
            new.commit()
        assert (target / "other").exists()
        assert version(Path(caught.value.hint.rpartition(" ")[2])) == "new"
        assert not staging_directory(target).exists()

    def test_the_result_is_kept_if_the_system_refuses_to_replace_the_target(
        self, old: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """For instance a directory of another user in /tmp."""
        rename = os.replace

        def replace(source: Path, place: Path) -> None:
            if source == old:
                raise PermissionError(errno.EPERM, "Operation not permitted", str(old))
            rename(source, place)

        monkeypatch.setattr(shards.atomic, "_exchange", lambda *_: False)
        monkeypatch.setattr(shards.atomic.os, "replace", replace)
        with pytest.raises(UserError, match="not permitted") as caught, replace_directory(old) as new:
            write_version(new.path, "new")
            new.commit()
        assert version(old) == "old"
        assert version(Path(caught.value.hint.rpartition(" ")[2])) == "new"

    def test_the_result_is_kept_where_it_is_if_the_system_refuses_every_rename(
        self, target: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """For instance Windows, while another program holds one of the new files open."""

        def replace(source: Path, place: Path) -> None:
            raise PermissionError(errno.EACCES, "Permission denied", str(source))

        monkeypatch.setattr(shards.atomic.os, "replace", replace)
        with pytest.raises(UserError, match="Permission denied") as caught, replace_directory(target) as new:
            write_version(new.path, "new")
            new.commit()
        assert version(Path(caught.value.hint.rpartition(" ")[2])) == "new" and not target.exists()

    @pytest.mark.parametrize("where", [".", "..", "mount point"])
    def test_a_target_that_cannot_be_renamed_is_refused_before_the_work(
        self, old: Path, monkeypatch: pytest.MonkeyPatch, where: str
    ) -> None:
        monkeypatch.chdir(old)
        if where == "mount point":
            monkeypatch.setattr(shards.atomic.os.path, "ismount", lambda path: path == old)
            where, found = str(old), "a mount point"
        else:
            found = "holds the working directory"
        with pytest.raises(UserError, match=found), replace_directory(Path(where)):
            pytest.fail("the work would be lost")
        assert version(old) == "old"

    def test_a_link_stays_and_the_directory_that_it_names_is_replaced(self, old: Path, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to(old)
        (tmp_path / "dangling").symlink_to(tmp_path / "no" / "such")
        for path in (tmp_path / "link", tmp_path / "dangling", tmp_path / "link" / ".." / "new"):
            with replace_directory(path) as replacement:
                write_version(replacement.path, "new")
                replacement.commit()
            assert version(path) == "new"
        assert version(old) == version(tmp_path / "no" / "such") == "new" and (tmp_path / "dangling").is_symlink()

    def test_a_second_writer_is_refused_and_harms_nothing(self, old: Path) -> None:
        with replace_directory(old) as first:
            write_version(first.path, "first")
            with pytest.raises(UserError, match="another process that is writing"), replace_directory(old):
                pytest.fail("two writers at once")
            first.commit()
        assert version(old) == "first"
        assert list(old.parent.iterdir()) == [old]

    def test_a_second_writer_is_refused_until_the_first_has_cleaned_up(
        self, old: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Else the first one, removing its staging directory, would remove the second one's work."""
        remove = shutil.rmtree
        refused = []

        def second_writer_comes(path: Path, **options: bool) -> None:
            if path == staging_directory(old):
                monkeypatch.setattr(shards.atomic.shutil, "rmtree", remove)
                with pytest.raises(UserError), replace_directory(old):
                    pytest.fail("the second writer's files would now be removed")
                refused.append(True)
            remove(path, **options)

        with replace_directory(old):
            monkeypatch.setattr(shards.atomic.shutil, "rmtree", second_writer_comes)
        assert refused == [True]
        assert list(old.parent.iterdir()) == [old]

    def test_writers_of_different_targets_do_not_meet(self, tmp_path: Path) -> None:
        with replace_directory(tmp_path / "one") as one, replace_directory(tmp_path / "other") as other:
            write_version(one.path, "one")
            write_version(other.path, "other")
            one.commit()
            other.commit()
        assert version(tmp_path / "one") == "one"
        assert version(tmp_path / "other") == "other"

    @pytest.mark.parametrize("moment", ["while writing", "between the renames", "before cleaning up"])
    def test_a_writer_killed_at_a_bad_moment_is_recovered_from(self, old: Path, moment: str) -> None:
        """A real process that ends without any cleaning up, as if by SIGKILL, at the moment in question."""
        code = {
            "while writing": "os._exit(9)",
            "between the renames": "os.replace(target, replacement._old); os._exit(9)",
            "before cleaning up": "replacement.commit(); os._exit(9)",
        }[moment]
        program = f"""
import os
import resource
from pathlib import Path
from shards.atomic import read_file, replace_directory
target = Path({str(old)!r})
with replace_directory(target) as replacement:
    (replacement.path / "content").write_text("new")
    {code}
"""
        assert warm_process.run([sys.executable, "-c", program], cwd=ROOT, timeout=60).returncode == 9
        assert staging_directory(old).exists()
        assert old.exists() == (moment != "between the renames")
        with replace_directory(old) as replacement:
            assert version(old) == ("new" if moment == "before cleaning up" else "old")
            assert list(replacement.path.iterdir()) == []
        assert list(old.parent.iterdir()) == [old]


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60,000 images of noise in EMNIST's files, so that packing takes long enough to be killed in its midst."""
    directory = tmp_path_factory.mktemp("raw")
    random = np.random.default_rng(0)
    (directory / "emnist-byclass-mapping.txt").write_text("".join(f"{n} {48 + n}\n" for n in range(10)))
    for part, count in (("train", IMAGES - 1000), ("test", 1000)):
        images = struct.pack(">HBB3I", 0, 8, 3, count, 28, 28) + random.bytes(count * 784)
        labels = struct.pack(">HBBI", 0, 8, 1, count) + random.integers(0, 10, count, dtype=np.uint8).tobytes()
        for what, content in (("images-idx3", images), ("labels-idx1", labels)):
            path = directory / f"emnist-byclass-{part}-{what}-ubyte.gz"
            path.write_bytes(gzip.compress(content, compresslevel=1))
    return directory


def start_packing(raw: Path, out: Path, *options: object) -> subprocess.Popen:
    command = [sys.executable, "-m", "pipeline.shard", "emnist", "--raw", raw, "--out", out, *options]
    return warm_process.Popen(
        list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(name: str, process: subprocess.Popen, staging: Path) -> None:
    """Wait until a file or directory of a name appears in the staging directory, or the process ends."""
    deadline = time.monotonic() + 60
    while process.poll() is None:
        assert time.monotonic() < deadline, f"no {name} in {staging}"
        if any(name in (*directories, *files) for _, directories, files in os.walk(staging)):
            return
        time.sleep(0.002)


def status_after(signal_number: int, process: subprocess.Popen) -> int:
    process.send_signal(signal_number)
    process.communicate(timeout=60)
    return process.returncode


def seed_of_complete(out: Path) -> int:
    """The seed of a pack, every byte of which was checked."""
    assert is_packed_dataset(out)
    checked = [check_split(out / part) for part in REQUIRED_SPLITS]
    assert [faults for _, faults in checked] == [[], []]
    assert [manifest.samples for manifest, _ in checked] == [IMAGES - 1000, 1000]
    (seed,) = {manifest.seed for manifest, _ in checked}
    return seed


def assert_stands_alone(out: Path) -> None:
    assert [entry.name for entry in out.parent.iterdir()] == [out.name]


# What must have appeared before the kill, and the seconds after it: from the beginning of the work to its end.
MOMENTS = [
    ("lock", 0.0),
    ("lock", 0.1),
    ("train", 0.0),
    ("shard-00000.tar", 0.0),
    ("shard-00001.tar", 0.02),
    ("shard-00001.idx", 0.0),
    ("test", 0.0),
    ("manifest.json", 0.0),
]


class TestKilledPacking:
    def test_killed_again_and_again_the_pack_is_absent_or_complete(self, raw: Path, tmp_path: Path) -> None:
        """Each run finds what the killed one before it left."""
        out = tmp_path / "set"
        statuses = []
        for name, seconds in MOMENTS:
            process = start_packing(raw, out)
            wait_for(name, process, staging_directory(out))
            time.sleep(seconds)
            statuses.append(status_after(signal.SIGKILL, process))
            if out.exists():
                assert seed_of_complete(out) == 0
        assert statuses.count(-signal.SIGKILL) >= 6
        process = run_module("pipeline.shard", "emnist", "--raw", raw, "--out", out)
        assert process.returncode == 0, process.stderr
        assert seed_of_complete(out) == 0
        assert_stands_alone(out)

    def test_killed_while_replacing_a_pack_the_old_or_the_new_one_stands(self, raw: Path, tmp_path: Path) -> None:
        """Every run has a seed of its own, by which the pack that stands is known."""
        out = tmp_path / "set"
        process = run_module("pipeline.shard", "emnist", "--raw", raw, "--out", out)
        assert process.returncode == 0, process.stderr
        standing = 0
        statuses = []
        for seed, (name, seconds) in enumerate([*MOMENTS, ("old", 0.0)], start=1):
            process = start_packing(raw, out, "--force", "--seed", seed)
            wait_for(name, process, staging_directory(out))
            time.sleep(seconds)
            statuses.append(status_after(signal.SIGKILL, process))
            if sys.platform == "linux" or out.exists():
                found = seed_of_complete(out)
                assert found in (standing, seed)
                standing = found
            else:
                assert seed_of_complete(staging_directory(out) / "old") == standing
        assert statuses.count(-signal.SIGKILL) >= 6
        process = run_module("pipeline.shard", "emnist", "--raw", raw, "--out", out, "--seed", standing)
        assert process.returncode == 0, process.stderr
        assert "already packed" in process.stdout
        assert seed_of_complete(out) == standing
        assert_stands_alone(out)

    def test_terminated_before_the_first_shard_it_leaves_nothing(self, raw: Path, tmp_path: Path) -> None:
        out = tmp_path / "set"
        process = start_packing(raw, out)
        wait_for("lock", process, staging_directory(out))
        assert status_after(signal.SIGTERM, process) == 128 + signal.SIGTERM
        assert list(tmp_path.iterdir()) == []

    def test_terminated_it_leaves_only_what_the_next_call_continues_with(self, raw: Path, tmp_path: Path) -> None:
        out = tmp_path / "set"
        process = start_packing(raw, out)
        wait_for("test", process, staging_directory(out))
        assert status_after(signal.SIGTERM, process) == 128 + signal.SIGTERM
        assert list(tmp_path.iterdir()) == [staging_directory(out)]
        process = run_module("pipeline.shard", "emnist", "--raw", raw, "--out", out)
        assert "complete shards of a stopped call" in process.stderr
        assert seed_of_complete(out) == 0
        assert_stands_alone(out)

    def test_terminated_while_replacing_a_pack_it_leaves_the_old(
        self, synthetic_set: Path, raw: Path, tmp_path: Path
    ) -> None:
        out = Path(shutil.copytree(synthetic_set, tmp_path / "set"))
        before = (out / "train" / "manifest.json").read_bytes()
        process = start_packing(raw, out, "--force")
        wait_for("shard-00000.tar", process, staging_directory(out))
        assert status_after(signal.SIGTERM, process) == 128 + signal.SIGTERM
        assert (out / "train" / "manifest.json").read_bytes() == before
        assert {entry.name for entry in tmp_path.iterdir()} <= {out.name, staging_directory(out).name}

    def test_a_second_process_is_refused_and_the_first_one_ends_well(self, raw: Path, tmp_path: Path) -> None:
        out = tmp_path / "set"
        first = start_packing(raw, out)
        wait_for("shard-00000.tar", first, staging_directory(out))
        first.send_signal(signal.SIGSTOP)
        try:
            second = run_module("pipeline.shard", "emnist", "--raw", raw, "--out", out)
        finally:
            first.send_signal(signal.SIGCONT)
        assert_user_error(second, "another process that is writing", str(out))
        _, errors = first.communicate(timeout=60)
        assert first.returncode == 0, errors
        assert seed_of_complete(out) == 0
        assert_stands_alone(out)


class TestFailedPacking:
    def test_raw_files_that_cannot_be_read_leave_the_old_pack(self, synthetic_set: Path, tmp_path: Path) -> None:
        out = Path(shutil.copytree(synthetic_set, tmp_path / "set"))
        before = (out / "train" / "manifest.json").read_bytes()
        with pytest.raises(Interrupted):
            pack(fail, out, PackSettings("synthetic", block_size=64, seed=1), force=True)
        assert (out / "train" / "manifest.json").read_bytes() == before
        assert {entry.name for entry in tmp_path.iterdir()} <= {out.name, staging_directory(out).name}

    def test_images_that_cannot_be_read_leave_nothing(self, tmp_path: Path) -> None:
        """The failure happens in a thread that writes a shard."""
        parts = tuple(dataclasses.replace(part, read=fail) for part in synthetic_splits())
        with pytest.raises(Interrupted):
            pack_splits(parts, tmp_path / "set")
        assert list(tmp_path.iterdir()) == []


def fail(*_: object) -> NoReturn:
    raise Interrupted


class TestReadFile:
    @pytest.fixture(autouse=True)
    def in_bounded_time(self) -> Iterator[None]:
        with_alarm = signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.alarm(20)
        yield
        signal.alarm(0)
        signal.signal(signal.SIGALRM, with_alarm)

    def test_up_to_the_limit(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        path.write_bytes(b"12345")
        assert read_file(path, 5) == b"12345"
        with pytest.raises(UserError, match="more than 4 bytes"):
            read_file(path, 4)

    def test_a_file_without_an_end(self, tmp_path: Path) -> None:
        with open(tmp_path / "file", "wb") as file:
            file.truncate(1 << 40)
        with pytest.raises(UserError, match="more than 9 bytes"):
            read_file(tmp_path / "file", 9)

    @pytest.mark.parametrize("kind", ["directory", "fifo", "socket", "device", "device behind a link"])
    def test_what_is_no_file(self, kind: str, tmp_path: Path) -> None:
        path = tmp_path / "it"
        if kind == "directory":
            path.mkdir()
        elif kind == "fifo":
            os.mkfifo(path)
        elif kind == "socket":
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(str(path))
        elif kind == "device":
            path = Path("/dev/zero")
        else:
            path.symlink_to("/dev/zero")
        with pytest.raises(UserError) as caught:
            read_file(path, 100)
        assert caught.value.found == f"{path}: not a regular file"

    def test_a_loop_of_links(self, tmp_path: Path) -> None:
        (tmp_path / "a").symlink_to("b")
        (tmp_path / "b").symlink_to("a")
        with pytest.raises(UserError, match=f"symbolic links: {tmp_path}/a"):
            read_file(tmp_path / "a", 100)

    @pytest.mark.parametrize("name", ["missing", "missing/below"])
    def test_no_file(self, name: str, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            read_file(tmp_path / name, 100)

    @pytest.mark.parametrize("name", ["a\0b", "x" * 5000])
    def test_no_path(self, name: str, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"null (byte|character)|name too long"):
            read_file(tmp_path / name, 100)
