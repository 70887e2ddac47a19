"""Data sets of the MNIST family: four idx files, train and t10k, images and labels."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.datasets import RawPart, Request, Source
from pipeline.raw.download import Download, fetch
from pipeline.readers.formats.idx import decode_pair
from pipeline.readers.raw_dir import RawDirectory

# What the four files are called everywhere, without `.gz`: images and labels of each part.
MNIST_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


def idx_downloads(address: str, names: Sequence[str], files: Sequence[tuple[int, str]]) -> tuple[Download, ...]:
    """Compressed files at an address that ends in `/`: names without `.gz`; bytes and SHA-256 of each."""
    return tuple(
        Download(f"{address}{name}.gz", f"{name}.gz", size, sha256)
        for name, (size, sha256) in zip(names, files, strict=True)
    )


def plan_download(request: Request, downloads: Sequence[Download]) -> str:
    """A line that says what `have_files` would do."""
    absent = _absent(request, downloads)
    if not absent:
        return f"read the {len(downloads)} files in {request.raw}"
    size = sum(download.bytes for download in absent)
    return f"download {', '.join(download.name for download in absent)} ({size / 1e6:,.1f} MB) to {request.raw}"


def have_files(request: Request, downloads: Sequence[Download]) -> RawDirectory:
    """The directory with all of the files in it, downloaded where they are absent."""
    for download in _absent(request, downloads):
        fetch(download, request.raw, or_else=f"the files {', '.join(download.name for download in downloads)}")
    return RawDirectory(request.raw)


def idx_source(
    name: str, description: str, classes: tuple[str, ...], address: str, files: Sequence[tuple[int, str]]
) -> Source:
    """A source of `MNIST_FILES` at an address, without splits; bytes and SHA-256 of the four in their order."""
    downloads = idx_downloads(address, [name for names in MNIST_FILES.values() for name in names], files)

    def plan(request: Request) -> str:
        return plan_download(request, downloads)

    def load(request: Request) -> tuple[RawPart, ...]:
        files = have_files(request, downloads)
        parts = []
        for part, names in MNIST_FILES.items():
            raw_images, raw_labels = (files.read(file) for file in names)
            images, labels = decode_pair(raw_images, raw_labels, len(classes))
            records = (raw_images.record(), raw_labels.record())
            parts.append(RawPart.from_arrays(part, images, labels, classes, files=records))
        return tuple(parts)

    return Source(name, description, splits=(), raw_files=True, plan=plan, load=load)


def _absent(request: Request, downloads: Sequence[Download]) -> list[Download]:
    files = RawDirectory(request.raw)
    return [download for download in downloads if files.missing([download.name.removesuffix(".gz")])]
