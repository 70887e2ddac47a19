"""Storages that fsspec has a file system for: s3://, gs://, hf:// (huggingface_hub), memory:// and more."""

from __future__ import annotations

import base64
import datetime
import functools
import logging
import os
import re
import urllib.parse
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

from shards.credentials import parse_address
from shards.errors import UserError
from shards.remote import base
from shards.remote.base import FileInfo, NotFoundError, RemoteError, RemoteStorage, error_of_status

PIECE = 4 << 20  # bytes of one range request
SMALLEST_PIECE = 64 << 10  # bytes that even a slow connection transfers within STALL_SECONDS
_SLOWEST_UPLOAD = 100e3  # bytes/s; slower uploads time out
_LONGEST_LISTING = 3600.0  # seconds; each response lists a thousand files

_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}
# Errors that no retry resolves. By name, because the libraries that raise them may not be installed: botocore's and
# google-auth's for absent or useless credentials. gcsfs raises one without a status, whose text begins with Forbidden.
_DENIED = (PermissionError, ValueError, NotImplementedError)
_DENIED_WORDS = re.compile(
    r"\w*(Credential|SSOToken|TokenRetrieval|ProfileNotFound|RefreshError|ParamValidation)\w*:|\w+: Forbidden"
)
# S3's codes for requests damaged in transfer. Their HTTP status is that of an invalid request.
_TRANSIENT_CODES = {"BadDigest", "IncompleteBody", "RequestTimeout", "XAmzContentSHA256Mismatch"}
_CLOCK_CODE = "RequestTimeTooSkewed"
# Names of the field that changes with the content of a file, the most reliable first.
_VERSIONS = ("ETag", "etag", "md5Hash", "xet_hash", "blob_id", "LastModified", "last_modified", "updated", "mtime")


class FsspecStorage(RemoteStorage):
    """Any address that fsspec has a file system for."""

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self._address = address
        self._fs, root = self._connect(address)
        self._process = os.getpid()
        self._root = root.rstrip("/")
        self._piece = PIECE
        # The default cache of a file reads ahead; it is discarded with the file, after each piece.
        self._options: dict[str, Any] = {"cache_type": "none"} if address.startswith("hf://") else {}

    def _connect(self, address: str) -> tuple[Any, str]:
        import fsspec

        protocol = address.partition("://")[0]
        options: dict[str, Any] = {}
        scheme, user, path, query = parse_address(address)
        if user and _EXTRAS.get(protocol) == "s3":
            key, _, secret = map(urllib.parse.unquote, user[:-1].partition(":"))
            address, options = f"{scheme}{path}{query}", {"key": key, "secret": secret}
        try:
            # Not url_to_fs, which takes :: in a key for a chain of file systems.
            kind = fsspec.get_filesystem_class(protocol)
            options = {**kind._get_kwargs_from_urls(address), **options}
            file_system, root = kind(skip_instance_cache=True, **options), kind._strip_protocol(address)
        except (ImportError, ValueError) as error:
            extra = _EXTRAS.get(protocol) if isinstance(error, ImportError) else None
            raise UserError(
                found=f"{self.shown}: {self.reason(error)}",
                expected="an address such as s3://bucket/name, gs://..., hf://datasets/user/name or https://..., and "
                "its package",
                hint=f'pip install -e ".[{extra}]"' if extra else "check its spelling; a path needs no protocol",
            ) from None
        except Exception as error:
            raise self._translate(error, "") from None
        # The caller counts attempts; s3fs and botocore would each multiply them.
        if _EXTRAS.get(protocol) == "s3":
            file_system.retries = 1
            file_system.config_kwargs = {"retries": {"max_attempts": 0}, **file_system.config_kwargs}
        if _EXTRAS.get(protocol) == "gs":
            # It logs a traceback for every failed attempt, besides raising the error.
            logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
        return file_system, root

    def stream(
        self, name: str, start: int, size: int | None, version: str = "", max_bytes: int | None = None
    ) -> Iterator[bytes]:
        if size is None:
            # With a start, even 0: s3fs would request the size first without it.
            limit = max_bytes + 1 if max_bytes else None
            yield self._call(name, "cat_file", self._path(name), start=start, end=limit, **self._options)
            return
        while start < size:
            end = min(start + self._piece, size)
            try:
                data = self._call(name, "cat_file", self._path(name), start=start, end=end, **self._options)
            except RemoteError as error:
                if isinstance(error.__cause__, TimeoutError):
                    # The connection is too slow for a piece of this size.
                    self._piece = max(self._piece // 2, SMALLEST_PIECE)
                if _status_and_code(error.__cause__)[0] != HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                    raise
                data = b""
            if not data:
                raise self._wrong_size(name, f"at most {start:,}", size)
            if len(data) > end - start:
                if len(data) != size:
                    raise self._wrong_size(name, f"{len(data):,}", size)
                data = data[start:]  # a server or proxy without ranges has sent the whole file
            yield data
            start += len(data)

    def find(self) -> dict[str, FileInfo]:
        files = self._call("", "find", self._root, detail=True, more_seconds=_LONGEST_LISTING)
        listed = {
            path[len(self._root) :].strip("/"): _file_info(info)
            for path, info in files.items()
            if info["type"] == "file" and not path.endswith("/")  # S3's consoles create such files for directories
        }
        if not listed:
            raise NotFoundError(self.shown, "no such file or directory, or an empty one")
        return listed

    def info(self, name: str) -> FileInfo:
        self._fs.invalidate_cache()
        return _file_info(self._call(name, "info", self._path(name)))

    def put(self, path: Path, name: str) -> None:
        seconds = path.stat().st_size / _SLOWEST_UPLOAD
        self._call(name, "put_file", str(path), self._path(name), more_seconds=seconds)

    def remove(self, name: str) -> None:
        self._call(name, "rm_file", self._path(name))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _call(self, name: str, method: str, *arguments: Any, more_seconds: float = 0, **named: Any) -> Any:
        from fsspec.asyn import sync

        if self._process != os.getpid():  # its thread does not exist in a forked process
            self._fs, self._process = self._connect(self._address)[0], os.getpid()
        try:
            if self._fs.async_impl:
                function, seconds = getattr(self._fs, f"_{method}"), base.STALL_SECONDS + more_seconds
                return sync(self._fs.loop, function, *arguments, timeout=seconds, **named)
            work = functools.partial(getattr(self._fs, method), *arguments, **named)
            return base.call_with_timeout(base.STALL_SECONDS + more_seconds, work)
        except Exception as error:
            raise self._translate(error, name) from error

    def _translate(self, error: Exception, name: str) -> RemoteError:
        """Return the `RemoteError` of an exception that a library raised."""
        if (refused := base.certificate_failure(error)) is not None:
            return base.CertificateError(self.show(name), self.reason(refused))
        status, code = _status_and_code(error)
        reason = self.reason(error)
        words = f"{type(error).__name__}: {reason}"
        if isinstance(error, TimeoutError):
            status, reason = None, f"no answer within {base.STALL_SECONDS:g} seconds"
        elif isinstance(error, FileNotFoundError):
            status = 404
        elif code in _TRANSIENT_CODES:
            status = None
        elif status != 404 and (isinstance(error, _DENIED) or _DENIED_WORDS.match(words)):
            status = 403
        kind = base.ClockError if code == _CLOCK_CODE else error_of_status(status)
        return kind(self.show(name), reason)


def _status_and_code(error: BaseException | None) -> tuple[int | None, str]:
    """Return the HTTP status and S3's code of an error of botocore, gcsfs or huggingface_hub."""
    for carrier in (error, getattr(error, "__cause__", None)):
        response = getattr(carrier, "response", None)
        if isinstance(response, dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            return status, response.get("Error", {}).get("Code", "")
        if isinstance(status := getattr(response, "status_code", None), int):
            return status, ""
    # Not that of the cause: aiohttp uses the code 400 for a broken connection.
    code = getattr(error, "code", None)
    return (code if isinstance(code, int) else None), ""


def _file_info(info: dict[str, Any]) -> FileInfo:
    version = next((info[key] for key in (*_VERSIONS, "created") if info.get(key) is not None), "")
    if isinstance(version, datetime.datetime):  # lists of memory:// have the seconds in its place
        version = version.timestamp()
    return FileInfo(bytes=int(info["size"] or 0), version=str(version), md5=_md5(info))


def _md5(info: dict[str, Any]) -> str | None:
    """Return the MD5 (hex) where it is reported: by Google, and by S3 as the ETag of an upload in one piece."""
    if info.get("md5Hash"):
        return base64.b64decode(info["md5Hash"]).hex()
    tag = str(info.get("ETag", "")).strip('"')
    return tag if len(tag) == 32 else None
