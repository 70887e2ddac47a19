"""Count samples per class during a full check, and find source rows that are packed twice."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from shards.manifest import Manifest


class SampleCounter:
    """Count labels and rows block by block, and compare the totals with the manifest."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._counts = np.zeros(len(manifest.classes), np.int64)
        self._rows: list[NDArray[np.int64]] = []

    def add(self, location: object, labels: NDArray[np.int64], rows: NDArray[np.int64]) -> Iterator[str]:
        """Count the samples of one block. `labels` and `rows` are int64 [n]. Yields a line if one is invalid."""
        if len(labels) and (labels.min() < 0 or labels.max() >= len(self._counts)):
            yield f"{location}: a label outside 0 .. {len(self._counts) - 1}"
        elif len(rows) and rows.min() < 0:
            yield f"{location}: a row below 0"
        else:
            self._counts += np.bincount(labels, minlength=len(self._counts))
            self._rows.append(rows)

    def faults(self) -> Iterator[str]:
        """Yield the differences of the totals from the manifest. Only meaningful if every block was added."""
        if self._counts.tolist() != list(self._manifest.counts):
            yield "counts by class differ from the manifest"
        if len(np.unique(np.concatenate(self._rows))) != self._manifest.samples:
            yield "a source row is packed twice"
