"""Download a published raw file once."""

from __future__ import annotations

import urllib.parse
from dataclasses import dataclass
from pathlib import Path

from shards.atomic import created_directory, file_lock, sync_directory
from shards.errors import MismatchError, UserError, quote
from shards.remote.backends import open_storage
from shards.remote.base import CertificateError, RemoteError, retry
from shards.remote.download import RemoteFile, download_file, progress_bar


@dataclass(frozen=True)
class Download:
    """A published file.

    Attributes:
        url: Its address.
        name: Its name in the directory of raw files.
        bytes: Its size; 0 if it was not published.
        sha256: SHA-256 of its content (hex).
        md5: MD5 of its content (hex), if no SHA-256 was published.
        mirrors: Further addresses, used in this order if the first fails.
    """

    url: str
    name: str
    bytes: int = 0
    sha256: str = ""
    md5: str = ""
    mirrors: tuple[str, ...] = ()


def fetch(download: Download, directory: Path, or_else: str) -> Path:
    """Download a file into a directory, or continue where an earlier call ended.

    The incomplete file is `NAME.part`; it gets its name when size and hash are right. Without a network the call fails
    at its first request to each address; a connection that breaks later is tried again.

    Args:
        download: The file.
        directory: The directory of raw files.
        or_else: The files that can take its place in the directory, for the message without a network.

    Returns:
        The path of the file.

    Raises:
        UserError: If no server can be reached or all send another file, or if the disk is full.
    """
    target = directory / download.name
    partial = target.with_name(f"{download.name}.part")
    # One process at a time: several would write the same partial file.
    with created_directory(directory), file_lock(target.with_name(f".{target.name}.lock")):
        if target.exists():
            return target  # another process has downloaded it
        failures: dict[str, RemoteError | MismatchError] = {}
        for url in (download.url, *download.mirrors):
            try:
                _download(download, url, target, partial)
                sync_directory(directory)
                return target
            except (RemoteError, MismatchError) as error:
                failures[url] = error
        if all(isinstance(error, MismatchError) for error in failures.values()):
            raise failures[download.url]
        raise _unreachable(download, target, partial, or_else, failures)


def _download(download: Download, url: str, target: Path, partial: Path) -> None:
    storage = open_storage(url)
    size = download.bytes or retry(lambda: storage.info(""), fail_fast=True).bytes
    file = RemoteFile("", size, download.sha256 or None, md5=download.md5 or None)
    with progress_bar(size, download.name) as bar:
        download_file(storage, file, target, partial, bar, fail_fast=True)


def _unreachable(
    download: Download, target: Path, partial: Path, or_else: str, failures: dict[str, RemoteError | MismatchError]
) -> UserError:
    reasons = [
        f"{urllib.parse.urlsplit(url).hostname}: {error.reason if isinstance(error, RemoteError) else error.found}"
        for url, error in failures.items()
    ]
    kept = partial.stat().st_size if partial.exists() else 0
    size = f" ({download.bytes:,} bytes)" if download.bytes else ""
    progress = f" ({kept:,}{f' of {download.bytes:,}' if size else ''} bytes came and are kept; the next run continues)"
    advice = next((f"{error.hint}; or " for error in failures.values() if isinstance(error, CertificateError)), "")
    return UserError(
        found=f"no way to download {download.name} from {'; '.join(reasons)}{progress if kept else ''}",
        expected=f"{target}{size}, or a network to fetch it",
        hint=f"{advice}download {download.url} elsewhere and copy it to {quote(target)}, or put {or_else} into a "
        "directory and name it with --raw",
    )
