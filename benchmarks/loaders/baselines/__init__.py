"""Which loaders are compared, and how is each of them used as its documentation shows it and at its best?

A module here holds one library's loaders, ours among them, and may be imported only where the library is installed. All
of them pack the same images in the order of the raw files and give batches of the same model input, with the source row
of every image: where a format has a field for the label the row is stored in it, and the label is one look-up away.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass

from benchmarks.loaders.baselines.peer import Peer


@dataclass(frozen=True)
class Listing:
    """A loader by name. module: in this package, with the loader in its `PEERS`. needs: modules it imports.

    install: what brings them. ours: it is Inkstream's own.
    """

    name: str
    module: str
    needs: tuple[str, ...] = ()
    install: str = "pip install '.[peers]'"
    ours: bool = False


LISTINGS = {
    listing.name: listing
    for listing in (
        Listing("inkstream-tar-torch", "inkstream", ours=True),
        Listing("inkstream-tar-dali", "inkstream", ("nvidia.dali",), "pip install nvidia-dali-cuda120", ours=True),
        Listing("inkstream-zarr-torch", "inkstream", ("zarr",), "pip install zarr", ours=True),
        Listing("inkstream-tar-gather", "inkstream", ours=True),
        Listing("inkstream-zarr-gather", "inkstream", ("zarr",), "pip install zarr", ours=True),
        Listing("dali-webdataset", "dali_reader", ("nvidia.dali", "webdataset"), "pip install nvidia-dali-cuda120"),
        Listing("torch-dataloader", "torch_dataloader"),
        Listing("webdataset", "webdataset_reader", ("webdataset",), "pip install webdataset"),
        Listing("litdata", "litdata_stream", ("litdata",)),
        Listing("mosaicml-streaming", "mosaic_stream", ("streaming",), "see benchmarks/loaders/baselines/INSTALL.md"),
        Listing("huggingface-datasets", "huggingface_set", ("datasets",)),
        Listing("ffcv", "ffcv_loader", ("ffcv",), "see benchmarks/loaders/baselines/INSTALL.md"),
        Listing("plain-torch", "in_memory"),
        Listing("floor", "in_memory"),
    )
}


# What an installation that is not whole raises, by name: then a loader counts as absent.
IMPORT_FAILURES = frozenset({"ImportError", "ModuleNotFoundError", "OSError"})


def absent(listing: Listing) -> str | None:
    """Why a loader cannot be measured here, in words; None if it can."""
    missing = [module for module in listing.needs if not _is_there(module)]
    return f"{' and '.join(missing)} not installed ({listing.install})" if missing else None


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a parent package
        return False


def load(name: str) -> Peer:
    """Import a loader's module and return the loader."""
    return importlib.import_module(f"{__name__}.{LISTINGS[name].module}").PEERS[name]
