"""Registry of the compared loaders, those of Inkstream among them.

Each module implements the loaders of one library and is imported only if the library is installed. All loaders pack the
same images in the order of the raw files and return the same model input with the source index of each image. If a file
format has a field for the label, the index is stored in it; the label is one look-up away.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass

from benchmarks.loaders.baselines.base import BaselineLoader


@dataclass(frozen=True)
class LoaderSpec:
    """Entry of the registry.

    Args:
        name: Name of the loader.
        module: Module of this package whose `LOADERS` contains it.
        requires: Modules that it imports.
        install: Command that installs them.
        is_ours: Whether the loader is Inkstream's.
    """

    name: str
    module: str
    requires: tuple[str, ...] = ()
    install: str = 'pip install -e ".[benchmarks]"'
    is_ours: bool = False


REGISTRY = {
    spec.name: spec
    for spec in (
        LoaderSpec("inkstream-tar-torch", "inkstream", is_ours=True),
        LoaderSpec(
            "inkstream-tar-dali", "inkstream", ("nvidia.dali",), "pip install nvidia-dali-cuda120", is_ours=True
        ),
        LoaderSpec("inkstream-zarr-torch", "inkstream", ("zarr",), "pip install zarr", is_ours=True),
        LoaderSpec("inkstream-tar-gather", "inkstream", is_ours=True),
        LoaderSpec("inkstream-zarr-gather", "inkstream", ("zarr",), "pip install zarr", is_ours=True),
        LoaderSpec("dali-webdataset", "dali_reader", ("nvidia.dali", "webdataset"), "pip install nvidia-dali-cuda120"),
        LoaderSpec("torch-dataloader", "torch_dataloader"),
        LoaderSpec("webdataset", "webdataset_reader", ("webdataset",), "pip install webdataset"),
        LoaderSpec("litdata", "litdata_stream", ("litdata",)),
        LoaderSpec("mosaicml-streaming", "mosaic_stream", ("streaming",), "see benchmarks/loaders/INSTALL.md"),
        LoaderSpec("huggingface-datasets", "huggingface_set", ("datasets",)),
        LoaderSpec("grain", "grain_loader", ("grain", "array_record")),
        LoaderSpec("spdl", "spdl_loader", ("spdl.dataloader",)),
        LoaderSpec("ffcv", "ffcv_loader", ("ffcv",), "see benchmarks/loaders/INSTALL.md"),
        LoaderSpec("plain-torch", "in_memory"),
        LoaderSpec("floor", "in_memory"),
    )
}


# Exceptions of an incomplete installation, by name; the loader then counts as not installed.
IMPORT_ERRORS = frozenset({"ImportError", "ModuleNotFoundError", "OSError"})


def missing_requirement(spec: LoaderSpec) -> str | None:
    """Return which modules of a loader are not installed and how to install them, or None if it is complete."""
    missing = [module for module in spec.requires if not _is_installed(module)]
    return f"{' and '.join(missing)} not installed ({spec.install})" if missing else None


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a parent package
        return False


def import_loader(name: str) -> BaselineLoader:
    """Import the module of a loader and return the loader."""
    return importlib.import_module(f"{__name__}.{REGISTRY[name].module}").LOADERS[name]
