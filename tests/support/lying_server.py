"""A web server on this machine that answers some requests with lies, chosen by a seed."""

from __future__ import annotations

import gzip
import re
import socket
import threading
import urllib.parse
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

ESCAPE = "\x1b]0;owned\x07\x1b[2J"
_PIECE = bytes(64 << 10)


class Request:
    """A request, and what a server says to it.

    Args:
        connection: The connection of the client.
        content: The file; None if there is none of that name.
        start: The first byte that the client asks for; None if it asks for all.
        version: The version that is served, and its ETag.
        begun: The version in If-Range, if any.
        end: Set when the server is closed.
    """

    def __init__(
        self,
        connection: socket.socket,
        content: bytes | None,
        start: int | None,
        version: str,
        begun: str,
        end: threading.Event,
    ) -> None:
        self.connection = connection
        self.content = content if content is not None else b""
        self.exists = content is not None
        self.start = start if not begun or begun == version else None
        self.version = version
        self.end = end

    def send(self, status: str, headers: dict[str, object], body: bytes = b"") -> None:
        lines = [f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in headers.items()), "Connection: close"]
        self.connection.sendall("\r\n".join([*lines, "", ""]).encode("latin-1") + body)

    def truth(self, **changes: object) -> None:
        """The file or its rest, with some headers changed; those that are None are left out."""
        if not self.exists:
            return self.send("404 Not Found", {"Content-Length": 0})
        start = self.start or 0
        body = self.content[start:]
        headers: dict[str, object] = {"Content-Length": len(body), "ETag": self.version}
        if self.start is not None:
            headers["Content-Range"] = f"bytes {start}-{len(self.content) - 1}/{len(self.content)}"
        headers |= {name.replace("_", "-"): value for name, value in changes.items()}
        self.send(
            "206 Partial Content" if self.start is not None else "200 OK",
            {name: value for name, value in headers.items() if value is not None},
            body,
        )

    def drip(self, content: bytes, seconds: float = 0.05) -> None:
        """Send a byte from time to time."""
        for number in range(len(content)):
            if self.end.wait(seconds):
                return
            self.connection.sendall(content[number : number + 1])


def _endless(request: Request, headers: dict[str, object], piece: bytes = _PIECE) -> None:
    request.send("200 OK", headers)
    while not request.end.is_set():
        request.connection.sendall(piece)


def _headers_without_end(request: Request) -> None:
    request.connection.sendall(b"HTTP/1.1 200 OK\r\n")
    request.drip(b"X-Padding: " + b"x" * 10_000)


def _drip_body(request: Request) -> None:
    request.send("200 OK", {"Content-Length": len(request.content), "ETag": request.version})
    request.drip(request.content)


def _drip_chunk_line(request: Request) -> None:
    request.send("200 OK", {"Transfer-Encoding": "chunked"})
    request.drip(b"1;" + b"x" * 10_000)


def _cut(request: Request) -> None:
    request.content, whole = request.content[: len(request.content) // 2], len(request.content)
    request.truth(Content_Length=whole - (request.start or 0))


def _truncated(request: Request) -> None:
    """Serve the first half as if it were the file."""
    request.content = request.content[: len(request.content) // 2]
    if request.start is not None and request.start >= len(request.content):
        total = f"bytes */{len(request.content)}"
        return request.send("416 Range Not Satisfiable", {"Content-Range": total, "Content-Length": 0})
    request.truth()


def _flip(request: Request) -> None:
    middle = len(request.content) // 2
    content = request.content
    request.content = content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :] if content else content
    request.truth()


def _other_version(request: Request) -> None:
    request.content = bytes(byte ^ 85 for byte in request.content)
    request.truth(ETag='"other"')


def _whole_other_version(request: Request) -> None:
    request.start = None
    _other_version(request)


def _bomb(request: Request) -> None:
    body = gzip.compress(bytes(1 << 22))
    request.send("200 OK", {"Content-Encoding": "gzip", "Content-Length": len(body)}, body)


def _silence(request: Request) -> None:
    request.end.wait(20)


def _informational(request: Request) -> None:
    while not request.end.wait(0.05):
        request.connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")


LIES: dict[str, Callable[[Request], None]] = {
    "long length": lambda request: request.truth(Content_Length=len(request.content) + 1000),
    "short length": lambda request: request.truth(Content_Length=len(request.content) // 2),
    "negative length": lambda request: request.truth(Content_Length=-5),
    "huge length": lambda request: request.truth(Content_Length="9" * 5000),
    "no number": lambda request: request.truth(Content_Length="many"),
    "no length": lambda request: request.truth(Content_Length=None),
    "other range": lambda request: request.truth(Content_Range="bytes 3-90/100"),
    "other total": lambda request: request.truth(
        Content_Range=f"bytes {request.start or 0}-{len(request.content) - 1}/7"
    ),
    "no range": lambda request: request.truth(Content_Range=None),
    "escapes in range": lambda request: request.truth(Content_Range=f"bytes {ESCAPE}"),
    "partial": lambda request: request.send("206 Partial Content", {"Content-Length": 3}, b"abc"),
    "cut": _cut,
    "truncated": _truncated,
    "flip": _flip,
    "other version": _other_version,
    "whole other version": _whole_other_version,
    "drip": _drip_body,
    "drip headers": _headers_without_end,
    "drip chunk line": _drip_chunk_line,
    "silence": _silence,
    "informational": _informational,
    "endless": lambda request: _endless(request, {}),
    "endless chunks": lambda request: _endless(
        request, {"Transfer-Encoding": "chunked"}, b"1000\r\n" + bytes(4096) + b"\r\n"
    ),
    "endless json": lambda request: _endless(request, {}, b'{"shards":[' * 1000),
    "nested json": lambda request: request.send("200 OK", {}, b"[" * 200_000),
    "broken chunks": lambda request: request.send("200 OK", {"Transfer-Encoding": "chunked"}, b"zz\r\nabc"),
    "no http": lambda request: request.connection.sendall(b"\x00\xff" * 1000),
    "nothing": lambda request: None,
    "page": lambda request: request.send("200 OK", {"Content-Type": "text/html"}, b"<html>Log in first</html>"),
    "bomb": _bomb,
    "escapes": lambda request: request.send(f"403 {ESCAPE}No", {"Content-Length": 0}),
    "busy": lambda request: request.send(f"503 {ESCAPE}Busy", {"Content-Length": 0}),
    "unsatisfiable": lambda request: request.send("416 Range", {"Content-Length": 0}),
    "not modified": lambda request: request.send("304 Not Modified", {"Content-Length": 0}),
    "odd status": lambda request: request.send("999 Odd", {"Content-Length": 0}),
    "loop": lambda request: request.send("302 Found", {"Location": "/loop", "Content-Length": 0}),
    "to a file": lambda request: request.send("302 Found", {"Location": "file:///etc/passwd", "Content-Length": 0}),
    "to ftp": lambda request: request.send("301 Moved", {"Location": "ftp://127.0.0.1:1/x", "Content-Length": 0}),
    "to nowhere": lambda request: request.send("307 There", {"Location": f"http://{ESCAPE}/", "Content-Length": 0}),
    "many headers": lambda request: request.send("200 OK", {f"X-{number}": "x" for number in range(500)}),
    "long header": lambda request: request.send("200 OK", {"X": "x" * 100_000}),
}  # fmt: skip


class LyingServer:
    """Serves the files below a directory. `choose` picks the lie of a request, or None for the truth."""

    def __init__(self, root: Path, choose: Callable[[], str | None]) -> None:
        self.root = root
        self.choose = choose
        self.version = '"one"'
        self.authorizations: list[str | None] = []
        self._end = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    @classmethod
    def seeded(cls, root: Path, seed: int) -> LyingServer:
        """A server that lies in one of its answers on average, with two or three kinds of lies."""
        random = np.random.default_rng(seed)
        kinds = random.choice(sorted(LIES), random.integers(1, 4), replace=False)
        share = random.choice([0.1, 0.3, 1.0])
        lock = threading.Lock()

        def choose() -> str | None:
            with lock:
                return str(random.choice(kinds)) if random.random() < share else None

        return cls(root, choose)

    def close(self) -> None:
        self._end.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            head = b""
            while b"\r\n\r\n" not in head:
                if not (data := connection.recv(1 << 16)):
                    return
                head += data
            text = head.decode("latin-1")
            path = self.root / urllib.parse.unquote(urllib.parse.urlsplit(text.split(" ")[1]).path).lstrip("/")
            headers = dict(re.findall(r"^([\w-]+): (.*?)\r$", text, re.M))
            self.authorizations.append(headers.get("Authorization"))
            start = re.fullmatch(r"bytes=(\d+)-", headers.get("Range", ""))
            request = Request(
                connection,
                path.read_bytes() if path.is_file() else None,
                int(start[1]) if start else None,
                self.version,
                headers.get("If-Range", ""),
                self._end,
            )
            lie = self.choose()
            (LIES[lie] if lie else Request.truth)(request)
            with suppress(OSError):
                connection.shutdown(socket.SHUT_WR)
