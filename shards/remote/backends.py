"""Select the backend of an address by its protocol."""

from __future__ import annotations

from shards.remote.base import RemoteStorage


def open_storage(address: str) -> RemoteStorage:
    """Return the storage at an address.

    Raises:
        UserError: If the protocol is unknown, or its package is not installed.
    """
    if address.partition("://")[0].lower() in ("http", "https"):
        from shards.remote.http_backend import HttpStorage

        return HttpStorage(address)
    from shards.remote.fsspec_backend import FsspecStorage

    return FsspecStorage(address)
