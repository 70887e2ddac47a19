"""MNIST: 70,000 handwritten digits (LeCun, Cortes and Burges, http://yann.lecun.com/exdb/mnist/)."""

from __future__ import annotations

from pathlib import Path

from pipeline.download import Download, fetch
from pipeline.idx import decode_pair
from pipeline.raw import RawDirectory
from pipeline.sources import RawPart, Source

CLASSES = tuple("0123456789")
# The original server refuses downloads; this mirror, kept by the PyTorch project, has the original files.
_MIRROR = "https://ossci-datasets.s3.amazonaws.com/mnist/"
DOWNLOADS = tuple(
    Download(url=f"{_MIRROR}{name}.gz", name=f"{name}.gz", bytes=size, sha256=sha256)
    for name, size, sha256 in (
        (
            "train-images-idx3-ubyte",
            9_912_422,
            "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        ),
        ("train-labels-idx1-ubyte", 28_881, "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"),
        ("t10k-images-idx3-ubyte", 1_648_877, "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"),
        ("t10k-labels-idx1-ubyte", 4_542, "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"),
    )
)


def _absent(directory: Path) -> list[Download]:
    files = RawDirectory(directory)
    return [download for download in DOWNLOADS if files.missing([download.name.removesuffix(".gz")])]


def _plan(directory: Path, split: str) -> str:
    absent = _absent(directory)
    if not absent:
        return f"read the four files in {directory}"
    size = sum(download.bytes for download in absent)
    return f"download {', '.join(download.name for download in absent)} ({size / 1e6:,.1f} MB) to {directory}"


def _load(directory: Path, split: str) -> tuple[RawPart, ...]:
    for download in _absent(directory):
        fetch(download, directory, or_else="the four files train-images-idx3-ubyte.gz, ...")
    files = RawDirectory(directory)
    parts = []
    for part, prefix in (("train", "train"), ("test", "t10k")):
        raw_images = files.read(f"{prefix}-images-idx3-ubyte")
        raw_labels = files.read(f"{prefix}-labels-idx1-ubyte")
        images, labels = decode_pair(raw_images, raw_labels, len(CLASSES))
        files_read = (raw_images.record(), raw_labels.record())
        parts.append(RawPart.from_arrays(part, images, labels, CLASSES, files=files_read))
    return tuple(parts)


SOURCE = Source(
    name="mnist",
    description="MNIST, handwritten digits, 28x28 gray",
    splits=(),
    raw_files=True,
    plan=_plan,
    load=_load,
)
