"""Storages of fsspec that transfer files by requests for ranges: what is requested, and no more."""

from __future__ import annotations

import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from support.http_server import serving, use_tls, without_proxies
from support.hub_server import BRANCH, HubServer, hub_server, use_endpoint
from support.s3_server import CREDENTIALS

from shards.errors import MismatchError
from shards.remote import base, fsspec_backend
from shards.remote.backends import open_storage
from shards.remote.base import CertificateError, ClockError, NotFoundError, RemoteStorage, TransientError

PIECE = 256 << 10
SIZE = 1_000_000
CONTENT = np.random.default_rng(0).bytes(SIZE)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    monkeypatch.setattr(fsspec_backend, "PIECE", PIECE)
    without_proxies(monkeypatch)
    with hub_server() as server:
        use_endpoint(monkeypatch, server.endpoint)
        server.files["user/pets"] = {"one.tar": CONTENT, "small.json": b"{}"}
        yield server


@pytest.fixture
def storage(hub: HubServer) -> RemoteStorage:
    return open_storage(f"hf://datasets/user/pets@{BRANCH}")


@pytest.mark.parametrize("start", [0, 1, PIECE, 600_000])
def test_a_hub_sends_each_byte_once(hub: HubServer, storage: RemoteStorage, start: int) -> None:
    assert b"".join(storage.stream("one.tar", start, SIZE)) == CONTENT[start:]
    assert hub.ranges == [(first, min(PIECE, SIZE - first)) for first in range(start, SIZE, PIECE)]


@pytest.mark.parametrize(("name", "content"), [("small.json", b"{}"), ("one.tar", CONTENT)])
def test_a_hub_sends_a_small_file_at_once(hub: HubServer, storage: RemoteStorage, name: str, content: bytes) -> None:
    assert storage.read(name, 1 << 28) == content
    assert sum(size for _, size in hub.ranges) == len(content)


def test_a_file_that_is_shorter_at_a_hub(hub: HubServer, storage: RemoteStorage) -> None:
    with pytest.raises(MismatchError, match="which has at most 1,000,000 bytes"):
        b"".join(storage.stream("one.tar", 0, SIZE + 1))


def test_after_a_timeout_a_hub_is_asked_for_less(
    hub: HubServer, storage: RemoteStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fsspec_backend, "SMALLEST_PIECE", 100_000)
    assert storage.info("one.tar").bytes == SIZE
    monkeypatch.setattr(base, "STALL_SECONDS", 0.5)
    for size in (PIECE, PIECE // 2, 100_000):
        hub.ranges, hub.pauses = [], [1.5]
        with pytest.raises(TransientError, match="no answer"):
            next(storage.stream("one.tar", 0, SIZE))
        deadline = time.monotonic() + 20
        while not hub.ranges and time.monotonic() < deadline:  # on a busy machine the request is on its way
            time.sleep(0.01)
        assert hub.ranges == [(0, size)]


@pytest.fixture
def secure_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The address of a hub with a certificate of no known authority, and that certificate."""
    for name in ("SSL_CERT_FILE", "AWS_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    without_proxies(monkeypatch)
    server = HubServer()
    certificate = use_tls(server, tmp_path)
    server.files["user/pets"] = {"one.tar": CONTENT}
    with serving(server):
        yield server.endpoint.replace("http:", "https:"), certificate


def test_an_unknown_authority_of_a_hub(secure_hub: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    use_endpoint(monkeypatch, secure_hub[0])
    address = f"hf://datasets/user/pets@{BRANCH}"
    with pytest.raises(CertificateError, match="CERTIFICATE_VERIFY_FAILED") as caught:
        open_storage(address).find()
    assert caught.value.hint.startswith("export SSL_CERT_FILE=")


def test_an_unknown_authority_of_s3(secure_hub: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("s3fs")
    endpoint, certificate = secure_hub
    for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": endpoint}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(CertificateError, match="CERTIFICATE_VERIFY_FAILED") as caught:
        open_storage("s3://bucket/pets").info("one.tar")
    assert caught.value.hint.startswith("export AWS_CA_BUNDLE=FILE")
    monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
    with pytest.raises(NotFoundError):  # the hub has no such file
        open_storage("s3://bucket/pets").info("one.tar")


class _Refusal(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = b"<Error><Code>RequestTimeTooSkewed</Code><Message>The difference is too large.</Message></Error>"
        self.send_response(403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def test_a_wrong_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """S3 refuses requests that are signed a quarter of an hour earlier or later: the credentials are not at fault."""
    pytest.importorskip("s3fs")
    without_proxies(monkeypatch)
    with serving(ThreadingHTTPServer(("127.0.0.1", 0), _Refusal)) as server:
        for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}"}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ClockError, match="The difference is too large") as caught:
            open_storage("s3://bucket/pets").read("one.tar", 100)
    assert "date -u" in caught.value.hint


@pytest.mark.parametrize("start", [0, 1, PIECE, SIZE - 1])
def test_a_server_without_ranges(start: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy in front of a storage may send the whole file in answer to every request."""
    monkeypatch.setattr(fsspec_backend, "PIECE", PIECE)
    storage = open_storage("memory://ranges")
    monkeypatch.setattr(storage._fs, "cat_file", lambda path, **_: CONTENT)
    assert b"".join(storage.stream("one.tar", start, SIZE)) == CONTENT[start:]
    with pytest.raises(MismatchError, match="which has 1,000,000 bytes"):
        b"".join(storage.stream("one.tar", start, SIZE - 10 if start < SIZE - 10 else SIZE + 10))


def test_a_key_with_two_colons(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no chain of file systems."""
    pytest.importorskip("s3fs")
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    storage = open_storage("s3://bucket/a::b/c d?e#f")
    assert storage._path("g::h") == "bucket/a::b/c d?e#f/g::h"
