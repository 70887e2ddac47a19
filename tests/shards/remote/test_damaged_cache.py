"""Damaged entries of the cache: whatever is wrong with a file, the right bytes are downloaded again, once."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from support.http_server import without_proxies
from support.lying_server import LyingServer

from shards import UserError, open_split
from shards.convert import convert
from shards.errors import CorruptError
from shards.manifest import StoreKind
from shards.remote import base, cache
from shards.remote.datasets import resolve_dataset, resolve_files
from shards.verify.check import check_split


@pytest.fixture
def server(synthetic_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LyingServer]:
    monkeypatch.setenv("INKSTREAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("INKSTREAM_CACHE_SIZE", raising=False)
    without_proxies(monkeypatch)
    monkeypatch.setattr(base, "FIRST_PAUSE", 0.001)
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "set").symlink_to(synthetic_set)
    (tmp_path / "web" / "raw.zip").write_bytes(bytes(range(256)) * 100)
    server = LyingServer(tmp_path / "web", lambda: None)
    yield server
    server.close()
    for descriptor in cache._descriptors.values():
        os.close(descriptor)
    cache._descriptors.clear()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def flip_unnoticed(path: Path) -> None:
    """Neither size nor time tell of it."""
    status = path.stat()
    flip(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def make_directory(path: Path) -> None:
    path.unlink()
    (path / "inner").mkdir(parents=True)


def make_loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


DAMAGES = (flip, cut, empty, Path.unlink, make_directory, make_loop)


def files_of(directory: Path) -> dict[str, bytes]:
    paths = (path for path in directory.rglob("*") if path.is_file() and "statistics" not in path.parts)
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_file_of_a_data_set(
    damage: Callable[[Path], None], server: LyingServer, synthetic_set: Path, caplog: pytest.LogCaptureFixture
) -> None:
    address = f"http://127.0.0.1:{server.port}/set"
    directory = resolve_dataset(address)
    for name in files_of(synthetic_set):
        damage(directory / name)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert resolve_dataset(address) == directory
        assert files_of(directory) == files_of(synthetic_set), name
        if damage is not Path.unlink:
            assert [message for message in caplog.messages if "is damaged" in message] == caplog.messages
            assert len(caplog.messages) == 1
        sent = len(server.authorizations)
        resolve_dataset(address)
        assert len(server.authorizations) == sent + 4, "manifests only"


@pytest.mark.parametrize("damage", DAMAGES)
def test_files_of_the_cache_itself(damage: Callable[[Path], None], server: LyingServer, synthetic_set: Path) -> None:
    address = f"http://127.0.0.1:{server.port}/set"
    directory = resolve_dataset(address)
    [record] = (directory.parents[2] / "addresses").iterdir()
    for path in (record, directory.parent / ".checked"):
        damage(path)
        assert files_of(resolve_dataset(address)) == files_of(synthetic_set)
        assert path.is_file()


@pytest.mark.parametrize("damage", DAMAGES)
def test_raw_files(damage: Callable[[Path], None], server: LyingServer, tmp_path: Path) -> None:
    address = f"http://127.0.0.1:{server.port}/raw.zip"
    path = resolve_files(address)
    content = path.read_bytes()
    for other in (path, path.parents[1] / ".index.json", path.parents[1] / ".checked"):
        damage(other)
        assert resolve_files(address).read_bytes() == content
    (tmp_path / "web" / "raw.zip").write_bytes(content[::-1])
    server.version = '"two"'
    damage(path.parents[1] / ".index.json")
    assert resolve_files(address).read_bytes() == content[::-1], "a damaged index does not hide a new version"


def test_files_in_place_of_directories(server: LyingServer, synthetic_set: Path) -> None:
    address = f"http://127.0.0.1:{server.port}/set"
    directory = resolve_dataset(address)
    for path in (directory / "train", directory, directory.parent / ".parts"):
        if path.is_dir():
            shutil.rmtree(path)
        path.write_text("a file")
        (directory / "test" / "manifest.json").unlink() if directory.is_dir() else None
        for shard in directory.rglob("*.tar"):
            shard.unlink()
        assert files_of(resolve_dataset(address)) == files_of(synthetic_set)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_copy_is_not_used_without_a_network(
    damage: Callable[[Path], None], server: LyingServer, synthetic_set: Path
) -> None:
    address = f"http://127.0.0.1:{server.port}/set"
    directory = resolve_dataset(address)
    server.choose = lambda: "busy"
    assert files_of(resolve_dataset(address)) == files_of(synthetic_set)
    for name in files_of(synthetic_set):
        damage(directory / name)
        with pytest.raises(UserError, match="no way to reach"):
            resolve_dataset(address)
        server.choose = lambda: None
        assert files_of(resolve_dataset(address)) == files_of(synthetic_set)
        server.choose = lambda: "busy"


def test_a_record_that_names_another_place_is_ignored(server: LyingServer, tmp_path: Path) -> None:
    address = f"http://127.0.0.1:{server.port}/set"
    [record] = (resolve_dataset(address).parents[2] / "addresses").iterdir()
    server.choose = lambda: "busy"
    good = json.loads(record.read_text())
    for changes in (
        {"key": "../../web"},
        {"name": "../set"},
        {"splits": "../x"},
        {"key": 3},
        {"name": None},
        {"splits": []},
    ):
        record.write_text(json.dumps(good | changes))
        with pytest.raises(UserError, match="no way to reach"):
            resolve_dataset(address)


def test_bits_that_change_on_the_disk_are_found_by_verification(server: LyingServer, synthetic_set: Path) -> None:
    address = f"http://127.0.0.1:{server.port}/set"
    directory = resolve_dataset(address)
    flip_unnoticed(next((directory / "train").glob("*.tar")))
    resolve_dataset(address)
    assert check_split(directory / "train")[1]
    resolve_dataset(address)
    assert files_of(directory) == files_of(synthetic_set)


@pytest.mark.parametrize("store", ["tar", "zarr"])
def test_what_a_reader_finds_damaged_is_downloaded_again(
    store: StoreKind, server: LyingServer, synthetic_set: Path, tmp_path: Path
) -> None:
    (tmp_path / "web" / "set").unlink()
    convert(synthetic_set, tmp_path / "web" / "set", store)
    address = f"http://127.0.0.1:{server.port}/set"
    directory = resolve_dataset(address)
    intact, read = files_of(directory), []
    for name in [name for name in intact if name.startswith("test/") and "manifest" not in name]:
        flip_unnoticed(directory / name)
        try:
            packed = open_split(directory, "test")
            packed.read(np.arange(len(packed)))
        except CorruptError:
            read.append(name)
            resolve_dataset(address)
        else:
            flip_unnoticed(directory / name)  # training does not read this byte
        assert files_of(directory) == intact, name
    assert len(read) >= 4 and {"test/labels.npy", "test/rows.npy", "test/blocks.npy"} < set(read)
