"""One image a tar record, as the documentation of webdataset and of DALI's reader shows it: a PNG and a class file."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image

from benchmarks.loaders.baselines.peer import Source

_SHARDS = 8  # so that up to eight workers have shards of their own


def write_records(source: Source, directory: Path) -> list[Path]:
    """Write tar shards of records `00000042.png`, `00000042.cls` (the row as text); returns their paths."""
    paths = []
    for number, rows in enumerate(np.array_split(np.arange(len(source)), min(_SHARDS, len(source)))):
        path = directory / f"records-{number:02d}.tar"
        # Without a fixed time the writer notes a fractional one, for which tar takes two more blocks a member.
        with webdataset.TarWriter(str(path), mtime=0) as writer:
            for row in rows.tolist():
                pixels = source.upright[row]
                picture = io.BytesIO()
                Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(picture, "PNG")
                writer.write({"__key__": f"{row:08d}", "png": picture.getvalue(), "cls": str(row).encode()})
        paths.append(path)
    return paths


def record_paths(directory: Path) -> list[Path]:
    """The shards that `write_records` wrote."""
    return sorted(directory.glob("records-*.tar"))
