"""Places that speak plain HTTP(S), by the standard library: no listing, no writing, ranges where the server can."""

from __future__ import annotations

import base64
import contextlib
import http.client
import ssl
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from shards.errors import UserError
from shards.remote import base as remote
from shards.remote.base import Listed, Missing, Named, Refused, Unreachable

_CHUNK = 256 << 10


class WebPlace(Named):
    """An http:// or https:// address; see `shards.remote.base.Place`.

    fsspec's own HTTP file system holds a whole file in memory where a server ignores ranges, and has no limit of
    seconds without a byte.
    """

    def __init__(self, address: str) -> None:
        super().__init__(address)
        parts = urllib.parse.urlsplit(address)
        user, _, host = parts.netloc.rpartition("@")
        self._parts = parts._replace(netloc=host, fragment="")
        token = base64.b64encode(urllib.parse.unquote(user).encode()).decode()
        self._authorization = f"Basic {token}" if user else None

    def read(self, name: str) -> bytes:
        with self._answer(name) as response:
            return b"".join(self._chunks(name, response, 0, _length(response)))

    def stream(self, name: str, start: int, size: int) -> Iterator[bytes]:
        with self._answer(name, start) as response:
            # A server that knows no ranges begins at the beginning: what is there already is passed over.
            at = start if response.status == http.HTTPStatus.PARTIAL_CONTENT else 0
            for chunk in self._chunks(name, response, at, size):
                at += len(chunk)
                if at > start:
                    yield chunk[start - at :] if at - start < len(chunk) else chunk

    def find(self) -> dict[str, Listed]:
        if not self._parts.path.strip("/") or self._parts.path.endswith("/"):
            raise UserError(
                found=f"{self.shown}, a directory of which a web server gives no list",
                expected="the address of a file",
                hint="name an archive of the raw files, or a place that lists them, such as s3://bucket/name",
            )
        return {"": self.info("")}

    def info(self, name: str) -> Listed:
        # Not HEAD, which some servers refuse; the content is not read.
        with self._answer(name) as response:
            length = _length(response)
            if length is None:
                raise Refused(self.show(name), "the server does not tell the size of the file")
            return Listed(length, response.headers.get("ETag") or response.headers.get("Last-Modified") or "")

    def put(self, path: Path, name: str) -> None:
        self._read_only()

    def remove(self, name: str) -> None:
        self._read_only()

    def _read_only(self) -> NoReturn:
        raise UserError(
            found=f"{self.shown} as a place to write to",
            expected="a place that takes files",
            hint="write to a directory or to s3://bucket/name, and serve that",
        )

    @contextlib.contextmanager
    def _answer(self, name: str, start: int = 0) -> Iterator[http.client.HTTPResponse]:
        """Ask for a file from byte `start` on, and translate what goes wrong until its content is read."""
        path = f"{self._parts.path.rstrip('/')}/{urllib.parse.quote(name)}" if name else self._parts.path
        request = urllib.request.Request(self._parts._replace(path=path).geturl(), headers={"User-Agent": "inkstream"})
        if start:
            request.add_header("Range", f"bytes={start}-")
        if self._authorization:
            request.add_unredirected_header("Authorization", self._authorization)
        try:
            with urllib.request.urlopen(request, timeout=remote.STALL_SECONDS) as response:
                yield response
        except urllib.error.HTTPError as error:
            if error.code in (404, 410):
                raise Missing(self.show(name), self.reason(error)) from None
            if 400 <= error.code < 500 and error.code not in remote.PASSING_STATUS:
                raise Refused(self.show(name), self.reason(error)) from None
            raise Unreachable(self.show(name), self.reason(error)) from None
        except TimeoutError:
            raise Unreachable(self.show(name), f"not a byte for {remote.STALL_SECONDS:g} seconds") from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            cause = getattr(error, "reason", None)  # urllib wraps what the socket says
            cause = cause if isinstance(cause, OSError) else error
            kind = Refused if isinstance(cause, ssl.SSLCertVerificationError) else Unreachable
            raise kind(self.show(name), self.reason(cause)) from None

    def _chunks(self, name: str, response: http.client.HTTPResponse, at: int, size: int | None) -> Iterator[bytes]:
        """What comes from byte `at` of the file on, up to byte `size`; raises if it ends before that."""
        while size is None or at < size:
            chunk = response.read1(_CHUNK if size is None else min(_CHUNK, size - at))
            if not chunk:
                if size is None:
                    return
                raise Unreachable(self.show(name), f"the connection ended after {at:,} of {size:,} bytes")
            at += len(chunk)
            yield chunk


def _length(response: http.client.HTTPResponse) -> int | None:
    length = response.headers.get("Content-Length")
    return int(length) if length else None
