"""On-disk format: writing, reading and verifying packed image shards.

Reading order: `manifest`, `stores.base`, `stores.tar`, `open`. `docs/format.md` specifies the format. This package
does not import `pipeline` or `trainer`, nor torch or DALI.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from shards.cli import exit_on_interrupt

if TYPE_CHECKING:
    from shards.errors import UserError
    from shards.manifest import Manifest
    from shards.open import open_split, open_store

exit_on_interrupt()  # before the imports of a command

__all__ = ["Manifest", "UserError", "open_split", "open_store"]

_MODULES = {"Manifest": "manifest", "UserError": "errors", "open_split": "open", "open_store": "open"}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `--help` takes a fraction of a second without numpy."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"shards.{_MODULES[name]}"), name)
