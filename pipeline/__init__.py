"""From raw files to shards (packing) and from shards to batches on a device (loading).

Reading order of the loader: `loader`, `sampler`, `transforms.spec`, `transforms.torch_backend`. Reading order of the
packer: `shard`, `packing.pack`, `datasets.base`, `readers`. The package does not depend on models, losses or training.
"""

import os

import shards  # noqa: F401  see `exit_on_interrupt`

# By default, OpenMP threads spin for milliseconds at the end of a parallel operation. When other processes use the same
# cores, this makes loading and training several times slower. Spinning for about 10 us before sleeping is as fast on
# an idle machine. GNU OpenMP reads the variable when torch is imported, so this package has to be imported first.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
