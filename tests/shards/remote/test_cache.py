"""The cache: where it is, how large it may grow, what it evicts, and what it never does."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from support import warm_process

import shards.remote.cache as cache_module
from shards.errors import UserError
from shards.remote.cache import cache_directory, cache_limit, cache_used, open_entry

posix = pytest.mark.skipif(sys.platform == "win32", reason="no shared locks")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("INKSTREAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("INKSTREAM_CACHE_SIZE", raising=False)
    yield tmp_path / "cache"
    end_of_process()


def end_of_process() -> None:
    """Let go of what this process uses, as its end would."""
    for descriptor in cache_module._descriptors.values():
        os.close(descriptor)
    cache_module._descriptors.clear()


def fill(key: str, size: int, age: float = 0) -> Path:
    """An entry of so many bytes, used `age` seconds ago; it is in use until `end_of_process`."""
    with open_entry("sets", key, "name") as entry:
        entry.make_room(size, f"set {key}")
        entry.content.mkdir(exist_ok=True)
        (entry.content / "file").write_bytes(bytes(size))
    use = entry.directory / ".use"
    os.utime(use, (use.stat().st_atime, use.stat().st_mtime - age))
    return entry.content


def other_process(code: str) -> subprocess.Popen:
    """Run code in a process that imports the cache; it is ready when it has printed a line."""
    text = "from shards.remote.cache import open_entry\n" + textwrap.dedent(code)
    process = warm_process.Popen(
        [sys.executable, "-c", text], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_the_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/anna")
    monkeypatch.delenv("INKSTREAM_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if os.name == "posix":
        assert cache_directory() == Path("/home/anna/.cache/inkstream")
        monkeypatch.setenv("INKSTREAM_CACHE", "~/here")
        assert cache_directory() == Path("/home/anna/here")
        monkeypatch.delenv("INKSTREAM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", os.path.abspath("/xdg"))
    assert cache_directory() == Path(os.path.abspath("/xdg")) / "inkstream"


@posix
def test_without_a_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(_: int) -> None:
        raise KeyError("no such user")

    for name in ("HOME", "INKSTREAM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    with pytest.raises(UserError, match="no home directory") as caught:
        cache_directory()
    assert caught.value.hint == "export INKSTREAM_CACHE=DIR"
    cache_module.mark_unchecked(Path("local"))  # a file that is in no cache


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("200GB", 200 * 10**9),
        ("1.5 TB", 15 * 10**11),
        ("10GiB", 10 << 30),
        ("12345", 12345),
        ("7m", 7 * 10**6),
        ("5K", 5000),
        ("", None),
        ("  ", None),
    ],
)
def test_the_bound(text: str, size: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INKSTREAM_CACHE_SIZE", text)
    assert cache_limit() == size


@pytest.mark.parametrize("text", ["lots", "-5GB", "0", "0GB", "5XB", "5iB", "GB", "1e9", "nan", "0.4", "0.0009K"])
def test_a_bound_that_is_none(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INKSTREAM_CACHE_SIZE", text)
    with pytest.raises(UserError, match="INKSTREAM_CACHE_SIZE") as caught:
        cache_limit()
    assert "200GB" in caught.value.hint


def test_sizes_are_written_as_the_bound_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for count in (0, 7, 1500, 123_456_789, 2 * 10**12):
        text = cache_module.format_size(count)
        if count:
            monkeypatch.setenv("INKSTREAM_CACHE_SIZE", text)
            assert cache_limit() == pytest.approx(count, rel=0.005)


@posix
def test_those_used_longest_ago_are_evicted_first(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INKSTREAM_CACHE_SIZE", "350KB")
    oldest, middle, newest = fill("a", 100_000, age=50), fill("c", 100_000, age=20), fill("b", 100_000, age=10)
    end_of_process()
    last = fill("d", 100_000)
    assert [path.exists() for path in (oldest, middle, newest, last)] == [False, True, True, True]
    assert not oldest.parent.exists()
    end_of_process()
    fill("e", 200_000)
    assert [path.exists() for path in (middle, newest, last)] == [False, False, True]


@posix
def test_looking_into_an_entry_is_a_use(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INKSTREAM_CACHE_SIZE", "250KB")
    one, two = fill("a", 100_000, age=50), fill("b", 100_000, age=20)
    end_of_process()
    with open_entry("sets", "a", "name"):
        pass
    end_of_process()
    fill("c", 100_000)
    assert one.exists()
    assert not two.exists()


@posix
def test_nothing_is_evicted_that_another_process_uses(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INKSTREAM_CACHE_SIZE", "350KB")
    used, idle = fill("a", 100_000, age=50), fill("b", 100_000, age=20)
    end_of_process()
    with other_process(
        """
        with open_entry("sets", "a", "name"):
            pass
        print("ready", flush=True)
        input()
        """
    ) as user:
        os.utime(used.parent / ".use", (0, 0))
        end_of_process()
        fill("c", 200_000)
        assert used.exists()
        assert not idle.exists()
        with pytest.raises(UserError) as caught:
            fill("d", 200_000)
        # c is in use by this process, a by the other.
        assert re.match(r"300\.0.KB of the cache", caught.value.found)
        assert "in use" in caught.value.found
        assert "200.00KB below the limit of 350.00KB" in caught.value.expected
        assert "INKSTREAM_CACHE_SIZE=" in caught.value.hint
        end_of_process()
        user.kill()
        user.wait()
        fill("d", 200_000)
        assert not used.exists(), "what a killed process used is free"


def test_too_large_for_the_bound(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INKSTREAM_CACHE_SIZE", "150KB")
    small = fill("a", 100_000)
    end_of_process()
    with pytest.raises(UserError) as caught:
        fill("b", 200_000)
    assert "set b of 200.00KB" in caught.value.found
    assert "at most 150.00KB" in caught.value.found
    assert "INKSTREAM_CACHE_SIZE=220.00KB" in caught.value.hint
    assert small.exists(), "nothing is evicted for what will not fit anyway"


def test_the_default_bound_is_half_of_the_room(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def room(_: object) -> tuple[int, int, int]:
        return shutil._ntuple_diskusage(10**9, 10**9 - 300_000, 300_000)

    monkeypatch.setattr(shutil, "disk_usage", room)
    fill("a", 100_000)
    end_of_process()
    with pytest.raises(UserError, match=r"at most 200.00KB"):  # (300,000 free + 100,000 used) / 2
        fill("b", 210_000)
    fill("b", 190_000)


@posix
def test_the_disk_counts_as_well_as_the_bound(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INKSTREAM_CACHE_SIZE", "1TB")
    old = fill("a", 100_000, age=10)
    end_of_process()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 0, 50_000))
    with pytest.raises(UserError) as caught:
        fill("b", 200_000)
    assert "150.0" in caught.value.found, "what is free and what may be evicted"
    assert "200.00KB" in caught.value.expected
    assert "INKSTREAM_CACHE=" in caught.value.hint
    assert old.exists()
    end_of_process()
    fill("b", 120_000)
    assert not old.exists()


@posix
def test_what_another_process_is_fetching_has_its_room(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has made room for 200 KB, of which nothing has come yet."""
    monkeypatch.setenv("INKSTREAM_CACHE_SIZE", "250KB")
    with other_process(
        """
        with open_entry("sets", "a", "name") as entry:
            entry.make_room(200_000, "")
            print("ready", flush=True)
            input()
        """
    ) as fetcher:
        with pytest.raises(UserError, match="in use"):
            fill("b", 100_000)
        fill("b", 40_000)
        fetcher.kill()
        fetcher.wait()
        fill("b", 100_000)


@posix
@pytest.mark.parametrize("content", [b"", b"x", b"\xff\0", b"9" * 5000, b"-5", None])
def test_a_size_that_is_not_recorded_counts_as_none(cache: Path, content: bytes | None) -> None:
    """Of an entry in use; None: it is evicted while sizes are read."""
    use = fill("a", 1000).parent / ".use"
    if content is None:
        use.unlink()
        use.symlink_to("nowhere")
    else:
        use.write_bytes(content)
        fill("b", 2000)
    assert cache_used() == (2000 if content is not None else 0)


@posix
def test_one_process_fills_an_entry_and_the_others_wait(cache: Path) -> None:
    code = """
        import time
        from pathlib import Path
        print("ready", flush=True)
        with open_entry("sets", "a", "name") as entry:
            entry.content.mkdir(exist_ok=True)
            log = entry.content / "log"
            begun = log.read_text() if log.exists() else ""
            time.sleep(0.05)
            log.write_text(begun + "x")
    """
    processes = [other_process(code) for _ in range(4)]
    for process in processes:
        assert process.wait() == 0
        process.stdin.close()
        process.stdout.close()
    assert (cache / "sets" / "a" / "name" / "log").read_text() == "xxxx"


@posix
def test_who_waits_is_told(cache: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "_NOTICE_AFTER", 0.1)
    with other_process(
        """
        import time
        with open_entry("sets", "a", "name"):
            print("ready", flush=True)
            time.sleep(0.5)
        """
    ):
        fill("a", 10)
    assert "waiting for another process that fetches name" in caplog.text
    caplog.clear()
    fill("a", 10)
    time.sleep(0.2)
    assert caplog.text == ""


def test_an_entry_that_is_evicted_while_it_is_made_is_made_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, met = os.mkdir, []

    def evicted_meanwhile(path: Any, *arguments: Any) -> None:
        if Path(path).name == "a" and not met:
            met.append(path)
            raise FileExistsError(path)  # and is gone when one looks again
        make(path, *arguments)

    monkeypatch.setattr(os, "mkdir", evicted_meanwhile)
    with open_entry("sets", "a", "name") as entry:
        assert entry.directory.is_dir()
    assert met


@posix
def test_an_evictor_and_a_user_do_not_meet(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Users come and go while the entry is evicted again and again: each finds its own file until its end."""
    monkeypatch.setenv("INKSTREAM_CACHE_SIZE", "150KB")
    user = """
        import os, time
        from shards.remote import cache as cache_module
        print("ready", flush=True)
        for _ in range(60):
            with open_entry("sets", "a", "name") as entry:
                try:
                    entry.make_room(100_000, "a")
                except cache_module.UserError:
                    continue  # the other entry is in use
                entry.content.mkdir(exist_ok=True)
                (entry.content / "file").write_bytes(bytes(100_000))
            assert (entry.content / "file").stat().st_size == 100_000
            for descriptor in cache_module._descriptors.values():
                os.close(descriptor)
            cache_module._descriptors.clear()
            time.sleep(0.003)
    """
    with other_process(user) as process:
        evicted = 0
        for _ in range(60):
            try:
                fill("b", 100_000)
                evicted += 1
            except UserError:
                pass
            end_of_process()
            time.sleep(0.003)
        process.stdin.close()
        assert process.wait() == 0
    assert evicted


def test_eviction_without_shared_locks(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows, where the system itself keeps open files."""
    monkeypatch.setattr(cache_module, "fcntl", None)
    monkeypatch.setenv("INKSTREAM_CACHE_SIZE", "150KB")
    old = fill("a", 100_000)
    end_of_process()
    fill("b", 100_000)
    assert not old.exists()


def test_what_a_killed_evictor_left_is_removed(cache: Path) -> None:
    leftover = cache / "sets" / ".evicted-a" / "name"
    leftover.mkdir(parents=True)
    fill("b", 1000)
    assert not leftover.parent.exists()


@posix
def test_an_entry_removed_by_hand_is_made_anew(cache: Path) -> None:
    content = fill("a", 1000)
    shutil.rmtree(cache)
    assert fill("a", 1000) == content
    assert content.is_dir()


@posix
def test_on_a_file_system_without_locks(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", refuse)
    assert (fill("a", 10) / "file").stat().st_size == 10
    assert "file system without locks" in caplog.text


@posix
def test_a_cache_that_may_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("INKSTREAM_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError) as caught:
        fill("a", 10)
    assert str(tmp_path / "file") in caught.value.found
