"""How do images rest on disk?

Block-record tar shards, their index and their manifest: written whole or not at all, memory-mapped, hashed.
Knows nothing of data-set names, devices, batches, DALI or torch. The format is described in `FORMAT.md`.
"""

from shards.errors import UserError
from shards.manifest import Manifest
from shards.stores.base import Store
from shards.open import open_part, open_store

__all__ = ["Manifest", "Store", "UserError", "open_part", "open_store"]
