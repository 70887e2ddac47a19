"""A web server that lies: the right files arrive, or there is one message, in bounded time and memory."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from support.http_server import without_proxies
from support.lying_server import LIES, LyingServer

from shards import UserError
from shards.remote import base, datasets
from shards.remote.datasets import resolve_dataset, resolve_files

RAW = np.random.default_rng(0).bytes(300_000)
SECONDS = 30.0  # for a data set, with the short timeouts below
# The file of unknown hash cannot be told from what these serve in its place.
UNDETECTABLE = {"flip", "page", "bomb", "nested json", "short length", "no length"}


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INKSTREAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("INKSTREAM_CACHE_SIZE", raising=False)
    without_proxies(monkeypatch)
    monkeypatch.setattr(base, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(base, "STALL_SECONDS", 0.3)
    monkeypatch.setattr(base, "ATTEMPTS", 3)
    monkeypatch.setattr(datasets, "MAX_MANIFEST_BYTES", 1 << 20)


@pytest.fixture
def root(synthetic_set: Path, tmp_path: Path) -> Path:
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "set").symlink_to(synthetic_set)
    (tmp_path / "web" / "raw.zip").write_bytes(RAW)
    return tmp_path / "web"


@contextmanager
def serving(root: Path, choose: Callable[[], str | None]) -> Iterator[LyingServer]:
    server = LyingServer(root, choose)
    try:
        yield server
    finally:
        server.close()


def files_of(directory: Path) -> dict[str, bytes]:
    paths = (path for path in directory.rglob("*") if path.is_file() and "statistics" not in path.parts)
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}


def check(server: LyingServer, synthetic_set: Path) -> bool:
    """Whether the data set arrives. If not, there is one message; later, from an honest server, it arrives."""
    start = time.monotonic()
    try:
        directory = resolve_dataset(f"http://127.0.0.1:{server.port}/set")
    except UserError as error:
        assert re.fullmatch(r"error: .+\nexpected: .+\nhint: .+", str(error)), repr(str(error))
        assert all(line.isprintable() for line in str(error).split("\n"))
        arrived = False
    else:
        assert files_of(directory) == files_of(synthetic_set)
        arrived = True
    assert time.monotonic() - start < SECONDS
    server.choose = lambda: None
    assert files_of(resolve_dataset(f"http://127.0.0.1:{server.port}/set")) == files_of(synthetic_set)
    return arrived


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_about_a_file_of_known_hash(lie: str, root: Path, synthetic_set: Path) -> None:
    """Every fifth answer is the lie: most files arrive in the end."""
    count = iter(range(10**9))
    with serving(root, lambda: lie if next(count) % 5 == 4 else None) as server:
        check(server, synthetic_set)


@pytest.mark.parametrize(
    "lie", ["endless", "endless chunks", "endless json", "drip", "drip headers", "silence", "loop", "truncated"]
)
def test_nothing_but_lies(lie: str, root: Path, synthetic_set: Path) -> None:
    with serving(root, lambda: lie) as server:
        assert not check(server, synthetic_set)


@pytest.mark.parametrize("lie", sorted(LIES.keys() - UNDETECTABLE))
def test_a_lie_about_a_file_of_unknown_hash(lie: str, root: Path) -> None:
    """The second answer breaks off in the middle, the third is the lie."""
    answers = iter([None, "cut", lie])
    with serving(root, lambda: next(answers, None)) as server:
        try:
            path = resolve_files(f"http://127.0.0.1:{server.port}/raw.zip")
        except UserError as error:
            assert all(line.isprintable() for line in str(error).split("\n"))
        else:
            assert path.read_bytes() == RAW
        server.choose = lambda: None
        assert resolve_files(f"http://127.0.0.1:{server.port}/raw.zip").read_bytes() == RAW


def test_a_name_that_is_never_resolved(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: over.wait(20))
    start = time.monotonic()
    with pytest.raises(UserError, match=r"not a byte for 0\.3 seconds"):
        resolve_dataset("http://example.org/set")
    over.set()
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("seed", [*range(6), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(6, 400))])
def test_seeded_lies(seed: int, root: Path, synthetic_set: Path) -> None:
    server = LyingServer.seeded(root, seed)
    try:
        check(server, synthetic_set)
    finally:
        server.close()
