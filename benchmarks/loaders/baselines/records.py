"""Tar records of one image, a PNG and a class file, as in the documentation of webdataset and DALI."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import webdataset

from benchmarks.loaders.baselines.base import Source
from benchmarks.loaders.baselines.transforms import to_pil

_SHARDS = 8  # at least one per worker, for up to eight workers


def write_records(source: Source, directory: Path) -> list[Path]:
    """Write tar shards of records `00000042.png`, `00000042.cls` (the source index as text) and return their paths."""
    paths = []
    for number, indices in enumerate(np.array_split(np.arange(len(source)), min(_SHARDS, len(source)))):
        path = directory / f"records-{number:02d}.tar"
        # The default is a fractional time, which costs two more tar blocks per member.
        with webdataset.TarWriter(str(path), mtime=0) as writer:
            for index in indices.tolist():
                png = io.BytesIO()
                to_pil(source.upright[index]).save(png, "PNG")
                writer.write({"__key__": f"{index:08d}", "png": png.getvalue(), "cls": str(index).encode()})
        paths.append(path)
    return paths


def record_paths(directory: Path) -> list[Path]:
    """Return the shards of `write_records`."""
    return sorted(directory.glob("records-*.tar"))
