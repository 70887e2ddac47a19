"""How do raw files become shards, and shards become batches on a device?

`sources/` reads raw data sets, `shard` packs them; `sampler` selects the samples of a batch, `transforms/` (DALI or
torch) turn their bytes into model input, `loader` joins the two. Knows nothing of losses, models or training.
"""

import os

# The threads of a parallel operation wait for each other spinning, for milliseconds; where others want the cores too,
# loaders and training become several times slower by it. Waiting for some ten microseconds and then sleeping is as
# fast on an idle machine. GNU's OpenMP reads this when torch is imported, so import this package first.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
