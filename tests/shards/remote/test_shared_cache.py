"""A cache that another user has filled, and that this user may only read."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest

import shards.remote.cache as cache_module
from shards import UserError, open_split
from shards.atomic import file_lock
from shards.remote import base, datasets
from shards.remote.base import TransientError
from shards.remote.cache import open_entry
from shards.remote.datasets import resolve_dataset, resolve_files

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no users without permission to write")
SET, RAW = "memory://shared/set", "memory://shared/raw"
NOBODY = 65534


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, synthetic_set: Path) -> Iterator[Path]:
    """An empty cache below a directory that all users may enter, and two addresses in memory."""
    root = Path(tempfile.mkdtemp())
    root.chmod(0o755)
    monkeypatch.setenv("INKSTREAM_CACHE", str(root / "cache"))
    monkeypatch.delenv("INKSTREAM_CACHE_SIZE", raising=False)
    monkeypatch.setattr(base, "FIRST_PAUSE", 0.001)
    memory = fsspec.filesystem("memory")
    memory.put(str(synthetic_set), "/shared/set", recursive=True)
    memory.pipe("/shared/raw/a", b"raw a")
    memory.pipe("/shared/raw/b", b"raw b")
    before = os.umask(0o022)
    yield root / "cache"
    os.umask(before)
    memory.rm("/shared", recursive=True)
    end_of_process()
    shutil.rmtree(root)


def end_of_process() -> None:
    for descriptor in cache_module._descriptors.values():
        os.close(descriptor)
    cache_module._descriptors.clear()


@contextlib.contextmanager
def other_user(directory: Path) -> Iterator[None]:
    """Be a user who may only read what is in a directory: another one if this is root, which may write everything."""
    end_of_process()
    paths = [directory, *directory.rglob("*")]
    if os.geteuid():
        for path in paths:
            path.chmod(path.stat().st_mode & ~0o222)
    else:
        os.setegid(NOBODY)
        os.seteuid(NOBODY)
    before = contents(directory)
    try:
        yield
        assert contents(directory) == before
    finally:
        if os.geteuid() == NOBODY:
            os.seteuid(0)
            os.setegid(0)
        for path in paths:
            path.chmod(path.stat().st_mode | 0o200)


def contents(directory: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in directory.rglob("*")}


def entry_of(directory: Path) -> Path:
    return directory.parent


def test_a_complete_data_set_is_used(
    cache: Path, synthetic_set: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    directory = resolve_dataset(SET)
    local = open_split(synthetic_set, "train").read(np.arange(20))
    with other_user(cache):
        for _ in range(2):
            assert resolve_dataset(SET) == directory
        assert resolve_dataset(SET, whole=True) == directory
        np.testing.assert_array_equal(open_split(SET, "train").read(np.arange(20)), local)

        def no_network(*_: object) -> None:
            raise TransientError(SET, "no network")

        monkeypatch.setattr(datasets, "_read_manifests", no_network)
        assert resolve_dataset(SET) == directory
    assert "the copy in" in caplog.text


def test_raw_files_are_used_as_long_as_they_are_those_of_the_address(cache: Path) -> None:
    directory = resolve_files(RAW)
    with other_user(cache):
        assert resolve_files(RAW) == directory
        fsspec.filesystem("memory").pipe("/shared/raw/a", b"another")
        with pytest.raises(UserError, match="with other files than memory://shared/raw") as caught:
            resolve_files(RAW)
        assert "export INKSTREAM_CACHE=$PWD/cache" in caught.value.hint


@pytest.mark.parametrize("damage", ["absent", "changed", "manifest"])
def test_what_is_incomplete_or_damaged_is_refused(cache: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And another cache, which the hint names, is filled."""
    directory = resolve_dataset(SET)
    shard = next((directory / "train").glob("shard*.tar"))
    if damage == "absent":
        shard.unlink()
    else:
        file = shard if damage == "changed" else directory / "train" / "manifest.json"
        file.write_bytes(b"x" * file.stat().st_size)
    with other_user(cache), tempfile.TemporaryDirectory() as own:
        with pytest.raises(UserError, match="which this user may") as caught:
            resolve_dataset(SET)
        assert caught.value.hint == "use another cache: export INKSTREAM_CACHE=$PWD/cache"
        monkeypatch.setenv("INKSTREAM_CACHE", f"{own}/cache")
        assert len(open_split(SET, "train"))


def test_a_data_set_that_is_not_there_is_refused(cache: Path) -> None:
    resolve_files(RAW)
    with other_user(cache), pytest.raises(UserError, match="Permission denied") as caught:
        resolve_dataset(SET)
    assert caught.value.hint == "use another cache: export INKSTREAM_CACHE=$PWD/cache"


def test_a_cache_that_no_other_user_may_enter(cache: Path) -> None:
    os.umask(0o077)
    resolve_dataset(SET)
    cache.chmod(0)
    end_of_process()
    try:
        if not os.geteuid():
            os.seteuid(NOBODY)
        with pytest.raises(UserError, match="Permission denied") as caught:
            resolve_dataset(SET)
        assert caught.value.hint == "use another cache: export INKSTREAM_CACHE=$PWD/cache"
    finally:
        os.seteuid(0 if os.getuid() == 0 else os.geteuid())
        cache.chmod(0o700)


def test_an_entry_of_another_user_in_a_directory_of_all(cache: Path) -> None:
    directory = resolve_dataset(SET)
    with other_user(entry_of(directory)):
        os.umask(0o022)
        parent = directory.parent.parent
        if os.geteuid() == NOBODY:
            os.seteuid(0)
            parent.chmod(0o777)
            os.seteuid(NOBODY)
        assert resolve_dataset(SET) == directory


@pytest.mark.parametrize("mode", [0o644, 0o666])
def test_the_process_that_fills_the_entry_is_waited_for(cache: Path, mode: int) -> None:
    import fcntl

    directory = resolve_dataset(SET)
    lock = entry_of(directory).with_name(f".{entry_of(directory).name}.lock")
    lock.touch()
    lock.chmod(mode)
    found: list[Path] = []
    with open(lock, "rb+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with other_user(cache):
            reader = threading.Thread(target=lambda: found.append(resolve_dataset(SET)))
            reader.start()
            time.sleep(0.3)
            assert not found
            fcntl.flock(held, fcntl.LOCK_UN)
            reader.join()
    assert found == [directory]


def test_the_lock_of_a_killed_process_of_another_user(cache: Path) -> None:
    """It may be locked by all users, and remains if the directory is not theirs."""
    directory = resolve_dataset(SET)
    lock = entry_of(directory).with_name(f".{entry_of(directory).name}.lock")
    with file_lock(lock):
        assert lock.stat().st_mode & 0o777 == 0o666
    lock.touch()
    lock.chmod(0o666)
    with other_user(entry_of(directory)):
        assert resolve_dataset(SET) == directory
    lock.unlink(missing_ok=True)


def test_an_entry_in_use_by_a_reader_is_not_evicted(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = resolve_dataset(SET)
    with other_user(cache):
        resolve_dataset(SET)
    assert not cache_module._evict(entry_of(directory))
    end_of_process()
    assert cache_module._evict(entry_of(directory))


def test_entries_of_other_users_are_not_evicted(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They count, and nothing else fails because of them."""
    with open_entry("sets", "a", "name") as entry:
        entry.make_room(1000, "set a")
        entry.content.mkdir()
        (entry.content / "file").write_bytes(bytes(1000))
    (cache / "sets").chmod(0o777)
    cache.chmod(0o777)
    with other_user(cache / "sets" / "a"):
        monkeypatch.setenv("INKSTREAM_CACHE_SIZE", "1500")
        with open_entry("sets", "b", "name") as entry:
            entry.make_room(400, "set b")
            with pytest.raises(UserError, match=r"of the cache in .* in use"):
                entry.make_room(800, "set b")
