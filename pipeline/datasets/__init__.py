"""The known data sets. Each module defines `SOURCES`; a new data set is a new module here.

Modules of this package must not import torch or DALI.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.datasets.base import DatasetSource


def source_names() -> list[str]:
    """Return the names of all data sets, sorted."""
    return sorted(_sources())


def find_source(name: str) -> DatasetSource:
    """Return the data set with a name of `source_names()`."""
    return _sources()[name]


@functools.cache
def _sources() -> dict[str, DatasetSource]:
    modules = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    return {source.name: source for module in modules for source in getattr(module, "SOURCES", ())}
