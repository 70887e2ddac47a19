"""Download a published raw file once."""

from __future__ import annotations

import urllib.parse
from dataclasses import dataclass
from pathlib import Path

from shards.atomic import created_directory, file_lock, sync_directory
from shards.errors import UserError, quote
from shards.remote.backends import open_storage
from shards.remote.base import RemoteError
from shards.remote.download import RemoteFile, download_file, progress_bar


@dataclass(frozen=True)
class Download:
    """A published file.

    Attributes:
        url: Its address.
        name: Its name in the directory of raw files.
        bytes: Its size.
        sha256: SHA-256 of its content (hex).
    """

    url: str
    name: str
    bytes: int
    sha256: str


def fetch(download: Download, directory: Path, or_else: str) -> Path:
    """Download a file into a directory, or continue where an earlier call ended.

    The incomplete file is `NAME.part`; it gets its name when size and hash are right. Without a network the call fails
    at its first request; a connection that breaks later is tried again.

    Args:
        download: The file.
        directory: The directory of raw files.
        or_else: The files that can take its place in the directory, for the message without a network.

    Returns:
        The path of the file.

    Raises:
        UserError: If the server cannot be reached or sends another file, or if the disk is full.
    """
    target = directory / download.name
    partial = target.with_name(f"{download.name}.part")
    # One process at a time: several would write the same partial file.
    with created_directory(directory), file_lock(target.with_name(f".{target.name}.lock")):
        if target.exists():
            return target  # another process has downloaded it
        file = RemoteFile("", download.bytes, download.sha256)
        try:
            with progress_bar(download.bytes, download.name) as bar:
                download_file(open_storage(download.url), file, target, partial, bar, fail_fast=True)
        except RemoteError as error:
            raise _unreachable(download, target, partial, or_else, error) from None
        sync_directory(directory)
    return target


def _unreachable(download: Download, target: Path, partial: Path, or_else: str, error: RemoteError) -> UserError:
    host = urllib.parse.urlsplit(download.url).hostname
    size = partial.stat().st_size if partial.exists() else 0
    progress = f" ({size:,} of {download.bytes:,} bytes came and are kept; the next run continues)" if size else ""
    return UserError(
        found=f"no way to download {download.name} from {host}: {error.reason}{progress}",
        expected=f"{target} ({download.bytes:,} bytes), or a network to fetch it",
        hint=f"download {download.url} elsewhere and copy it to {quote(target)}, or put {or_else} into a directory "
        "and name it with --raw",
    )
