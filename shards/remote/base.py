"""The interface of a remote storage, the errors it raises, and the retry policy."""

from __future__ import annotations

import contextlib
import queue
import re
import ssl
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import TypeVar

from shards import errors
from shards.credentials import hide, redact
from shards.errors import MismatchError, UserError, first_line, printable

T = TypeVar("T")

STALL_SECONDS = 30.0  # timeout of a request without an answer (HTTP: without a byte)
MIN_RATE = 1000.0  # bytes/s over STALL_SECONDS; a slower transfer is broken off
ATTEMPTS = 5  # in a row without PROGRESS
PROGRESS = 16 << 10  # new bytes of an attempt
_READ_STALLS = 10  # STALL_SECONDS for all of a small file
FIRST_PAUSE = 1.0  # seconds, doubled after every failed attempt

# HTTP status codes of client errors that another attempt may resolve: timeouts, conflicts, rate limits.
_TRANSIENT_STATUS = {408, 409, 412, 425, 429}

_ALIASES = {"s3a": "s3", "gcs": "gs", "http": "https"}
_NETWORK = {
    "s3": "check the network, AWS_DEFAULT_REGION, and AWS_ENDPOINT_URL=https://HOST if it is not at AWS",
}
_CREDENTIALS = {
    "s3": "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (FSSPEC_S3_ANON=true for a public bucket), "
    "and AWS_ENDPOINT_URL=https://HOST if it is not at AWS",
    "gs": "gcloud auth application-default login, or set GOOGLE_APPLICATION_CREDENTIALS",
    "hf": "hf auth login, or set HF_TOKEN",
    "https": "if the server asks for a user, name it in ~/.netrc (machine HOST login USER password PASSWORD), or in "
    "the address: https://USER:PASSWORD@HOST/...",
}

_BUNDLES = {
    "s3": "export AWS_CA_BUNDLE=FILE with the CA bundle of the network",
    # The packages that wandb requires install certifi.
    "https": 'export SSL_CERT_FILE="$(python -m certifi)", or SSL_CERT_FILE=FILE with the CA bundle of the network',
}


class RemoteError(UserError):
    """A request to a remote storage that failed.

    Args:
        address: The address of the request, without secrets.
        reason: Why the request failed, in one line.
    """

    _problem: str
    _expected: str
    _hint: str
    _advice = _CREDENTIALS
    _general_advice = "check the address and the credentials"

    def __init__(self, address: str, reason: str) -> None:
        scheme = address.partition("://")[0]
        advice = self._advice.get(_ALIASES.get(scheme, scheme), self._general_advice)
        super().__init__(f"{self._problem} {address}: {reason}", self._expected, self._hint.format(advice))
        self.args = (address, reason)  # pickle calls the class with these
        self.reason = reason


class NotFoundError(RemoteError, errors.NotFoundError):
    """The file, or its bucket, does not exist."""

    _problem = "nothing at"
    _expected = "an existing address"
    _hint = "check the spelling; {}"
    _general_advice = "check the credentials"

    @property
    def no_bucket(self) -> bool:
        """Whether the bucket or repository itself does not exist, so that nothing can be written to it."""
        return re.search(r"\b(bucket|repository)\b[^/]* (does not exist|not found)", self.reason, re.I) is not None


class AccessDeniedError(RemoteError, errors.AccessDeniedError):
    """The server refuses the request: no credentials, no permission, or an invalid request. A retry does not help."""

    _problem = "no permission for"
    _expected = "an address that this user may use"
    _hint = "{}"


class ClockError(AccessDeniedError):
    """The server refuses the time of a signed request. A retry does not help."""

    _expected = "a clock that agrees with that of the server"
    _hint = (
        "compare the clock of this machine (date -u) with the time of another, and set it (timedatectl set-ntp true)"
    )


class CertificateError(RemoteError):
    """The certificate of the server is refused. A retry does not help."""

    _problem = "no valid certificate from"
    _expected = "a certificate for this host that has not expired, of an authority that this machine trusts"
    _hint = "{}; if it has expired or is that of another host, check the clock (date) and the address"
    _advice = _BUNDLES
    _general_advice = _BUNDLES["https"]


class TransientError(RemoteError):
    """The server sent no answer or an incomplete one. A retry may succeed."""

    _problem = "no way to reach"
    _expected = "a server that answers"
    _hint = "{}; then run again (downloaded bytes are kept)"
    _advice = _NETWORK
    _general_advice = "check the network and the address"


class ChangedError(TransientError):
    """What the server sends does not continue the bytes that have arrived: the download has to start again."""


class NoConnectionError(TransientError):
    """No server answers: the host name does not resolve, or the connection is refused or has no route."""


def error_of_status(status: int | None) -> type[RemoteError]:
    """Return the error class of an HTTP status code; None stands for a request without an answer."""
    if status in (404, 410):
        return NotFoundError
    if status and 300 <= status < 500 and status not in _TRANSIENT_STATUS:
        return AccessDeniedError
    return TransientError


def certificate_failure(error: BaseException | None) -> ssl.SSLCertVerificationError | None:
    """Return the refusal of a certificate that an exception is due to, whatever library has wrapped it."""
    while error is not None and not isinstance(error, ssl.SSLCertVerificationError):
        error = error.__cause__ or error.__context__
    return error


class RetryPolicy:
    """Exponential backoff between attempts, up to a number of attempts in a row without progress.

    Args:
        attempts: The number of attempts; None for `ATTEMPTS`.
        stop: An event that ends a pause.
        fail_fast: Whether a `NoConnectionError` of the first attempt is raised at once.
    """

    def __init__(self, attempts: int | None = None, stop: Event | None = None, fail_fast: bool = False) -> None:
        self._attempts = attempts or ATTEMPTS
        self._fail_fast = fail_fast
        self._stop = stop or Event()
        self._failures = 0

    def wait(self, error: TransientError, progress: bool = False) -> None:
        """Wait before the next attempt.

        Args:
            error: The error of the last attempt.
            progress: Whether the last attempt brought new bytes, which resets the count of failures.

        Raises:
            TransientError: `error`, if no attempt is left.
        """
        self._failures = 0 if progress else self._failures + 1
        if self._failures >= self._attempts or (self._fail_fast and isinstance(error, NoConnectionError)):
            raise error
        self._fail_fast = False
        self._stop.wait(FIRST_PAUSE * 2 ** max(0, self._failures - 1))


def retry(work: Callable[[], T], attempts: int | None = None, stop: Event | None = None, fail_fast: bool = False) -> T:
    """Call a function again after each `TransientError`, as `RetryPolicy` allows; returns its result."""
    policy = RetryPolicy(attempts, stop, fail_fast)
    while True:
        try:
            return work()
        except TransientError as error:
            policy.wait(error)


@dataclass(frozen=True)
class FileInfo:
    """Metadata of a remote file.

    Attributes:
        bytes: Its size.
        version: A string that changes with the content (an ETag or a time).
        md5: MD5 of the content (hex), None if the storage does not report it.
    """

    bytes: int
    version: str
    md5: str | None = None


class RemoteStorage(ABC):
    """A remote directory or file. Names are relative to its address; "" is the address itself.

    Every method makes a single attempt and raises `RemoteError`; the caller retries.

    Attributes:
        shown: The address without secrets.
    """

    def __init__(self, address: str) -> None:
        self.shown = hide(address)

    def show(self, name: str) -> str:
        """Return the address of a file, without secrets."""
        path, mark, query = self.shown.partition("?")
        return f"{path.rstrip('/')}/{name}{mark}{query}" if name else self.shown

    def reason(self, error: BaseException) -> str:
        """Return the message of an error, in one line and without secrets."""
        return printable(redact(first_line(error)))

    def read(self, name: str, max_bytes: int) -> bytes:
        """Return the content of a small file; raise `UserError` if it has more than `max_bytes` bytes."""
        content = bytearray()
        deadline = time.monotonic() + _READ_STALLS * STALL_SECONDS
        for chunk in self.stream(name, 0, None, max_bytes=max_bytes):
            content += chunk
            if len(content) > max_bytes:
                raise UserError(
                    found=f"{self.show(name)}, of more than {max_bytes:,} bytes",
                    expected=f"a file of up to {max_bytes:,} bytes",
                    hint="check the address",
                )
            if time.monotonic() > deadline:
                raise TransientError(self.show(name), f"no end after {_READ_STALLS * STALL_SECONDS:g} seconds")
        return bytes(content)

    @abstractmethod
    def stream(
        self, name: str, start: int, size: int | None, version: str = "", max_bytes: int | None = None
    ) -> Iterator[bytes]:
        """Yield the bytes `start` .. `size - 1` of a file as they arrive.

        Args:
            name: The file.
            start: The first byte.
            size: The size of the file; None for the bytes up to its end.
            version: Its version, if it is known.
            max_bytes: The caller needs no more bytes than these and one.

        Raises:
            TransientError: If the connection ends before all bytes have arrived, or is too slow.
            ChangedError: If the server has another version than the one that an earlier call has begun to send.
            MismatchError: If the file is known to differ from `version` or `size`.
        """

    def check_version(self, name: str, version: str) -> None:
        """Raise `MismatchError` if the version of a file is another one now."""
        if self.info(name).version != version:
            raise self._changed(name)

    def _changed(self, name: str) -> MismatchError:
        return MismatchError(
            found=f"{self.show(name)}, which has changed while it was downloaded",
            expected="a file that does not change",
            hint="run again",
        )

    def _wrong_size(self, name: str, found: str, size: int) -> MismatchError:
        return MismatchError(
            found=f"{self.show(name)}, which has {found} bytes",
            expected=f"{size:,} bytes",
            hint="upload the file again if it is yours; if the server holds it intact, a proxy answers in its place",
        )

    @abstractmethod
    def find(self) -> dict[str, FileInfo]:
        """Return all files below the address by name; one named "" if the address is a file."""

    @abstractmethod
    def info(self, name: str) -> FileInfo:
        """Return the metadata of a file."""

    def put(self, path: Path, name: str) -> None:
        """Upload a local file. The default refuses it, as a read-only storage does."""
        raise self._read_only()

    def remove(self, name: str) -> None:
        """Delete a file. The default refuses it, as a read-only storage does."""
        raise self._read_only()

    def _read_only(self) -> UserError:
        return UserError(
            found=f"{self.shown} as a place to write to",
            expected="a writable storage",
            hint="write to a directory or to s3://bucket/name, and serve that",
        )


def call_with_timeout(seconds: float, work: Callable[[], T]) -> T:
    """Return the result of a function; raise TimeoutError if it takes longer. It is not ended then, but left behind."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()  # a thread of an executor would be waited for at exit
    return future.result(timeout=seconds)


def enforce_min_rate(produce: Callable[[], Iterator[bytes]], address: str) -> Iterator[bytes]:
    """Yield what an iterator yields in a thread; raise `TransientError` if it falls behind `MIN_RATE`.

    Name resolution, connection, TLS, headers and the lines between chunks have no timeout as a whole: a server that
    sends a byte from time to time would keep a client for hours.
    """
    chunks: queue.Queue[bytes | BaseException | None] = queue.Queue(maxsize=4)
    over = threading.Event()

    def put(item: bytes | BaseException | None) -> None:
        while not over.is_set():
            with contextlib.suppress(queue.Full):
                return chunks.put(item, timeout=1)

    def run() -> None:
        try:
            for chunk in produce():
                put(chunk)
                if over.is_set():
                    return
            put(None)
        except BaseException as error:
            put(error)

    threading.Thread(target=run, daemon=True).start()
    waited, received = 0.0, 0
    try:
        while True:
            start = time.monotonic()
            item: bytes | BaseException | None = b""
            with contextlib.suppress(queue.Empty):
                item = chunks.get(timeout=max(0.0, STALL_SECONDS - waited))
            waited += time.monotonic() - start
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            received += len(item)
            if waited >= STALL_SECONDS:
                if received < MIN_RATE * waited:
                    what = f"only {received:,} bytes in" if received else "not a byte for"
                    raise TransientError(address, f"{what} {STALL_SECONDS:g} seconds")
                waited, received = 0.0, 0
            if item:
                yield item
    finally:
        over.set()
