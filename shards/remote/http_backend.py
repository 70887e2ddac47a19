"""HTTP(S) by the standard library: read-only, without listings, with range requests if the server supports them."""

from __future__ import annotations

import base64
import contextlib
import errno
import http.client
import socket
import ssl
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator

from shards.credentials import split_address
from shards.errors import MismatchError, UserError
from shards.remote import base

_CHUNK = 256 << 10
_NO_CONNECTION = {errno.ECONNREFUSED, errno.ENETUNREACH, errno.EHOSTUNREACH}


class HttpStorage(base.RemoteStorage):
    """An http:// or https:// address.

    fsspec's own HTTP file system holds a complete file in memory if a server ignores ranges, and has no timeout
    between bytes. obstore 0.12 refuses such servers, ignores a user in the address, and limits the seconds
    of a whole request only.
    """

    def __init__(self, address: str) -> None:
        super().__init__(address)
        scheme, user, path, query = split_address(address)
        self._parts = urllib.parse.urlsplit(f"{scheme}{path}{query}")._replace(fragment="")
        token = base64.b64encode(urllib.parse.unquote(user[:-1]).encode()).decode()
        self._authorization = f"Basic {token}" if user else None

    def stream(self, name: str, start: int, size: int | None) -> Iterator[bytes]:
        with self._request(name, start) as response:
            # A server without ranges sends the whole file: the bytes before `start` are skipped.
            at = start if response.status == http.HTTPStatus.PARTIAL_CONTENT else 0
            length = _content_length(response)
            end = at + length if size is None and length is not None else size
            if length is not None and end is not None and at + length > end:
                raise MismatchError(
                    found=f"{self.show(name)}, which is longer than {end:,} bytes",
                    expected=f"exactly {end:,} bytes",
                    hint="the published file has changed, or a proxy answers in its place",
                )
            while end is None or at < end:
                chunk = response.read1(_CHUNK if end is None else min(_CHUNK, end - at))
                if not chunk:
                    if end is None:
                        return
                    raise base.TransientError(self.show(name), f"the connection ended after {at:,} of {end:,} bytes")
                new = chunk[max(0, start - at) :]
                at += len(chunk)
                if new:
                    yield new

    def find(self) -> dict[str, base.FileInfo]:
        if not self._parts.path.strip("/") or self._parts.path.endswith("/"):
            raise UserError(
                found=f"{self.shown}, a directory of which a web server gives no list",
                expected="the address of a file",
                hint="name an archive of the raw files, or a storage with listings, such as s3://bucket/name",
            )
        return {"": self.info("")}

    def info(self, name: str) -> base.FileInfo:
        # Not HEAD, which some servers refuse; the content is not read.
        with self._request(name) as response:
            length = _content_length(response)
            if length is None:
                raise base.AccessDeniedError(self.show(name), "the server does not tell the size of the file")
            return base.FileInfo(length, response.headers.get("ETag") or response.headers.get("Last-Modified") or "")

    @contextlib.contextmanager
    def _request(self, name: str, start: int = 0) -> Iterator[http.client.HTTPResponse]:
        """Request a file from byte `start` on, and translate errors until its content is read."""
        path = f"{self._parts.path.rstrip('/')}/{urllib.parse.quote(name)}" if name else self._parts.path
        request = urllib.request.Request(self._parts._replace(path=path).geturl(), headers={"User-Agent": "inkstream"})
        if start:
            request.add_header("Range", f"bytes={start}-")
        if self._authorization:
            request.add_unredirected_header("Authorization", self._authorization)
        try:
            with urllib.request.urlopen(request, timeout=base.STALL_SECONDS) as response:
                yield response
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise self._translate(error, self.show(name)) from None

    def _translate(self, error: Exception, address: str) -> base.RemoteError:
        if isinstance(error, urllib.error.HTTPError):
            return base.error_of_status(error.code)(address, self.reason(error))
        wrapped = getattr(error, "reason", None)  # urllib wraps the error of the socket
        cause = wrapped if isinstance(wrapped, OSError) else error
        if isinstance(cause, TimeoutError):
            return base.TransientError(address, f"not a byte for {base.STALL_SECONDS:g} seconds")
        kind: type[base.RemoteError] = base.TransientError
        if isinstance(cause, ssl.SSLCertVerificationError):
            kind = base.AccessDeniedError
        elif isinstance(cause, socket.gaierror) or getattr(cause, "errno", None) in _NO_CONNECTION:
            kind = base.NoConnectionError
        return kind(address, self.reason(cause))


def _content_length(response: http.client.HTTPResponse) -> int | None:
    length = response.headers.get("Content-Length")
    return int(length) if length else None
