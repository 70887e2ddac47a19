"""Download a published file once: resumable, hash-checked, with a progress bar."""

from __future__ import annotations

import errno
import hashlib
import http.client
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from shards.atomic import locked, made_directory, sync_directory
from shards.errors import UserError, no_permission

_CHUNK = 1 << 20
_TIMEOUT = 30  # seconds without a byte
_ATTEMPTS = 5  # in a row that bring nothing new
_FIRST_PAUSE = 1.0  # seconds, doubled after every failed attempt
_DISK_REFUSALS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}  # not the network's fault: no use to try again


@dataclass(frozen=True)
class Download:
    """A file on the network: where it is, what to call it, its size in bytes and SHA-256 (hex)."""

    url: str
    name: str
    bytes: int
    sha256: str

    def path(self, directory: Path) -> Path:
        return directory / self.name


class _Unfinished(Exception):
    """The connection ended before the file did; what came so far is kept."""


def fetch(download: Download, directory: Path, or_else: str) -> Path:
    """Download a file into a directory, or continue where an earlier call was cut off.

    or_else: what else the user could put into the directory, for the message when there is no network.
    What has come so far lies in `NAME.part`; the file takes its name when size and hash are right. Raises
    `UserError` when the server cannot be reached, when it sends another file, or when the disk is full.
    """
    target = download.path(directory)
    partial = target.with_name(f"{download.name}.part")
    # One at a time: processes that want the same file would write the same part of it.
    with made_directory(directory), locked(target.with_name(f".{target.name}.lock")):
        if target.exists():
            return target  # another process was here first
        try:
            _receive_all(download, partial, or_else)
            digest = _hash(partial)
            if digest != download.sha256:
                partial.unlink()
                raise UserError(
                    found=f"{download.url}, whose content has SHA-256 {digest}",
                    expected=f"SHA-256 {download.sha256}",
                    hint="run again; if it stays so, the published file has changed or something alters it on the way",
                )
            partial.replace(target)
            sync_directory(directory)
        except OSError as error:
            raise no_permission(error, partial) from None
        finally:
            if partial.exists() and partial.stat().st_size == 0:
                partial.unlink()
    return target


def _receive_all(download: Download, partial: Path, or_else: str) -> None:
    failures = 0
    pause = _FIRST_PAUSE
    with open(partial, "ab") as file:
        bar = tqdm(
            total=download.bytes,
            initial=file.tell(),
            desc=download.name,
            unit="B",
            unit_scale=True,
            # The bar appears with the first bytes, so that a missing network shows one message and nothing else.
            delay=1e-3,
        )
        with bar:
            while file.tell() < download.bytes:
                before = file.tell()
                try:
                    _receive(download, file, bar)
                except (_Unfinished, OSError, http.client.HTTPException) as error:
                    if isinstance(error, OSError) and error.errno in _DISK_REFUSALS:
                        raise
                    failures = 0 if file.tell() > before else failures + 1
                    hopeless = isinstance(error, urllib.error.HTTPError) and error.code < 500
                    offline = file.tell() == 0 and isinstance(getattr(error, "reason", None), OSError)
                    if hopeless or offline or failures == _ATTEMPTS:
                        raise _unreachable(download, partial, or_else, error) from None
                    time.sleep(pause)
                    pause = _FIRST_PAUSE if failures == 0 else 2 * pause
                file.flush()


def _receive(download: Download, file: BinaryIO, bar: tqdm) -> None:
    """One request for what is still missing; appends to the file what comes."""
    start = file.tell()
    request = urllib.request.Request(download.url, headers={"User-Agent": "inkstream"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
        if start and response.status != http.HTTPStatus.PARTIAL_CONTENT:
            # The server cannot continue: begin anew.
            file.seek(0)
            file.truncate()
            bar.reset()
        while chunk := response.read(_CHUNK):
            if file.tell() + len(chunk) > download.bytes:
                file.seek(0)
                file.truncate()
                raise UserError(
                    found=f"{download.url}, which is longer than {download.bytes:,} bytes",
                    expected=f"exactly {download.bytes:,} bytes",
                    hint="the published file has changed, or something on the way answers in its place",
                )
            file.write(chunk)
            bar.update(len(chunk))
    if file.tell() < download.bytes:
        raise _Unfinished(f"the connection ended after {file.tell():,} of {download.bytes:,} bytes")


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _unreachable(download: Download, partial: Path, or_else: str, error: Exception) -> UserError:
    host = urllib.parse.urlsplit(download.url).hostname
    reason = getattr(error, "reason", None) or error
    have = partial.stat().st_size
    kept = f" ({have:,} of {download.bytes:,} bytes came and are kept; the next run continues)" if have else ""
    return UserError(
        found=f"no way to download {download.name} from {host}: {reason}{kept}",
        expected=f"{download.path(partial.parent)} ({download.bytes:,} bytes), or a network to fetch it",
        hint=f"download {download.url} on another machine and put it at {download.path(partial.parent)}, or put "
        f"{or_else} into a directory and name it with --raw",
    )
