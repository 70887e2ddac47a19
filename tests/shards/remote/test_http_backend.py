"""Sets and raw files from web servers: with ranges and without, that cut, stall, refuse and redirect."""

from __future__ import annotations

import base64
import pickle
import re
import shutil
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from support.http_server import serving, use_tls, without_proxies
from support.s3_server import upload_dataset

import shards.remote.base as remote
from pipeline.readers.download import Download, fetch
from shards import Manifest, UserError, open_split
from shards.remote.backends import open_storage
from shards.remote.datasets import remote_manifests, resolve_dataset, resolve_files


@dataclass
class Behaviour:
    """What the server does wrong, and what it was asked."""

    ranges: bool = True
    sizes: bool = True
    status: int = 200
    password: str | None = None
    redirect: str | None = None
    exact: dict[str, bytes] = field(default_factory=dict)
    """Files by their addresses, of which every character counts."""
    headers: dict[str, str] = field(default_factory=dict)
    """Further headers of files."""
    moved: str | None = None
    """Where the server has what is not there."""
    cuts: list[int] = field(default_factory=list)
    """For each long answer in turn, after how many bytes the connection is cut."""
    stalls: int = 0
    """Long answers that stop without an end, after `stall_after` bytes."""
    stall_after: int = 1000
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    """Path and Range header of each request."""
    authorizations: list[str | None] = field(default_factory=list)
    sent: int = 0


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        behaviour = self.server.behaviour
        asked = self.headers.get("Range")
        behaviour.requests.append((self.path, asked))
        behaviour.authorizations.append(self.headers.get("Authorization"))
        self.close_connection = True
        path = self.server.root / unquote(urlsplit(self.path).path).lstrip("/")
        if behaviour.redirect:
            self.send_response(302)
            self.send_header("Location", behaviour.redirect + self.path)
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif 200 < behaviour.status < 300:
            self.send_response(behaviour.status)
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif behaviour.status != 200:
            self.send_error(behaviour.status)
        elif self.path in behaviour.exact:
            self._send(behaviour.exact[self.path], asked)
        elif behaviour.password and self.headers.get("Authorization") != behaviour.password:
            self.send_error(401)
        elif not path.is_file() and behaviour.moved:
            self.send_response(301)
            self.send_header("Location", behaviour.moved)
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif not path.is_file():
            self.send_error(404)
        else:
            self._send(path.read_bytes(), asked if behaviour.ranges else None)

    def _send(self, content: bytes, asked: str | None) -> None:
        behaviour = self.server.behaviour
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked else 0
        body = content[start:]
        self.send_response(206 if asked else 200)
        if behaviour.sizes:
            self.send_header("Content-Length", str(len(body)))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("ETag", f'"{hash(content)}"')
        for name, value in behaviour.headers.items():
            self.send_header(name, value)
        self.end_headers()
        long = len(body) > 50_000
        if long and behaviour.stalls:
            behaviour.stalls -= 1
            self.wfile.write(body[: behaviour.stall_after])
            self.server.end.wait(20)
            return
        cut = behaviour.cuts.pop(0) if long and behaviour.cuts else len(body)
        self.wfile.write(body[:cut])
        behaviour.sent += cut

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root = root
        self.behaviour = Behaviour()
        self.end = threading.Event()

    def handle_error(self, *_: object) -> None:
        """Clients that go away are not worth a traceback."""


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INKSTREAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("INKSTREAM_CACHE_SIZE", raising=False)
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.01)
    without_proxies(monkeypatch)


def serve(root: Path) -> Iterator[Server]:
    with serving(Server(root)) as server:
        yield server
        server.end.set()


@pytest.fixture
def server(synthetic_set: Path, tmp_path: Path) -> Iterator[Server]:
    """Serves a packed set at /my%20sets/set, and a raw file."""
    (tmp_path / "web").mkdir()
    shutil.copytree(synthetic_set, tmp_path / "web" / "my sets" / "set")
    (tmp_path / "web" / "raw.zip").write_bytes(bytes(range(256)) * 1000)
    yield from serve(tmp_path / "web")


def address(server: Server, path: str = "my%20sets/set", user: str = "") -> str:
    return f"http://{user}127.0.0.1:{server.server_port}/{path}"


def test_a_set(server: Server, synthetic_set: Path) -> None:
    ours, theirs = open_split(address(server), "train"), open_split(synthetic_set, "train")
    samples = np.arange(len(theirs))
    np.testing.assert_array_equal(ours.read(samples), theirs.read(samples))
    assert ours.manifest == theirs.manifest
    server.behaviour = Behaviour()
    assert resolve_dataset(address(server)) == resolve_dataset(address(server) + "/")
    assert all(path.endswith("manifest.json") for path, _ in server.behaviour.requests)


@pytest.mark.parametrize("path", ["my sets/dé%20à", "my%20sets/dé à", "my%20sets/d%C3%A9%20%C3%A0"])
def test_an_address_may_have_spaces_and_letters_of_all_scripts(server: Server, path: str) -> None:
    (server.root / "my sets" / "dé à").symlink_to("set")
    assert (resolve_dataset(address(server, path)) / "train" / "manifest.json").is_file()
    assert {path.rsplit("/", 1)[0] for path, _ in server.behaviour.requests} >= {"/my%20sets/d%C3%A9%20%C3%A0/train"}
    (server.root / "dé à.zip").write_bytes(b"raw")
    assert resolve_files(address(server, "dé à.zip?sig=é")).read_bytes() == b"raw"


def test_an_address_that_is_none_is_not_tried_again(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote.RetryPolicy, "wait", lambda *_: pytest.fail("another attempt"))
    with pytest.raises(UserError, match="nonnumeric port"):
        resolve_dataset("http://127.0.0.1:port/set")


def test_a_single_part(server: Server) -> None:
    assert (resolve_dataset(address(server, "my%20sets/set/train")) / "manifest.json").is_file()


@pytest.mark.parametrize("ranges", [True, False])
def test_cut_connections(server: Server, synthetic_set: Path, ranges: bool) -> None:
    """Without ranges a file comes from its beginning again, and what is there is passed over."""
    shard = Manifest.read(synthetic_set / "train").shards[0]
    resolve_dataset(address(server, "my%20sets/set/test"))
    server.behaviour = Behaviour(ranges=ranges, cuts=[100_000, 100_000 if ranges else 200_000, 300_000])
    directory = resolve_dataset(address(server, "my%20sets/set/train"))
    assert (directory / shard.name).read_bytes() == (synthetic_set / "train" / shard.name).read_bytes()
    asked = [header for path, header in server.behaviour.requests if path.endswith(shard.name)]
    assert asked[:3] == [None, "bytes=100000-", "bytes=200000-"]
    if ranges:
        assert server.behaviour.sent < shard.bytes + 50_000


def test_a_server_that_stops_in_the_middle(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "STALL_SECONDS", 0.3)
    server.behaviour.stalls = 3
    resolve_dataset(address(server))
    server.behaviour = Behaviour(stalls=10**6, stall_after=0)
    with pytest.raises(UserError, match=r"not a byte for 0\.3 seconds"):
        resolve_files(address(server, "raw.zip"))


@pytest.mark.parametrize(
    ("status", "words", "requests"),
    [(404, "nothing at", 4), (403, "no permission", 4), (401, "no permission", 4), (503, "no way to reach", 20)],
)
def test_refusals(server: Server, status: int, words: str, requests: int) -> None:
    server.behaviour.status = status
    with pytest.raises(UserError, match=words) as caught:
        resolve_dataset(address(server))
    assert address(server) in caught.value.found
    assert len(server.behaviour.requests) == requests


def test_a_user_with_a_password(server: Server, tmp_path: Path) -> None:
    server.behaviour.password = "Basic " + base64.b64encode(b"anna:hunter two").decode()
    with pytest.raises(UserError, match="no permission") as caught:
        resolve_dataset(address(server))
    assert "USER:PASSWORD@HOST" in caught.value.hint
    assert resolve_dataset(address(server, user="anna:hunter%20two@")).is_dir()
    with pytest.raises(UserError) as caught:
        resolve_dataset(address(server, user="anna:wrongone@"))
    assert "wrongone" not in str(caught.value)
    for path in (tmp_path / "cache").rglob("*"):
        assert "hunter" not in str(path)
        assert not path.is_file() or b"hunter" not in path.read_bytes()


def test_a_password_is_not_told_to_whom_one_is_sent_on(server: Server, tmp_path: Path) -> None:
    for other in serve(tmp_path / "web"):
        server.behaviour.redirect = f"http://127.0.0.1:{other.server_port}"
        resolve_dataset(address(server, user="anna:hunter@"))
        assert set(server.behaviour.authorizations) == {"Basic " + base64.b64encode(b"anna:hunter").decode()}
        assert set(other.behaviour.authorizations) == {None}


def test_a_password_is_named_again_where_the_same_server_sends_one_on(server: Server) -> None:
    server.behaviour.password = "Basic " + base64.b64encode(b"anna:hunter").decode()
    server.behaviour.moved = "/raw.zip"
    assert resolve_files(address(server, "old.zip", user="anna:hunter@")).stat().st_size == 256_000


def test_a_redirection_to_another_protocol_is_refused(server: Server) -> None:
    for there in ("file:///etc/passwd#", "ftp://127.0.0.1:1/"):
        server.behaviour = Behaviour(redirect=there)
        with pytest.raises(UserError, match="error: no "):
            resolve_files(address(server, "raw.zip"))
        assert len(server.behaviour.requests) <= 5


def test_a_signed_address_keeps_its_signature(server: Server) -> None:
    resolve_dataset(address(server, "my%20sets/set?sig=c2VjcmV0"))
    assert {urlsplit(path).query for path, _ in server.behaviour.requests} == {"sig=c2VjcmV0"}


def test_a_raw_file(server: Server, tmp_path: Path) -> None:
    path = resolve_files(address(server, "raw.zip?sig=c2VjcmV0"))
    assert path.name == "raw.zip"
    assert path.read_bytes() == (tmp_path / "web" / "raw.zip").read_bytes()
    (tmp_path / "web" / "raw.zip").write_bytes(b"changed")
    assert resolve_files(address(server, "raw.zip?sig=c2VjcmV0")).read_bytes() == b"changed"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("d/a+b(1),c;v=2.zip", "a+b(1),c;v=2.zip"),
        ("d/x%2Fy.zip", "y.zip"),
        ("d/caf%E9.zip", "caf\ufffd.zip"),
        ("d/caf%C3%A9%20%3f.zip", "café ?.zip"),
        ("d/%61.zip?x=%61+b", "a.zip"),
    ],
)
def test_the_address_of_a_raw_file_is_used_as_it_is(server: Server, path: str, name: str) -> None:
    server.behaviour.exact[f"/{path}"] = b"content"
    file = resolve_files(address(server, path))
    assert (file.name, file.read_bytes()) == (name, b"content")
    assert {asked for asked, _ in server.behaviour.requests} == {f"/{path}"}


@pytest.mark.parametrize("status", [202, 204, 206])
def test_an_answer_without_the_file_is_no_empty_file(server: Server, status: int) -> None:
    server.behaviour.status = status
    with pytest.raises(remote.TransientError, match=rf"HTTP status {status}|a part of the file"):
        resolve_files(address(server, "raw.zip"))


def test_a_raw_file_that_a_server_compresses_is_refused(server: Server, tmp_path: Path) -> None:
    """A file that is compressed itself is not: servers name its compression too."""
    server.behaviour.headers["Content-Encoding"] = "gzip"
    with pytest.raises(UserError, match=r"compresses \(Content-Encoding: gzip\)") as caught:
        resolve_files(address(server, "raw.zip"))
    assert "gunzip > FILE" in caught.value.hint
    shutil.copy(tmp_path / "web" / "raw.zip", tmp_path / "web" / "raw.csv.gz")
    assert resolve_files(address(server, "raw.csv.gz")).read_bytes() == (tmp_path / "web" / "raw.zip").read_bytes()


@pytest.mark.parametrize(
    "kind", [remote.NotFoundError, remote.AccessDeniedError, remote.CertificateError, remote.TransientError]
)
def test_an_error_survives_the_way_to_another_process(kind: type[remote.RemoteError]) -> None:
    error = kind("s3://bucket/name", "no answer")
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), copy.reason) == (kind, str(error), "no answer")


def test_raw_files_have_no_list(server: Server) -> None:
    with pytest.raises(UserError, match="gives no list"):
        resolve_files(address(server, "raw/"))


def test_a_raw_file_of_unknown_size(server: Server) -> None:
    server.behaviour.sizes = False
    with pytest.raises(UserError, match="does not tell the size"):
        resolve_files(address(server, "raw.zip"))
    assert resolve_dataset(address(server)).is_dir(), "a manifest tells the sizes"


def test_a_web_server_is_no_place_to_write_to(server: Server, synthetic_set: Path) -> None:
    assert set(remote_manifests(address(server))) == {"train", "test"}
    with pytest.raises(UserError, match="as a place to write to"):
        upload_dataset(synthetic_set, address(server))


def test_pages_in_place_of_files(server: Server, tmp_path: Path) -> None:
    (tmp_path / "web" / "my sets" / "set" / "train" / "manifest.json").write_text("<html>Log in first</html>")
    with pytest.raises(UserError, match="damaged"):
        resolve_dataset(address(server))


@pytest.fixture
def secure(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Server, Path]]:
    """A server of the same files with a certificate of no known authority, and that certificate."""
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    secure = Server(tmp_path / "web")
    certificate = use_tls(secure, tmp_path)
    with serving(secure):
        yield secure, certificate


def secure_address(server: Server, path: str = "my%20sets/set") -> str:
    return address(server, path).replace("http:", "https:")


def test_https(secure: tuple[Server, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    server, certificate = secure
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert resolve_dataset(secure_address(server)).is_dir()
    assert resolve_files(secure_address(server, "raw.zip")).stat().st_size == 256_000
    with pytest.raises(remote.CertificateError, match="Hostname mismatch") as caught:
        resolve_files(secure_address(server, "raw.zip").replace("127.0.0.1", "localhost"))
    assert "check the clock (date) and the address" in caught.value.hint


@pytest.mark.parametrize(
    "work",
    [
        lambda server: resolve_dataset(secure_address(server)),
        lambda server: resolve_files(secure_address(server, "raw.zip")),
        lambda server: open_storage(secure_address(server, "raw.zip")).info(""),
        lambda server: next(open_storage(secure_address(server, "raw.zip")).stream("", 1000, 256_000)),
    ],
    ids=["data set", "raw file", "metadata", "range"],
)
def test_an_unknown_authority(
    secure: tuple[Server, Path], work: Callable[[Server], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote.RetryPolicy, "wait", lambda *_: pytest.fail("another attempt"))
    with pytest.raises(remote.CertificateError, match="CERTIFICATE_VERIFY_FAILED") as caught:
        work(secure[0])
    assert caught.value.found.startswith(f"no valid certificate from {secure_address(secure[0], '')}")
    assert caught.value.hint.startswith('export SSL_CERT_FILE="$(python -m certifi)"')
    assert "netrc" not in str(caught.value)


def test_an_unknown_authority_of_published_files(server: Server, secure: tuple[Server, Path], tmp_path: Path) -> None:
    """Also where another server is missing the file; the other ways to get it are named as well."""
    url = secure_address(secure[0], "raw.zip")
    for urls in ((url,), (url, url), (address(server, "missing"), url)):
        with pytest.raises(UserError, match="CERTIFICATE_VERIFY_FAILED") as caught:
            fetch(
                Download(urls[0], "raw.zip", 256_000, "0" * 64, mirrors=urls[1:]), tmp_path / "raw", "the loose files"
            )
        assert caught.value.hint.startswith('export SSL_CERT_FILE="$(python -m certifi)"')
        assert f"or download {urls[0]} elsewhere" in caught.value.hint and "the loose files" in caught.value.hint


def test_the_command_in_the_hint_prints_the_path_of_certificates() -> None:
    process = subprocess.run([sys.executable, "-m", "certifi"], capture_output=True, text=True, check=True)
    assert ssl.create_default_context(cafile=process.stdout.strip()).get_ca_certs()
