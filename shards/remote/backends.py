"""Select the backend of an address by its protocol."""

from __future__ import annotations

from shards.credentials import is_incomplete, parse_address, reveal
from shards.errors import UserError
from shards.remote.base import RemoteStorage


def open_storage(address: str) -> RemoteStorage:
    """Return the storage at an address.

    Raises:
        UserError: If the protocol is unknown, its package is not installed, or the address was stored without its
            credentials.
    """
    if is_incomplete(address):
        raise UserError(
            found=f"{address}, an address without its credentials, which are never stored",
            expected="the address with its user and query in place of ***",
            hint="name it again (trainer.run, trainer.tune: data.shards=ADDRESS, others: --shards ADDRESS). Others "
            "see command lines: credentials may also be in ~/.netrc, or in the configuration of the storage",
        )
    address = reveal(address)
    scheme = parse_address(address).scheme
    address = scheme.lower() + address[len(scheme) :]
    if scheme.lower() in ("http://", "https://"):
        from shards.remote.http_backend import HttpStorage

        return HttpStorage(address)
    from shards.remote.fsspec_backend import FsspecStorage

    return FsspecStorage(address)
