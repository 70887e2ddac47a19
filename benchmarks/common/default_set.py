"""Default data set of the benchmarks."""

from __future__ import annotations

from pathlib import Path

from pipeline.datasets import find_source
from pipeline.packing.pack import PackSettings, pack
from pipeline.readers.raw_split import SourceOptions
from shards.manifest import is_packed_dataset
from shards.remote.datasets import resolve_dataset

PACKED_EMNIST = Path("data/shards/emnist-byclass")
PACKED_DIGITS = Path("data/shards/digits")


def choose_set(shards: str | None) -> Path:
    """Return the named data set, else packed EMNIST ByClass, else the digits of scikit-learn (packed if missing)."""
    if shards is not None:
        return resolve_dataset(shards)
    if is_packed_dataset(PACKED_EMNIST):
        return PACKED_EMNIST
    source = find_source("digits")
    pack(lambda: source.load(SourceOptions(Path())), PACKED_DIGITS, PackSettings(source.name))
    return PACKED_DIGITS
