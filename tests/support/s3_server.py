"""A real S3 server on this machine (moto, in a process of its own), and a line to it that can be spoilt."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from shards.remote.datasets import remove_manifests, upload_files, upload_manifests

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
BUCKET = "bucket"


@contextmanager
def s3_server() -> Iterator[int]:
    """The port of an S3 server with an empty bucket. Skips the test without moto and s3fs."""
    pytest.importorskip("moto", reason="no moto (pip install -e '.[test]')")
    pytest.importorskip("s3fs", reason="no s3fs (pip install -e '.[s3]')")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            deadline = time.monotonic() + 30
            while not _answers(port):
                assert server.poll() is None and time.monotonic() < deadline, "moto did not start"
                time.sleep(0.05)
            bucket = urllib.request.Request(f"http://127.0.0.1:{port}/{BUCKET}", method="PUT")
            urllib.request.build_opener(urllib.request.ProxyHandler({})).open(bucket).close()
            yield port
        finally:
            server.terminate()


def _answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
    except OSError:
        return False


@dataclass
class Faults:
    """What the line does wrong, each a number of times, and what it has carried so far."""

    cuts: list[int] = field(default_factory=list)
    """For the next long answers in turn, how many bytes of a piece of at most 64 KiB come before the line is cut."""
    flips: int = 0
    """Long answers in which one byte is changed."""
    uploads_flipped: int = 0
    """Uploads in which one byte is changed."""
    silent: int = 0
    """Requests that are never answered."""
    unavailable: int = 0
    """Requests answered with 503."""
    seconds_a_chunk: float = 0.0
    """How long 64 KiB take."""
    carried: int = 0
    """Bytes that came back to clients."""
    requests: list[str] = field(default_factory=list)
    """First lines of all requests."""


class Line:
    """A TCP proxy in front of a server on this machine."""

    _LONG = 20_000  # bytes of an answer that is more than headers and a manifest

    def __init__(self, target: int) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self.port = self._listener.getsockname()[1]
        self.faults = Faults()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        # Closing alone would not wake the thread that accepts.
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in self._open:
            _hang_up(connection)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._target))
            self._open += [client, server]
            for work in (self._forth, self._back):
                threading.Thread(target=work, args=(client, server), daemon=True).start()

    def _forth(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while data := client.recv(1 << 16):
                faults = self.faults
                if data.split(b" ")[0] in (b"GET", b"PUT", b"HEAD", b"DELETE", b"POST"):
                    faults.requests.append(data.split(b"\r\n")[0].decode())
                    if faults.silent:
                        faults.silent -= 1
                        continue
                    if faults.unavailable:
                        faults.unavailable -= 1
                        client.sendall(b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                        break
                elif faults.uploads_flipped and len(data) > self._LONG:
                    faults.uploads_flipped -= 1
                    data = _flipped(data)
                server.sendall(data)
        _hang_up(client)
        _hang_up(server)

    def _back(self, client: socket.socket, server: socket.socket) -> None:
        came = 0
        with suppress(OSError):
            while data := server.recv(1 << 16):
                faults = self.faults
                came += len(data)
                if faults.seconds_a_chunk:
                    time.sleep(faults.seconds_a_chunk * len(data) / (1 << 16))
                if came > self._LONG and faults.cuts:
                    client.sendall(data[: faults.cuts.pop(0)])
                    break
                if len(data) > self._LONG and faults.flips:
                    faults.flips -= 1
                    data = _flipped(data)
                client.sendall(data)
                faults.carried += len(data)
        _hang_up(client)
        _hang_up(server)


def _flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def _hang_up(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()


def environment(port: int) -> dict[str, str]:
    """What points clients, in this process or another, to a server on this machine."""
    unset = dict.fromkeys([name for name in os.environ if name.lower().endswith("_proxy")], "")
    return {**unset, **CREDENTIALS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_CONFIG_FILE": os.devnull}


def upload_dataset(directory: Path, address: str) -> None:
    """Upload a packed data set as packing does: it replaces the data set at the address."""
    remove_manifests(address)
    upload_files(directory, address)
    upload_manifests(directory, address)
