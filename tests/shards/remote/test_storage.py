"""Sets and raw files at addresses: from a real S3 server over a line that cuts, lies, stalls and refuses."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from conftest import ROOT, assert_user_error
from support import warm_process
from support.s3_server import BUCKET, Faults, Line, environment, s3_server, upload_dataset

import shards.remote.base as remote
import shards.remote.fsspec_backend as remote_fsspec
from shards import UserError, open_split
from shards.errors import MismatchError
from shards.manifest import Manifest, RawFile, Shard
from shards.remote import datasets
from shards.remote.backends import open_storage
from shards.remote.datasets import (
    check_upload,
    is_remote,
    remote_manifests,
    remove_manifests,
    resolve_dataset,
    resolve_files,
    upload_files,
    upload_manifests,
)
from shards.verify.check import check_hashes

posix = pytest.mark.skipif(sys.platform == "win32", reason="signals and locks of POSIX")
PIECE = 64 << 10
SHARD_BYTES = 200_000
# What a process of its own needs so that it tries again as fast as this one does.
HASTE = f"""
import logging, os, sys, time
from pathlib import Path
from shards.remote import datasets
from shards.remote import fsspec_backend as remote_fsspec
from shards.remote import base as remote
from shards.cli import run_command
remote.FIRST_PAUSE, remote.STALL_SECONDS, remote_fsspec.PIECE = 0.01, 5.0, {PIECE}
"""


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    with s3_server() as port:
        yield port


@pytest.fixture(scope="module")
def s3(server: int) -> fsspec.AbstractFileSystem:
    """The S3 server by another way than ours, and by no line that can be spoilt."""
    return fsspec.filesystem(
        "s3",
        endpoint_url=f"http://127.0.0.1:{server}",
        key="key",
        secret="secret",
        use_listings_cache=False,
        client_kwargs={"region_name": "us-east-1"},
    )


@pytest.fixture
def line(server: int, s3: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch) -> Iterator[Line]:
    """A line to the S3 server, which everything in the test uses; the bucket is empty."""
    line = Line(server)
    for name, value in environment(line.port).items():
        monkeypatch.setenv(name, value)
    if found := s3.find(BUCKET):
        s3.rm(found)
    yield line
    line.close()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, and no patience."""
    monkeypatch.setenv("INKSTREAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("INKSTREAM_CACHE_SIZE", raising=False)
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(remote_fsspec, "PIECE", PIECE)
    return tmp_path / "cache"


def write_part(directory: Path, part: str, shards: int, seed: int, **changes: Any) -> None:
    """A part of random bytes: what is in a shard makes no difference to who fetches it."""
    random = np.random.default_rng([seed, shards])
    names = [f"{number:05d}.tar" for number in range(shards)]
    contents = {name: random.bytes(SHARD_BYTES) for name in names}
    extra = {"zarr.json": b"{}", "images/c/0/0": random.bytes(1000), "empty": b""}
    for name, content in {**contents, **extra}.items():
        (directory / part / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / part / name).write_bytes(content)
    fields = {
        "version": 2,
        "dataset": "noise",
        "variant": "",
        "split": part,
        "classes": ("a", "b"),
        "counts": (4 * shards, 0),
        "image_shape": (1, 1, 1),
        "transposed": False,
        "samples": 4 * shards,
        "block_size": 4,
        "seed": seed,
        "shards": tuple(
            Shard(name=name, samples=4, bytes=len(content), sha256=sha256(content), blocks_crc32=(0,))
            for name, content in contents.items()
        ),
        "files": tuple(
            RawFile(name=name, bytes=len(content), sha256=sha256(content)) for name, content in extra.items()
        ),
        "raw": (),
        "versions": {},
    }
    Manifest(**{**fields, **changes}).write(directory / part)


def write_set(directory: Path, shards: int = 4, seed: int = 0, val: bool = False) -> Path:
    for part, count in (("train", shards), ("test", 1), *([("val", 2)] if val else [])):
        write_part(directory, part, count, seed)
    return directory


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def content_of(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


@pytest.fixture
def noise(tmp_path: Path) -> Path:
    return write_set(tmp_path / "noise")


@pytest.fixture
def at_s3(noise: Path, line: Line, s3: fsspec.AbstractFileSystem) -> str:
    """The address of the noise at the S3 server, with something beside it that no manifest names."""
    s3.put(f"{noise}/", f"{BUCKET}/sets/noise/", recursive=True)
    s3.pipe_file(f"{BUCKET}/sets/noise/train/stranger", b"?")
    return f"s3://{BUCKET}/sets/noise"


def run_code(code: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", HASTE + textwrap.dedent(code)],
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=60,
    )


def start_code(code: str) -> subprocess.Popen:
    return warm_process.Popen(
        [sys.executable, "-c", HASTE + textwrap.dedent(code)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def came(cache: Path) -> int:
    """Bytes of shards that are in the cache, whole or in part."""
    total = 0
    for path in cache.rglob("*"):
        with suppress(FileNotFoundError):  # whole by now, and renamed
            total += path.stat().st_size if path.suffix in (".part", ".tar") else 0
    return total


def wait_until(happened: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


# Addresses


@pytest.mark.parametrize(
    ("address", "remote"),
    [
        ("s3://bucket/name", True),
        ("hf://datasets/user/name", True),
        ("https://host/name", True),
        ("memory://name", True),
        ("data/shards", False),
        ("/data/s3://name", False),
        (Path("data"), False),
        ("file:///data", False),
        ("FILE:///data", False),
        (r"C:\data", False),
        ("C://data", False),
        ("", False),
    ],
)
def test_what_is_remote(address: str | Path, remote: bool) -> None:
    assert is_remote(address) == remote


def test_a_path_is_itself(tmp_path: Path) -> None:
    assert resolve_dataset(tmp_path) == tmp_path
    assert resolve_dataset("some/where") == Path("some/where")
    assert resolve_files("some/where") == Path("some/where")


@pytest.mark.skipif(os.name != "posix", reason="paths of POSIX")
def test_a_file_address_is_a_path() -> None:
    assert resolve_dataset("file:///data/two%20words") == Path("/data/two words")


def test_fsspec_is_loaded_when_it_is_needed() -> None:
    process = run_code("assert not {'fsspec', 's3fs', 'aiohttp', 'torch'} & set(sys.modules), sys.modules")
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("s3://bucket/name", 'pip install -e ".[s3]"'),
        ("gs://bucket/name", 'pip install -e ".[gs]"'),
        ("abfs://bucket/name", "adlfs"),
    ],
)
def test_a_missing_package_is_named(address: str, words: str) -> None:
    process = run_code(
        f"""
        sys.modules.update(s3fs=None, gcsfs=None, adlfs=None)
        run_command(lambda: datasets.resolve_dataset({address!r}) and 0)
        """
    )
    assert_user_error(process, address, words)
    assert len(process.stderr.splitlines()) == 3


def test_an_unknown_protocol() -> None:
    with pytest.raises(UserError, match="s4://bucket/name"):
        resolve_dataset("s4://bucket/name")


# A whole set


def test_a_set_is_fetched_once(at_s3: str, noise: Path, line: Line, cache: Path) -> None:
    directory = resolve_dataset(at_s3)
    assert directory.is_relative_to(cache)
    assert directory.name == "noise"
    assert content_of(directory) == content_of(noise), "all of it, and no stranger"
    assert {path.name for path in directory.parent.iterdir() if path.name.startswith(".")} == {".use", ".checked"}

    line.faults = Faults()
    assert resolve_dataset(at_s3) == directory
    assert {request.rpartition("/")[0].split("?")[0].partition(" ")[2] for request in line.faults.requests} <= {
        f"/{BUCKET}/sets/noise/{part}manifest.json HTTP" for part in ("", "train/", "test/", "val/")
    }
    assert len(line.faults.requests) == 4


def test_a_fetched_set_can_be_read(synthetic_set: Path, line: Line) -> None:
    address = f"s3://{BUCKET}/synthetic"
    upload_dataset(synthetic_set, address)
    ours, theirs = open_split(address, "train"), open_split(synthetic_set, "train")
    samples = np.arange(len(theirs))
    np.testing.assert_array_equal(ours.read(samples), theirs.read(samples))
    assert ours.manifest == theirs.manifest


def test_all_parts_of_a_set_are_fetched(tmp_path: Path, line: Line) -> None:
    noise = write_set(tmp_path / "noise", val=True)
    upload_dataset(noise, f"s3://{BUCKET}/noise")
    assert content_of(resolve_dataset(f"s3://{BUCKET}/noise")) == content_of(noise)


def test_a_single_part(at_s3: str, noise: Path) -> None:
    assert content_of(resolve_dataset(f"{at_s3}/test/")) == content_of(noise / "test")


def test_a_set_that_was_replaced_is_another_entry(at_s3: str, tmp_path: Path) -> None:
    before = resolve_dataset(at_s3)
    old = content_of(before)
    other = write_set(tmp_path / "other", shards=3, seed=1)
    upload_dataset(other, at_s3)
    after = resolve_dataset(at_s3)
    assert after != before
    assert content_of(after) == content_of(other)
    assert content_of(before) == old, "a process that uses it may go on"


def test_the_same_set_at_two_addresses_is_one_entry(at_s3: str, noise: Path, line: Line) -> None:
    upload_dataset(noise, f"s3://{BUCKET}/elsewhere")
    directory = resolve_dataset(at_s3)
    line.faults = Faults()
    assert resolve_dataset(f"s3://{BUCKET}/elsewhere") == directory
    assert not any(".tar" in request for request in line.faults.requests)


def test_what_was_lost_from_the_cache_is_fetched_again(at_s3: str, noise: Path, line: Line) -> None:
    directory = resolve_dataset(at_s3)
    (directory / "train" / "00002.tar").unlink()
    (directory / "train" / "00001.tar").write_bytes(b"short")
    line.faults = Faults()
    assert content_of(resolve_dataset(at_s3)) == content_of(noise)
    fetched = {request.split()[1].rpartition("/")[2] for request in line.faults.requests if ".tar" in request}
    assert fetched == {"00001.tar", "00002.tar"}


def test_a_progress_bar_tells_bytes(at_s3: str, line: Line, capfd: pytest.CaptureFixture) -> None:
    line.faults.seconds_a_chunk = 0.05  # what takes no time shows no bar
    resolve_dataset(at_s3)
    assert "fetching noise: 100%" in capfd.readouterr().err
    line.faults = Faults()
    resolve_dataset(at_s3)
    assert capfd.readouterr().err == ""


# Faults


def test_cut_connections_are_resumed(at_s3: str, noise: Path, line: Line) -> None:
    line.faults.cuts = [1, 20_000, 0, 40_000, 1000, 30_000]
    assert content_of(resolve_dataset(at_s3)) == content_of(noise)
    assert line.faults.cuts == []


def test_more_cuts_than_attempts_do_no_harm_as_long_as_others_bring_something(
    at_s3: str, line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shards.remote.download.THREADS", 1)
    line.faults.cuts = [1, 1, 1, 1]
    resolve_dataset(at_s3)


def test_a_server_in_trouble_is_asked_again(at_s3: str, noise: Path, line: Line) -> None:
    line.faults.unavailable = 4
    assert content_of(resolve_dataset(at_s3)) == content_of(noise)


def test_a_server_that_stays_in_trouble(at_s3: str, line: Line) -> None:
    line.faults.unavailable = 10**6
    with pytest.raises(UserError) as caught:
        resolve_dataset(at_s3)
    assert f"{at_s3}/" in caught.value.found
    assert "Service Unavailable" in caught.value.found
    assert 5 <= len(line.faults.requests) <= 5 * 4


def test_a_silent_server_is_given_up_and_asked_again(
    at_s3: str, noise: Path, line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "STALL_SECONDS", 0.5)
    line.faults.silent = 3
    start = time.monotonic()
    assert content_of(resolve_dataset(at_s3)) == content_of(noise)
    assert 0.5 < time.monotonic() - start < 10


def test_a_server_that_stays_silent(at_s3: str, line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "STALL_SECONDS", 0.1)
    line.faults.silent = 10**6
    with pytest.raises(UserError, match=r"no answer within 0\.1 seconds"):
        resolve_dataset(at_s3)


def test_a_slow_line_is_asked_for_less_at_a_time(at_s3: str, line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 KiB take 0.2 seconds: too long for a piece of 200,000 bytes, not for one of 50,000."""
    monkeypatch.setattr(remote, "STALL_SECONDS", 0.5)
    monkeypatch.setattr(remote_fsspec, "PIECE", 1 << 20)
    monkeypatch.setattr(remote_fsspec, "SMALLEST_PIECE", 8 << 10)
    monkeypatch.setattr("shards.remote.download.THREADS", 2)
    line.faults.seconds_a_chunk = 0.2
    resolve_dataset(at_s3)


def test_wrong_bytes_are_fetched_once_more(at_s3: str, noise: Path, line: Line) -> None:
    line.faults.flips = 2
    assert content_of(resolve_dataset(at_s3)) == content_of(noise)
    assert line.faults.flips == 0


def test_wrong_bytes_that_stay_wrong_are_refused(at_s3: str, noise: Path, s3: fsspec.AbstractFileSystem) -> None:
    content = bytearray((noise / "train" / "00001.tar").read_bytes())
    content[1000] ^= 1
    s3.pipe_file(f"{BUCKET}/sets/noise/train/00001.tar", bytes(content))
    with pytest.raises(UserError) as caught:
        resolve_dataset(at_s3)
    assert f"{at_s3}/train/00001.tar" in caught.value.found
    assert sha256(content) in caught.value.found
    assert sha256((noise / "train" / "00001.tar").read_bytes()) in caught.value.expected


@pytest.mark.parametrize("size", [0, 5, PIECE - 1, 2 * PIECE])
def test_a_shorter_file_is_refused(at_s3: str, s3: fsspec.AbstractFileSystem, line: Line, size: int) -> None:
    s3.pipe_file(f"{BUCKET}/sets/noise/train/00001.tar", bytes(size))
    line.faults = Faults()
    with pytest.raises(MismatchError, match=rf"00001\.tar, which has at most {size:,} bytes"):
        resolve_dataset(at_s3)
    assert sum("00001.tar" in request for request in line.faults.requests) <= 4


@pytest.mark.parametrize("size", [0, SHARD_BYTES - 1])
def test_a_shorter_file_in_memory_is_refused(noise: Path, size: int) -> None:
    upload_dataset(noise, "memory://short")
    fsspec.filesystem("memory").pipe_file("/short/train/00001.tar", bytes(size))
    with pytest.raises(MismatchError, match=rf"00001\.tar, which has at most {size:,} bytes"):
        resolve_dataset("memory://short")


def test_a_missing_shard(at_s3: str, cache: Path, s3: fsspec.AbstractFileSystem) -> None:
    s3.rm_file(f"{BUCKET}/sets/noise/train/00001.tar")
    with pytest.raises(UserError, match=r"nothing at .*/train/00001\.tar"):
        resolve_dataset(at_s3)
    assert list(cache.rglob("manifest.json")) == [], "nothing incomplete is taken for complete"


def test_a_damaged_manifest(at_s3: str, s3: fsspec.AbstractFileSystem) -> None:
    s3.pipe_file(f"{BUCKET}/sets/noise/train/manifest.json", b"{")
    with pytest.raises(UserError, match=r"train/manifest\.json, which is damaged"):
        resolve_dataset(at_s3)


def test_a_set_in_the_making(at_s3: str, s3: fsspec.AbstractFileSystem) -> None:
    s3.rm_file(f"{BUCKET}/sets/noise/test/manifest.json")
    with pytest.raises(UserError, match=r"without test/manifest\.json"):
        resolve_dataset(at_s3)


@pytest.mark.parametrize("address", [f"s3://{BUCKET}/nothing", "s3://no-such-bucket/name"])
def test_nothing_there(address: str, line: Line) -> None:
    with pytest.raises(UserError, match="nothing at") as caught:
        resolve_dataset(address)
    assert address in caught.value.found
    assert "AWS_ENDPOINT_URL" in caught.value.hint
    assert len(line.faults.requests) <= 4, "asked once"


def test_no_credentials(at_s3: str) -> None:
    process = run_code(
        f"run_command(lambda: datasets.resolve_dataset({at_s3!r}) and 0)",
        AWS_ACCESS_KEY_ID="",
        AWS_SECRET_ACCESS_KEY="",
        AWS_EC2_METADATA_DISABLED="true",
        HOME="/nonexistent",
    )
    assert_user_error(process, at_s3, "credentials", "AWS_PROFILE", "FSSPEC_S3_ANON")
    assert len(process.stderr.splitlines()) == 3


def test_a_public_bucket_needs_no_credentials(at_s3: str, s3: fsspec.AbstractFileSystem) -> None:
    s3.chmod(f"{BUCKET}/sets", "public-read", recursive=True)
    env = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "AWS_EC2_METADATA_DISABLED": "true"}
    process = run_code(f"datasets.resolve_dataset({at_s3!r})", **env, HOME="/nonexistent", FSSPEC_S3_ANON="true")
    assert process.returncode == 0, process.stderr


def test_no_server_at_all(at_s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(UserError, match="no way to reach") as caught:
        resolve_dataset(at_s3)
    assert "AWS_ENDPOINT_URL" in caught.value.hint


def test_without_a_network_the_copy_is_used(
    at_s3: str, noise: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    directory = resolve_dataset(at_s3)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    assert resolve_dataset(at_s3) == directory
    assert "cannot be reached" in caplog.text
    assert str(directory) in caplog.text
    with pytest.raises(UserError, match="no way to reach"):
        resolve_dataset(f"{at_s3}-2")
    (directory / "train" / "manifest.json").unlink()
    with pytest.raises(UserError, match="no way to reach"):
        resolve_dataset(at_s3)
    shutil.rmtree(cache / "sets")
    with pytest.raises(UserError, match="no way to reach"):
        resolve_dataset(at_s3)


# A full disk


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A disk of 600 KB that holds the cache."""
    path = tmp_path / "disk"
    path.mkdir()
    if (
        shutil.which("mount") is None
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", path], capture_output=True).returncode
    ):
        pytest.skip("may not mount a small disk")
    monkeypatch.setenv("INKSTREAM_CACHE", str(path / "cache"))
    monkeypatch.setenv("INKSTREAM_CACHE_SIZE", "1GB")
    yield path
    subprocess.run(["umount", "-l", path], check=True)


def test_a_set_larger_than_the_room_on_the_disk(at_s3: str, line: Line, small_disk: Path) -> None:
    with pytest.raises(UserError) as caught:
        resolve_dataset(at_s3)
    assert "on the disk" in caught.value.found
    assert at_s3 in caught.value.found
    assert "1.0" in caught.value.expected
    assert "INKSTREAM_CACHE=" in caught.value.hint
    assert not any(".tar" in request for request in line.faults.requests)


def test_a_disk_that_fills_on_the_way(
    at_s3: str, noise: Path, small_disk: Path, line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another program writes to it after the room was counted."""
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 0, 10**9))
        with pytest.raises(UserError) as caught:
            resolve_dataset(at_s3)
        assert "no space left on device" in caught.value.found
        assert str(small_disk) in caught.value.found
        assert list(small_disk.rglob("manifest.json")) == []
        kept = came(small_disk)
        assert kept > 400_000

        subprocess.run(["mount", "-o", "remount,size=3m", small_disk], check=True)
        line.faults = Faults()
        assert content_of(resolve_dataset(at_s3)) == content_of(noise)
        assert line.faults.carried < 5 * SHARD_BYTES - kept + 100_000, "what had come is not fetched again"


def test_a_set_larger_than_the_cache_may_be(at_s3: str, line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INKSTREAM_CACHE_SIZE", "500KB")
    with pytest.raises(UserError) as caught:
        resolve_dataset(at_s3)
    assert at_s3 in caught.value.found
    assert "at most 500.00KB" in caught.value.found
    assert "INKSTREAM_CACHE_SIZE=1.1" in caught.value.hint


# Processes


@posix
def test_a_forked_process_connects_anew(line: Line, tmp_path: Path) -> None:
    """The connections of its parent belong to a thread that it does not have."""
    storage = open_storage(f"s3://{BUCKET}/forked")
    (tmp_path / "file").write_bytes(b"content")
    storage.put(tmp_path / "file", "file")
    process = os.fork()
    if not process:
        try:
            os._exit(storage.read("file", 100) != b"content")
        finally:
            os._exit(2)
    assert os.waitpid(process, 0)[1] == 0


@posix
def test_several_processes_fetch_once(at_s3: str, noise: Path, line: Line) -> None:
    line.faults.seconds_a_chunk = 0.02
    processes = [start_code(f"print(datasets.resolve_dataset({at_s3!r}))") for _ in range(3)]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    assert len({directory for directory, _ in outputs}) == 1
    assert content_of(Path(outputs[0][0].strip())) == content_of(noise)
    assert sum("fetching" in errors for _, errors in outputs) == 1, "one shows a bar"
    total = sum(len(content) for content in content_of(noise).values())
    assert line.faults.carried < 1.2 * total + 3 * 4 * 5000


@posix
def test_one_takes_over_from_a_killed_one_and_resumes(at_s3: str, noise: Path, line: Line, cache: Path) -> None:
    line.faults.seconds_a_chunk = 0.05
    code = f"print(datasets.resolve_dataset({at_s3!r}))"
    first = start_code(code)
    wait_until(lambda: came(cache) > 400_000)
    second = start_code(code)
    wait_until(lambda: sum("GET" in request and "manifest" in request for request in line.faults.requests) >= 8)
    first.kill()
    first.communicate()
    kept = came(cache)
    line.faults = Faults()
    output, errors = second.communicate(timeout=60)
    assert second.returncode == 0, errors
    assert content_of(Path(output.strip())) == content_of(noise)
    total = 5 * SHARD_BYTES
    assert kept > 400_000
    # Pieces that were on their way when it died came for nothing, and answers have headers.
    assert line.faults.carried < total - kept + 100_000


@posix
def test_sigterm_leaves_what_came_and_the_next_run_resumes(at_s3: str, noise: Path, line: Line, cache: Path) -> None:
    line.faults.seconds_a_chunk = 0.05
    code = f"run_command(lambda: datasets.resolve_dataset({at_s3!r}) and 0)"
    process = start_code(code)
    wait_until(lambda: came(cache) > 300_000)
    process.terminate()
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 143
    assert "Traceback" not in errors
    line.faults = Faults()
    assert content_of(resolve_dataset(at_s3)) == content_of(noise)
    assert line.faults.carried < 5 * SHARD_BYTES - 300_000 + 100_000


# Hostile manifests


@pytest.mark.parametrize(
    "name", ["../stolen", "/tmp/stolen", "a/../../stolen", "./a", "a//b", "", "manifest.json", "00000.tar/x", "empty"]
)
def test_a_manifest_that_names_files_elsewhere(name: str, noise: Path, tmp_path: Path) -> None:
    manifest = json.loads((noise / "train" / "manifest.json").read_text())
    manifest["files"].append({"name": name, "bytes": 1, "sha256": sha256(b"?")})
    del manifest["sha256"]  # else its checksum is what refuses it
    (noise / "train" / "manifest.json").write_text(json.dumps(manifest))
    memory = fsspec.filesystem("memory")
    memory.put(str(noise), "/hostile", recursive=True)
    memory.pipe_file("/hostile/stolen", b"?")
    before = set(tmp_path.rglob("*"))
    try:
        with pytest.raises(UserError):
            resolve_dataset("memory://hostile")
    finally:
        memory.rm("/hostile", recursive=True)
    after = {path for path in set(tmp_path.rglob("*")) - before if path.is_file()}
    assert after == set()


def test_a_set_with_an_adventurous_name(tmp_path: Path, cache: Path) -> None:
    noise = tmp_path / "noise"
    for part in ("train", "test"):
        write_part(noise, part, 1, 0, dataset="../../x y/é")
    fsspec.filesystem("memory").put(str(noise), "/named", recursive=True)
    directory = resolve_dataset("memory://named")
    assert directory.parent.parent == cache / "sets"
    assert directory.name == "x-y"
    assert list(check_hashes(directory / "train", Manifest.read(directory / "train"))) == []


def test_secrets_are_neither_shown_nor_stored(cache: Path) -> None:
    address = "https://anna:hunter%21two@127.0.0.1:1/set?sig=c2VjcmV0"
    with pytest.raises(UserError) as caught:
        resolve_dataset(address)
    for secret in ("hunter", "anna", "c2VjcmV0"):
        assert secret not in str(caught.value)
    assert "https://***@127.0.0.1:1/set" in caught.value.found
    assert not any(secret in str(path) for path in cache.rglob("*") for secret in ("hunter", "c2VjcmV0"))


# Raw files


@pytest.fixture
def raw_at_s3(line: Line, s3: fsspec.AbstractFileSystem) -> tuple[str, dict[str, bytes]]:
    files = {"a.csv": b"one,two", "deep/er/b.bin": bytes(range(256)) * 1000, "empty": b""}
    for name, content in files.items():
        s3.pipe_file(f"{BUCKET}/raw/{name}", content)
    s3.pipe_file(f"{BUCKET}/rawer/other", b"not below it")
    line.faults = Faults()
    return f"s3://{BUCKET}/raw", files


def test_a_directory_of_raw_files(raw_at_s3: tuple[str, dict[str, bytes]], line: Line) -> None:
    address, files = raw_at_s3
    directory = resolve_files(address)
    assert content_of(directory) == files
    assert directory.name == "raw"
    line.faults = Faults()
    assert resolve_files(f"{address}/") == directory
    assert all("list-type=2" in request for request in line.faults.requests)


def test_a_single_raw_file(raw_at_s3: tuple[str, dict[str, bytes]]) -> None:
    address, files = raw_at_s3
    path = resolve_files(f"{address}/deep/er/b.bin")
    assert path.name == "b.bin"
    assert path.read_bytes() == files["deep/er/b.bin"]


def test_raw_files_that_changed_are_fetched_again(
    raw_at_s3: tuple[str, dict[str, bytes]], line: Line, s3: fsspec.AbstractFileSystem
) -> None:
    address, files = raw_at_s3
    directory = resolve_files(address)
    s3.pipe_file(f"{BUCKET}/raw/a.csv", b"ONE,TWO")
    s3.pipe_file(f"{BUCKET}/raw/new", b"new")
    s3.rm_file(f"{BUCKET}/raw/empty")
    line.faults = Faults()
    assert resolve_files(address) == directory
    assert content_of(directory) == {
        "a.csv": b"ONE,TWO",
        "new": b"new",
        "deep/er/b.bin": files["deep/er/b.bin"],
    }
    assert not any("b.bin" in request for request in line.faults.requests)


@posix
def test_raw_files_do_not_change_beneath_a_reader(
    raw_at_s3: tuple[str, dict[str, bytes]], s3: fsspec.AbstractFileSystem
) -> None:
    address, files = raw_at_s3
    with start_code(f"datasets.resolve_files({address!r}); print('ready', flush=True); time.sleep(60)") as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "ready\n"
        s3.pipe_file(f"{BUCKET}/raw/a.csv", b"ONE,TWO")
        with pytest.raises(UserError, match="changed while another process"):
            resolve_files(address)
        reader.kill()
        reader.wait()
        assert content_of(resolve_files(address)) == {**files, "a.csv": b"ONE,TWO"}


@pytest.mark.parametrize("address", [f"s3://{BUCKET}/nothing", "s3://no-such-bucket/raw", "memory://nothing"])
def test_no_raw_files_there(address: str, line: Line) -> None:
    with pytest.raises(UserError, match="nothing at"):
        resolve_files(address)


def test_raw_files_that_are_directories_too(line: Line, s3: fsspec.AbstractFileSystem) -> None:
    s3.pipe_file(f"{BUCKET}/odd/a", b"1")
    s3.pipe_file(f"{BUCKET}/odd/a/b", b"2")
    with pytest.raises(UserError, match="both as a file and as a directory"):
        resolve_files(f"s3://{BUCKET}/odd")


# Uploads


def test_an_upload_in_steps(noise: Path, line: Line) -> None:
    address = f"s3://{BUCKET}/new"
    assert remote_manifests(address) == {}
    upload_files(noise, address)
    assert remote_manifests(address) == {}
    upload_manifests(noise, address)
    assert remote_manifests(address) == {part: Manifest.read(noise / part) for part in ("train", "test")}
    assert content_of(resolve_dataset(address)) == content_of(noise)
    remove_manifests(address)
    assert remote_manifests(address) == {}
    remove_manifests(address)
    assert (noise / "train" / "manifest.json").exists()


def test_the_manifests_of_train_and_test_come_last(tmp_path: Path, line: Line) -> None:
    noise = write_set(tmp_path / "noise", val=True)
    upload_dataset(noise, f"s3://{BUCKET}/new")
    put = [request.split()[1] for request in line.faults.requests if request.startswith("PUT")]
    assert [name.split("?")[0] for name in put[-3:]] == [
        f"/{BUCKET}/new/{part}/manifest.json" for part in ("val", "test", "train")
    ]


def test_a_spoilt_upload_is_done_again(noise: Path, line: Line) -> None:
    line.faults.uploads_flipped = 2
    line.faults.unavailable = 2
    upload_dataset(noise, f"s3://{BUCKET}/new")
    assert line.faults.uploads_flipped == 0
    line.faults = Faults()
    assert content_of(resolve_dataset(f"s3://{BUCKET}/new")) == content_of(noise)


def test_a_service_that_encrypts_is_read_back(noise: Path, line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tags look like an MD5 and are none."""
    monkeypatch.setattr(remote_fsspec, "_md5", lambda _: "0" * 32)
    upload_dataset(noise, f"s3://{BUCKET}/new")
    assert any(request.startswith("GET") and ".tar" in request for request in line.faults.requests)
    line.faults = Faults(uploads_flipped=1)
    upload_dataset(noise, f"s3://{BUCKET}/new")
    assert line.faults.uploads_flipped == 0
    assert content_of(resolve_dataset(f"s3://{BUCKET}/new")) == content_of(noise)


def test_whether_an_upload_will_be_possible(line: Line, s3: fsspec.AbstractFileSystem) -> None:
    check_upload(f"s3://{BUCKET}/new")
    assert s3.find(BUCKET) == []
    with pytest.raises(UserError, match="bucket does not exist"):
        check_upload("s3://no-such-bucket/new")
    with pytest.raises(UserError, match="as a place to write to"):
        check_upload("https://127.0.0.1:1/new")


def test_no_bucket_to_upload_to(noise: Path, line: Line) -> None:
    with pytest.raises(UserError, match="bucket does not exist"):
        remote_manifests("s3://no-such-bucket/new")
    with pytest.raises(UserError, match="bucket does not exist"):
        upload_dataset(noise, "s3://no-such-bucket/new")


def test_an_upload_without_a_network(noise: Path, line: Line) -> None:
    line.faults.unavailable = 10**6
    with pytest.raises(UserError, match="no way to reach"):
        upload_dataset(noise, f"s3://{BUCKET}/new")


def test_memory(noise: Path) -> None:
    upload_dataset(noise, "memory://set")
    assert content_of(resolve_dataset("memory://set")) == content_of(noise)


def flipped(content: bytes, stride: int) -> Iterator[bytes]:
    """The content with one bit of some changed, and without its end."""
    for bit in range(0, 8 * len(content), stride):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        yield bytes(changed)
    yield content[:-2]
    yield b""


STRIDES = pytest.mark.parametrize("stride", [389, pytest.param(97, marks=pytest.mark.slow)])


@STRIDES
def test_files_are_fetched_again_if_the_record_of_their_versions_is_damaged(
    cache: Path, line: Line, s3: fsspec.AbstractFileSystem, stride: int
) -> None:
    s3.pipe_file(f"{BUCKET}/raws/a.bin", b"one")
    directory = resolve_files(f"s3://{BUCKET}/raws")
    (index,) = cache.rglob(".index.json")
    whole = index.read_bytes()
    for content in flipped(whole, stride):
        index.write_bytes(content)
        (directory / "a.bin").write_bytes(b"old")
        assert (resolve_files(f"s3://{BUCKET}/raws") / "a.bin").read_bytes() == b"one"
        assert index.read_bytes() == whole


@STRIDES
def test_a_damaged_record_of_a_copy_counts_as_none(noise: Path, cache: Path, stride: int) -> None:
    fsspec.filesystem("memory").put(str(noise), "/recorded", recursive=True)
    directory = resolve_dataset("memory://recorded")
    (record,) = (cache / "addresses").iterdir()
    assert datasets._last_copy(record) == directory
    for content in flipped(record.read_bytes(), stride):
        record.write_bytes(content)
        assert datasets._last_copy(record) is None
