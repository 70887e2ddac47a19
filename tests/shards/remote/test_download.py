"""Downloads from a real server on this machine that cuts connections, lies and refuses."""

from __future__ import annotations

import hashlib
import re
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, assert_user_error
from support.http_server import serving, without_proxies

from pipeline.readers.download import Download, fetch
from shards import UserError
from shards.errors import MismatchError
from shards.remote import base

CONTENT = np.random.default_rng(0).bytes(300_000)
OR_ELSE = "the loose files"


@dataclass
class Behaviour:
    """What the server serves, and what it does wrong. `requests` notes the Range header of each request."""

    content: bytes = CONTENT
    status: int = 200
    ranges: bool = True
    lengths: bool = True
    """Whether an answer tells its length; if not, the end of the connection is its end."""
    totals: bool = True
    """Whether an answer to a request for a range tells the size of the file."""
    chunked: bool = False
    most_requests: int = 60
    """Requests beyond are refused, so that an endless download ends."""
    cuts: list[int] = field(default_factory=list)
    """For each request in turn, after how many bytes the connection is cut; requests beyond are served whole."""
    requests: list[str | None] = field(default_factory=list)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        behaviour = self.server.behaviour
        asked = self.headers.get("Range")
        behaviour.requests.append(asked)
        self.close_connection = True
        if behaviour.status >= 400 or len(behaviour.requests) > behaviour.most_requests:
            self.send_error(max(behaviour.status, 404))
            return
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and behaviour.ranges else 0
        size = len(behaviour.content)
        if start >= size > 0:
            self.send_response(416)
            self.send_header("Content-Length", "0")
            if behaviour.totals:
                self.send_header("Content-Range", f"bytes */{size}")
            self.end_headers()
            return
        body = behaviour.content[start:]
        self.send_response(206 if start else 200)
        if behaviour.chunked:
            self.send_header("Transfer-Encoding", "chunked")
            body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
        elif behaviour.lengths:
            self.send_header("Content-Length", str(len(body)))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size if behaviour.totals else '*'}")
        self.end_headers()
        number = len(behaviour.requests) - 1
        cut = behaviour.cuts[number] if number < len(behaviour.cuts) else len(body)
        self.wfile.write(body[:cut])

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.behaviour = Behaviour()

    @property
    def download(self) -> Download:
        """The published file: the server may serve something else."""
        return Download(
            url=f"http://127.0.0.1:{self.server_port}/some/file.zip",
            name="file.zip",
            bytes=len(CONTENT),
            sha256=hashlib.sha256(CONTENT).hexdigest(),
        )


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(base, "FIRST_PAUSE", 0.001)
    without_proxies(monkeypatch)
    with serving(Server()) as server:
        yield server


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """A directory to download into, two levels below what exists."""
    return tmp_path / "data" / "raw"


def run_code(code: str, *arguments: object) -> subprocess.CompletedProcess:
    """Run Python code as the main program of a process of its own."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def assert_nothing_left(raw: Path) -> None:
    assert not raw.parent.exists()


def test_a_whole_download(server: Server, raw: Path) -> None:
    path = fetch(server.download, raw, OR_ELSE)
    assert path == raw / "file.zip"
    assert path.read_bytes() == CONTENT
    assert [entry.name for entry in raw.iterdir()] == ["file.zip"]
    assert server.behaviour.requests == [None]


def test_cut_connections_are_resumed_where_they_ended(server: Server, raw: Path) -> None:
    server.behaviour.cuts = [100_000, 1, 0, 50_000]
    assert fetch(server.download, raw, OR_ELSE).read_bytes() == CONTENT
    assert server.behaviour.requests == [None, *(f"bytes={n}-" for n in (100_000, 100_001, 100_001, 150_001))]


def test_more_cuts_than_attempts_do_no_harm_as_long_as_each_brings_something(server: Server, raw: Path) -> None:
    server.behaviour.cuts = [30_000] * 9
    assert fetch(server.download, raw, OR_ELSE).read_bytes() == CONTENT
    assert len(server.behaviour.requests) == 10


def test_a_download_that_failed_is_continued_by_the_next_call(server: Server, raw: Path) -> None:
    server.behaviour.cuts = [120_000, *[0] * 5]
    with pytest.raises(UserError) as caught:
        fetch(server.download, raw, OR_ELSE)
    assert "120,000 of 300,000 bytes came and are kept" in caught.value.found
    assert [entry.name for entry in raw.iterdir()] == ["file.zip.part"]
    assert len(server.behaviour.requests) == 6

    server.behaviour = Behaviour()
    assert fetch(server.download, raw, OR_ELSE).read_bytes() == CONTENT
    assert server.behaviour.requests == ["bytes=120000-"]
    assert [entry.name for entry in raw.iterdir()] == ["file.zip"]


def test_a_server_without_range_is_asked_for_all_again(server: Server, raw: Path) -> None:
    server.behaviour.ranges = False
    server.behaviour.cuts = [200_000, 250_000]
    assert fetch(server.download, raw, OR_ELSE).read_bytes() == CONTENT
    assert server.behaviour.requests == [None, "bytes=200000-", "bytes=250000-"]


def test_a_server_without_range_that_never_gets_to_the_end_is_given_up(server: Server, raw: Path) -> None:
    server.behaviour.ranges = False
    server.behaviour.cuts = [200_000] * 50
    with pytest.raises(UserError, match="no way to download"):
        fetch(server.download, raw, OR_ELSE)
    assert len(server.behaviour.requests) == 6


def test_another_file_of_the_same_size_is_refused(server: Server, raw: Path) -> None:
    server.behaviour.content = CONTENT[:-1] + bytes([CONTENT[-1] ^ 1])
    with pytest.raises(UserError) as caught:
        fetch(server.download, raw, OR_ELSE)
    assert hashlib.sha256(server.behaviour.content).hexdigest() in caught.value.found
    assert server.download.url in caught.value.found
    assert server.download.sha256 in caught.value.expected
    assert_nothing_left(raw)


def test_a_longer_file_is_refused(server: Server, raw: Path) -> None:
    server.behaviour.content = CONTENT + b"!"
    with pytest.raises(MismatchError) as caught:
        fetch(server.download, raw, OR_ELSE)
    assert caught.value.found == f"{server.download.url}, which has 300,001 bytes"
    assert_nothing_left(raw)


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("content", [b"", CONTENT[:1000], CONTENT[:-1], b"<html>Log in first</html>" * 1000])
def test_a_shorter_file_is_refused_at_the_first_answer(server: Server, raw: Path, content: bytes, ranges: bool) -> None:
    server.behaviour.content, server.behaviour.ranges = content, ranges
    with pytest.raises(MismatchError) as caught:
        fetch(server.download, raw, OR_ELSE)
    assert caught.value.found == f"{server.download.url}, which has {len(content):,} bytes"
    assert caught.value.expected == "300,000 bytes" and "upload the file again" in caught.value.hint
    assert server.behaviour.requests == [None]
    assert_nothing_left(raw)


@pytest.mark.parametrize("size", [100_000, 200_000, 400_000])
def test_a_file_that_has_another_size_when_its_download_is_continued_is_refused(
    server: Server, raw: Path, size: int
) -> None:
    """It ends before the requested range (status 416), or the answer with the range tells another size."""
    raw.mkdir(parents=True)
    (raw / "file.zip.part").write_bytes(CONTENT[:120_000])
    server.behaviour.content = (CONTENT * 2)[:size]
    with pytest.raises(MismatchError, match=f"which has {size:,} bytes"):
        fetch(server.download, raw, OR_ELSE)
    assert server.behaviour.requests == ["bytes=120000-"]


@pytest.mark.parametrize("ranges", [True, False])
def test_the_end_of_the_chunks_is_the_end_of_the_file(server: Server, raw: Path, ranges: bool) -> None:
    server.behaviour = Behaviour(chunked=True, ranges=ranges, cuts=[100_000])
    assert fetch(server.download, raw, OR_ELSE).read_bytes() == CONTENT
    (raw / "file.zip").unlink()
    server.behaviour = Behaviour(CONTENT[:-1000], chunked=True, ranges=ranges)
    with pytest.raises(MismatchError, match="which has 299,000 bytes"):
        fetch(server.download, raw, OR_ELSE)
    assert server.behaviour.requests == [None]


@pytest.mark.parametrize(
    ("ranges", "totals", "words", "requests"),
    [
        (True, True, "which has 200,000 bytes", 2),
        (True, False, "no way to download", 6),
        (False, True, "no way to download", 6),
    ],
)
def test_a_shorter_file_of_unknown_length_is_not_fetched_for_ever(
    server: Server, raw: Path, ranges: bool, totals: bool, words: str, requests: int
) -> None:
    """Its end cannot be told from a broken connection, but the next request brings nothing new."""
    server.behaviour = Behaviour(CONTENT[:200_000], lengths=False, ranges=ranges, totals=totals)
    with pytest.raises(UserError, match=words):
        fetch(server.download, raw, OR_ELSE)
    assert len(server.behaviour.requests) == requests


def test_what_an_older_release_left_is_not_taken_for_the_file(server: Server, raw: Path) -> None:
    """The remains are larger than the file now published: no request can mend that, a new start can."""
    raw.mkdir(parents=True)
    (raw / "file.zip.part").write_bytes(bytes(400_000))
    assert fetch(server.download, raw, OR_ELSE).read_bytes() == CONTENT
    assert server.behaviour.requests == [None]


def test_not_found_is_not_asked_twice(server: Server, raw: Path) -> None:
    server.behaviour.status = 404
    with pytest.raises(UserError) as caught:
        fetch(server.download, raw, OR_ELSE)
    assert_says_what_to_do(caught.value, server.download, raw)
    assert "Not Found" in caught.value.found
    assert len(server.behaviour.requests) == 1
    assert_nothing_left(raw)


def test_a_server_in_trouble_is_asked_again(server: Server, raw: Path) -> None:
    server.behaviour.status = 503
    with pytest.raises(UserError) as caught:
        fetch(server.download, raw, OR_ELSE)
    assert_says_what_to_do(caught.value, server.download, raw)
    assert len(server.behaviour.requests) == 5
    assert_nothing_left(raw)


def test_no_server_at_all(server: Server, raw: Path, capfd: pytest.CaptureFixture) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nowhere = replace(server.download, url=f"http://127.0.0.1:{unused.getsockname()[1]}/file.zip")
        with pytest.raises(UserError) as caught:
            fetch(nowhere, raw, OR_ELSE)
    assert_says_what_to_do(caught.value, nowhere, raw)
    assert "refused" in caught.value.found
    assert capfd.readouterr() == ("", "")
    assert_nothing_left(raw)


def assert_says_what_to_do(error: UserError, download: Download, raw: Path) -> None:
    assert "127.0.0.1" in error.found
    assert str(raw / "file.zip") in error.expected
    for words in (download.url, str(raw / "file.zip"), "--raw", OR_ELSE):
        assert words in error.hint


def test_a_directory_that_was_there_stays(server: Server, raw: Path) -> None:
    raw.mkdir(parents=True)
    server.behaviour.status = 404
    with pytest.raises(UserError):
        fetch(server.download, raw, OR_ELSE)
    assert list(raw.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on file sizes to stand for a full disk")
def test_a_full_disk_is_not_taken_for_a_broken_network(server: Server, tmp_path: Path) -> None:
    """A limit on the size of files refuses to write just as a full disk does."""
    process = run_code(
        f"""
        import resource
        from pathlib import Path
        from pipeline.readers.download import Download, fetch
        from shards.cli import run_command
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        run_command(lambda: fetch({server.download!r}, Path({str(tmp_path / "raw")!r}), "") and 0)
        """
    )
    assert_user_error(process, str(tmp_path / "raw" / "file.zip.part"), "room on the disk")
    assert len(server.behaviour.requests) == 1


def test_without_a_server_the_first_request_is_not_repeated(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "FIRST_PAUSE", 1000.0)
    for host in ("127.0.0.1:1", "no-such-host.invalid"):
        with pytest.raises(UserError) as caught:
            fetch(Download(f"http://{host}/file.zip", "file.zip", 10, "0" * 64), raw, OR_ELSE)
        assert "--raw" in caught.value.hint


def test_a_mirror_continues_what_the_first_server_began(server: Server, raw: Path) -> None:
    raw.mkdir(parents=True)
    (raw / "file.zip.part").write_bytes(CONTENT[:70_000])
    download = replace(server.download, url="http://127.0.0.1:1/file.zip", mirrors=(server.download.url,))
    assert fetch(download, raw, OR_ELSE).read_bytes() == CONTENT
    assert server.behaviour.requests == ["bytes=70000-"]


def test_a_mirror_with_another_file_is_named_and_not_used(server: Server, raw: Path) -> None:
    server.behaviour.content = CONTENT[::-1]
    nowhere = "http://127.0.0.1:1/file.zip"
    with pytest.raises(UserError) as caught:
        fetch(replace(server.download, url=nowhere, mirrors=(server.download.url,)), raw, OR_ELSE)
    assert "refused" in caught.value.found and "SHA-256" in caught.value.found and nowhere in caught.value.hint
    assert_nothing_left(raw)


def test_a_file_of_which_only_the_md5_is_published(server: Server, raw: Path) -> None:
    """Its size is asked for first."""
    md5 = hashlib.md5(CONTENT).hexdigest()
    download = replace(server.download, bytes=0, sha256="", md5=md5)
    server.behaviour.cuts = [len(CONTENT), 100_000]
    assert fetch(download, raw, OR_ELSE).read_bytes() == CONTENT
    assert server.behaviour.requests == [None, None, "bytes=100000-"]
    with pytest.raises(UserError) as caught:
        fetch(replace(download, name="other.zip", md5="0" * 32), raw, OR_ELSE)
    assert md5 in caught.value.found and f"MD5 {'0' * 32}" == caught.value.expected
    assert [entry.name for entry in raw.iterdir()] == ["file.zip"]


def test_packing_emnist_without_a_network_ends_in_one_message_and_leaves_nothing(tmp_path: Path) -> None:
    process = run_code(
        """
        import dataclasses
        import pipeline.datasets.emnist as emnist
        from pipeline.shard import main
        from shards.cli import run_command
        emnist.ARCHIVE = dataclasses.replace(
            emnist.ARCHIVE, url="http://127.0.0.1:1/gzip.zip", mirrors=("http://127.0.0.1:2/gzip.zip",)
        )
        run_command(main)
        """,
        *("emnist", "--raw", tmp_path / "raw", "--out", tmp_path / "out"),
    )
    assert_user_error(process, "http://127.0.0.1:1/gzip.zip", str(tmp_path / "raw" / "gzip.zip"), "--raw")
    assert len(process.stderr.splitlines()) == 3
    assert list(tmp_path.iterdir()) == []
