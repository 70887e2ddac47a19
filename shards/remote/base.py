"""Places on the network: what one can do there, what goes wrong there, and how often to try again."""

from __future__ import annotations

import contextlib
import re
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Protocol, TypeVar

from shards.errors import UserError, first_line

T = TypeVar("T")

STALL_SECONDS = 30.0  # without an answer (HTTP: without a byte) before a request is given up
ATTEMPTS = 5  # in a row that bring nothing new
FIRST_PAUSE = 1.0  # seconds, doubled after every failed attempt

# Answers of the 400s that another attempt may well change: too slow, too many, at the same time as another.
PASSING_STATUS = {408, 409, 412, 425, 429}

_FAMILY = {"s3a": "s3", "gcs": "gs", "http": "https"}
_CREDENTIALS = {
    "s3": "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (FSSPEC_S3_ANON=true for a public bucket), "
    "and AWS_ENDPOINT_URL=https://HOST if it is not at AWS",
    "gs": "gcloud auth application-default login, or set GOOGLE_APPLICATION_CREDENTIALS",
    "hf": "hf auth login, or set HF_TOKEN",
    "https": "name the user in the address, https://USER:PASSWORD@HOST/..., if the server asks for one",
}
_NETWORK = {
    "s3": "check the network, AWS_DEFAULT_REGION, and AWS_ENDPOINT_URL=https://HOST if it is not at AWS",
}


class RemoteError(Exception):
    """place: what was asked for, without secrets; reason: why it did not come, in one line."""

    def __init__(self, place: str, reason: str) -> None:
        super().__init__(place, reason)
        self.place = place
        self.reason = reason

    @property
    def family(self) -> str:
        """The protocol that stands for its relatives."""
        scheme = self.place.partition("://")[0]
        return _FAMILY.get(scheme, scheme)

    def explained(self) -> UserError:
        """The message for the user."""
        raise NotImplementedError


class Missing(RemoteError):
    """There is no such file, or no such bucket."""

    @property
    def no_bucket(self) -> bool:
        """Whether the bucket or repository itself is missing, into which nothing can be written then."""
        return re.search(r"\b(bucket|repository)\b[^/]* (does not exist|not found)", self.reason, re.I) is not None

    def explained(self) -> UserError:
        return UserError(
            found=f"nothing at {self.place}: {self.reason}",
            expected="the address of something that is there",
            hint=f"check its spelling; {_CREDENTIALS.get(self.family, 'check the credentials')}",
        )


class Refused(RemoteError):
    """The other side will not, however often it is asked: no credentials, no permission, a request it does not know."""

    def explained(self) -> UserError:
        return UserError(
            found=f"no permission for {self.place}: {self.reason}",
            expected="an address that this user may use",
            hint=_CREDENTIALS.get(self.family, "check the address and the credentials"),
        )


class Unreachable(RemoteError):
    """No answer, or not a whole one: another attempt may bring it."""

    def explained(self) -> UserError:
        return UserError(
            found=f"no way to reach {self.place}: {self.reason}",
            expected="a server that answers",
            hint=f"{_NETWORK.get(self.family, 'check the network and the address')}; then run again, what came is kept",
        )


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Turn a `RemoteError` into the message for the user."""
    try:
        yield
    except RemoteError as error:
        raise error.explained() from None


class Patience:
    """Pauses between attempts, until there have been too many in a row that brought nothing.

    attempts: None for `ATTEMPTS`. stop: ends a pause.
    """

    def __init__(self, attempts: int | None = None, stop: Event | None = None) -> None:
        self._attempts = attempts or ATTEMPTS
        self._stop = stop or Event()
        self._failures = 0

    def wait(self, error: Unreachable, progress: bool = False) -> None:
        """Wait before the next attempt, or raise the error again."""
        self._failures = 0 if progress else self._failures + 1
        if self._failures >= self._attempts:
            raise error
        self._stop.wait(FIRST_PAUSE * 2 ** max(0, self._failures - 1))


def patiently(work: Callable[[], T], attempts: int | None = None, stop: Event | None = None) -> T:
    """Do something that either succeeds or is done again from the start."""
    patience = Patience(attempts, stop)
    while True:
        try:
            return work()
        except Unreachable as error:
            patience.wait(error)


@dataclass(frozen=True)
class Listed:
    """A remote file: its size in bytes, what changes when its content does (an ETag, a time), its MD5 if known."""

    bytes: int
    version: str
    md5: str | None = None


class Place(Protocol):
    """A remote directory or file. Names are relative to it; "" is the address itself.

    Every method raises `RemoteError`, and tries once: being patient is the caller's part.
    """

    shown: str
    """The address without secrets."""

    def show(self, name: str) -> str:
        """The address of one of its files, without secrets."""
        ...

    def read(self, name: str) -> bytes:
        """All of a small file."""
        ...

    def stream(self, name: str, start: int, size: int) -> Iterator[bytes]:
        """Bytes start .. size - 1 of a file; what comes is passed on at once. Raises if they do not all come."""
        ...

    def find(self) -> dict[str, Listed]:
        """All files below the address, by name; one called "" if the address is a file."""
        ...

    def info(self, name: str) -> Listed: ...

    def put(self, path: Path, name: str) -> None: ...

    def remove(self, name: str) -> None: ...


def open_place(address: str) -> Place:
    """The place of an address. Raises `UserError` for a protocol that is unknown or needs a package."""
    if address.partition("://")[0].lower() in ("http", "https"):
        from shards.remote.http_backend import WebPlace

        return WebPlace(address)
    from shards.remote.fsspec_backend import FsspecPlace

    return FsspecPlace(address)


class Named:
    """An address, and what may be said of it in messages and records."""

    def __init__(self, address: str) -> None:
        self.shown, self._secrets = without_secrets(address)

    def show(self, name: str) -> str:
        path, mark, query = self.shown.partition("?")
        return f"{path.rstrip('/')}/{name}{mark}{query}" if name else self.shown

    def reason(self, error: BaseException) -> str:
        """What an error says, in one line and without secrets."""
        text = first_line(error)
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text


def without_secrets(address: str) -> tuple[str, list[str]]:
    """An address as it may be shown and stored, and what was taken out: user and password, and the query."""
    scheme, separator, rest = address.partition("://")
    host, slash, path = rest.partition("/")
    user, at, host = host.rpartition("@")
    # Elsewhere a question mark is a letter like any other.
    path, mark, query = path.partition("?") if scheme.lower() in ("http", "https") else (path, "", "")
    shown = f"{scheme}{separator}{'***@' if at else ''}{host}{slash}{path}{'?***' if mark else ''}"
    password = user.partition(":")[2]
    secrets = [user and f"{user}@", password, urllib.parse.unquote(password), query, urllib.parse.unquote(query)]
    return shown, [secret for secret in secrets if secret]
