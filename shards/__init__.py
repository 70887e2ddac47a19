"""On-disk format: writing, reading and verifying packed image shards.

Reading order: `manifest`, `stores.base`, `stores.tar`, `open`. `docs/format.md` specifies the format. This package
does not import `pipeline` or `trainer`, nor torch or DALI.
"""

from shards.errors import UserError
from shards.manifest import Manifest
from shards.open import open_split, open_store

__all__ = ["Manifest", "UserError", "open_split", "open_store"]
