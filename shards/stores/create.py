"""Create the writer of a store."""

from __future__ import annotations

from pathlib import Path

from shards.manifest import StoreKind
from shards.stores.base import Layout, SplitWriter


def make_writer(store: StoreKind, directory: Path, layout: Layout, compression: str = "zstd") -> SplitWriter:
    """Return the writer of a store. `compression` (`zstd` or `none`) is for zarr only."""
    if store == "zarr":
        from shards.stores.zarr_arrays import ZarrWriter

        return ZarrWriter(directory, layout, compression)
    if store == "records":
        from shards.stores.records import RecordWriter

        return RecordWriter(directory, layout)
    from shards.stores.tar import TarWriter

    return TarWriter(directory, layout)
