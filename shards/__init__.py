"""On-disk format: writing, reading and verifying packed image shards. `docs/format.md` describes it.

Knows nothing of data-set names, devices, batches, DALI or torch.
"""

from shards.errors import UserError
from shards.manifest import Manifest
from shards.open import open_split, open_store

__all__ = ["Manifest", "UserError", "open_split", "open_store"]
