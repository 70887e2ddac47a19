"""On which packed set a benchmark runs when none is named."""

from __future__ import annotations

from pathlib import Path

from pipeline.datasets import find_source
from pipeline.packing.pack import pack
from pipeline.readers.raw_split import SourceOptions
from shards.manifest import is_packed_dataset
from shards.remote.sets import resolve_dataset

PACKED_EMNIST = Path("data/shards/emnist-byclass")
PACKED_DIGITS = Path("data/shards/digits")


def choose_set(shards: str | None) -> Path:
    """The packed set to measure: the one named, a packed EMNIST, or the embedded digits, packed if need be."""
    if shards is not None:
        return resolve_dataset(shards)
    if is_packed_dataset(PACKED_EMNIST):
        return PACKED_EMNIST
    source = find_source("digits")
    pack(lambda: source.load(SourceOptions(Path())), PACKED_DIGITS, dataset=source.name)
    return PACKED_DIGITS
