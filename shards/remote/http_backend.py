"""HTTP(S) by the standard library: read-only, without listings, with range requests if the server supports them."""

from __future__ import annotations

import base64
import contextlib
import errno
import functools
import http.client
import logging
import netrc
import re
import socket
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import Any

from shards.credentials import hide, parse_address
from shards.errors import UserError, printable, quote
from shards.remote import base

log = logging.getLogger(__name__)

_CHUNK = 256 << 10
# Servers that prepare a file or ask for a browser answer 202, others 204.
_WITH_FILE = {http.HTTPStatus.OK, http.HTTPStatus.NON_AUTHORITATIVE_INFORMATION, http.HTTPStatus.PARTIAL_CONTENT}
# Servers name the compression of such files as if it were their own.
_COMPRESSED = (".gz", ".tgz", ".z", ".bz2", ".tbz2", ".xz", ".txz", ".zst", ".br")
_NO_CONNECTION = {errno.ECONNREFUSED, errno.ENETUNREACH, errno.EHOSTUNREACH}


class HttpStorage(base.RemoteStorage):
    """An http:// or https:// address.

    fsspec's own HTTP file system holds a complete file in memory if a server ignores ranges, and has no timeout
    between bytes. obstore 0.12 refuses such servers, ignores a user in the address, and limits the seconds
    of a whole request only.
    """

    def __init__(self, address: str) -> None:
        super().__init__(address)
        scheme, user, path, query = parse_address(address)
        parts = urllib.parse.urlsplit(f"{scheme}{path}{query}")
        self._parts = parts._replace(path=_quote(parts.path), query=_quote(parts.query), fragment="")
        login = urllib.parse.unquote(user[:-1]) if user else _login_from_netrc(self._parts.hostname or "")
        self._authorization = f"Basic {base64.b64encode(login.encode()).decode()}" if login else None
        self._versions: dict[str, str] = {}
        self._opener = urllib.request.build_opener(_Redirects)

    def stream(
        self, name: str, start: int, size: int | None, version: str = "", max_bytes: int | None = None
    ) -> Iterator[bytes]:
        return base.enforce_min_rate(lambda: self._stream(name, start, size, version), self.show(name))

    def _stream(self, name: str, start: int, size: int | None, version: str) -> Iterator[bytes]:
        begun = version or (self._versions.get(name, "") if start else "")
        with self._request(name, start, begun, size) as response:
            sent = self._versions[name] = _version(response)
            if version and sent != version:
                raise self._changed(name)
            if begun and sent != begun:
                raise base.ChangedError(self.show(name), "the file has changed")
            length = _content_length(response)
            # A server without ranges sends the whole file: the bytes before `start` are skipped.
            at = 0
            if response.status == http.HTTPStatus.PARTIAL_CONTENT:
                at = start
                self._check_range(response, name, start, length, size)
            end = at + length if size is None and length is not None else size
            is_whole = response.status != http.HTTPStatus.PARTIAL_CONTENT
            if length is not None and end is not None and (at + length > end or (is_whole and length < end)):
                raise self._wrong_size(name, f"{at + length:,}", end)
            while end is None or at < end:
                chunk = response.read1(_CHUNK if end is None else min(_CHUNK, end - at))
                if not chunk:
                    if end is None:
                        return
                    if is_whole and response.chunked:  # the last chunk marks the end: the connection is intact
                        raise self._wrong_size(name, f"{at:,}", end)
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
        try:
            return base.call_with_timeout(base.STALL_SECONDS, lambda: self._info(name))
        except TimeoutError as error:
            raise self._translate(error, self.show(name)) from None

    def _info(self, name: str) -> base.FileInfo:
        # Not HEAD, which some servers refuse; the content is not read.
        with self._request(name) as response:
            if response.status == http.HTTPStatus.PARTIAL_CONTENT:
                raise base.TransientError(self.show(name), "a part of the file in answer to a request for all of it")
            encoding = (response.headers.get("Content-Encoding") or "identity").strip().lower()
            if encoding != "identity" and not (name or self._parts.path).lower().endswith(_COMPRESSED):
                raise UserError(
                    found=f"{self.show(name)}, which the server compresses (Content-Encoding: {printable(encoding)})",
                    expected="a server that sends the bytes of the file",
                    hint=f"curl {quote(self.show(name))} | gunzip > FILE (if it is gzip), and name the local file",
                )
            length = _content_length(response)
            if length is None:
                raise base.AccessDeniedError(self.show(name), "the server does not tell the size of the file")
            return base.FileInfo(length, _version(response))

    def _check_range(
        self, response: http.client.HTTPResponse, name: str, start: int, length: int | None, size: int | None
    ) -> None:
        """Raise `ChangedError` if a partial answer is not the rest of a file from `start` on.

        Raise `MismatchError` if it is the rest of a file of another size.
        """
        text = response.headers.get("Content-Range") or "no Content-Range"
        match = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)", text.strip())
        if (
            match is None
            or int(match[1]) != start
            or (length is not None and int(match[2]) - start + 1 != length)
            or (match[3] != "*" and int(match[3]) <= int(match[2]))
        ):
            raise base.ChangedError(self.show(name), f"{text} in answer to bytes={start}-")
        if size is not None and match[3] != "*" and int(match[3]) != size:
            raise self._wrong_size(name, f"{int(match[3]):,}", size)

    @contextlib.contextmanager
    def _request(
        self, name: str, start: int = 0, version: str = "", size: int | None = None
    ) -> Iterator[http.client.HTTPResponse]:
        """Request a file from byte `start` on, and translate errors until its content is read."""
        path = f"{self._parts.path.rstrip('/')}/{urllib.parse.quote(name)}" if name else self._parts.path
        request = urllib.request.Request(self._parts._replace(path=path).geturl(), headers={"User-Agent": "inkstream"})
        if start:
            request.add_header("Range", f"bytes={start}-")
            if version and not version.startswith("W/"):  # a weak ETag is not allowed there
                request.add_header("If-Range", version)
        if self._authorization:
            request.add_unredirected_header("Authorization", self._authorization)
        try:
            with self._opener.open(request, timeout=base.STALL_SECONDS) as response:
                if response.status not in _WITH_FILE:
                    raise base.TransientError(self.show(name), f"HTTP status {response.status}, without the file")
                yield response
        except (OSError, http.client.HTTPException, ValueError) as error:
            failure, total = self._translate(error, self.show(name)), _unsatisfied_total(error)
            if size is not None and total not in (None, size):
                raise self._wrong_size(name, f"{total:,}", size) from None
            raise failure from None

    def _translate(self, error: Exception, address: str) -> base.RemoteError:
        if isinstance(error, urllib.error.HTTPError):
            error.close()
            if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                return base.ChangedError(address, self.reason(error))
            return base.error_of_status(error.code)(address, self.reason(error))
        if (refused := base.certificate_failure(error)) is not None:
            return base.CertificateError(address, self.reason(refused))
        wrapped = getattr(error, "reason", None)  # urllib wraps the error of the socket
        cause = wrapped if isinstance(wrapped, OSError) else error
        if isinstance(cause, TimeoutError):
            return base.TransientError(address, f"not a byte for {base.STALL_SECONDS:g} seconds")
        kind: type[base.RemoteError] = base.TransientError
        if isinstance(cause, http.client.InvalidURL | UnicodeError):
            kind = base.AccessDeniedError
        elif isinstance(cause, socket.gaierror) or getattr(cause, "errno", None) in _NO_CONNECTION:
            kind = base.NoConnectionError
        return kind(address, self.reason(cause))


def _login_from_netrc(host: str) -> str:
    """Return the user and password of a host in ~/.netrc, or an empty text."""
    try:
        entries = netrc.netrc().hosts
    except FileNotFoundError:
        return ""
    except netrc.NetrcParseError as error:  # its message may quote a password, if it names a line
        _warn_of_netrc(f"near line {error.lineno} it cannot be read" if error.lineno else error.msg)
        return ""
    except (OSError, UnicodeDecodeError) as error:
        _warn_of_netrc(getattr(error, "strerror", None) or "it is not UTF-8")
        return ""
    entries.pop("default", None)  # it would tell a password to every server
    if host not in entries:
        return ""
    user, _, password = entries[host]
    login = ":".join(urllib.parse.quote(word, "") for word in (user, password))
    hide(f"https://{login}@{host}")  # a server may repeat them
    return f"{user}:{password}"


@functools.cache
def _warn_of_netrc(reason: str) -> None:
    log.warning("~/.netrc is ignored: %s", reason)


def _quote(text: str) -> str:
    """Percent-encode what no request may have: spaces, control characters and letters other than those of ASCII."""
    return re.sub("[^!-~]", lambda match: urllib.parse.quote(match[0], errors="surrogateescape"), text)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirections to http and https; the user is named to the same server only."""

    def redirect_request(self, request: urllib.request.Request, *arguments: Any) -> urllib.request.Request | None:
        *_, address = arguments
        before, after = urllib.parse.urlsplit(request.full_url), urllib.parse.urlsplit(address)
        if after.scheme not in ("http", "https"):
            raise urllib.error.URLError(f"a redirection to {after.scheme}://")
        new = super().redirect_request(request, *arguments)
        user = request.unredirected_hdrs.get("Authorization")
        if new is not None and user and before[:2] == after[:2]:
            new.add_unredirected_header("Authorization", user)
        return new


def _content_length(response: http.client.HTTPResponse) -> int | None:
    length = response.headers.get("Content-Length")
    if length and not re.fullmatch(r"\d{1,18}", length.strip()):
        raise ValueError(f"Content-Length: {length}")
    return int(length) if length else None


def _unsatisfied_total(error: Exception) -> int | None:
    """Return the size of a file that ends before the requested range, if the server tells it."""
    if getattr(error, "code", None) != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
        return None
    match = re.fullmatch(r"bytes \*/(\d{1,18})", getattr(error, "headers", {}).get("Content-Range", "").strip())
    return int(match[1]) if match else None


def _version(response: http.client.HTTPResponse) -> str:
    return response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
