"""EMNIST: 814,255 handwritten characters in six splits (Cohen et al. 2017, https://arxiv.org/abs/1702.05373)."""

from __future__ import annotations

from pipeline.datasets.base import DatasetSource
from pipeline.readers.download import Download
from pipeline.readers.formats.idx import decode_pair
from pipeline.readers.raw_dir import PublishedArchive, RawContent
from pipeline.readers.raw_split import RawSplit, SourceOptions
from shards.errors import UserError

ARCHIVE = Download(
    url="https://biometrics.nist.gov/cs_links/EMNIST/gzip.zip",
    name="gzip.zip",
    bytes=561_753_746,
    sha256="fb9bb67e33772a9cc0b895e4ecf36d2cf35be8b709693c3564cea2a019fcda8e",
)
SPLITS = ("byclass", "bymerge", "balanced", "letters", "digits", "mnist")


def _names(split: str) -> dict[str, str]:
    names = {"mapping": f"emnist-{split}-mapping.txt"}
    for part in ("train", "test"):
        names[f"{part} images"] = f"emnist-{split}-{part}-images-idx3-ubyte"
        names[f"{part} labels"] = f"emnist-{split}-{part}-labels-idx1-ubyte"
    return names


def parse_mapping(raw: RawContent) -> tuple[tuple[str, ...], int]:
    """Class names in label order, and the label of the first class.

    A line is a label and the character codes it stands for: `10 65`, or in `letters`, which counts from 1,
    `1 65 97`, named `Aa`.
    """
    try:
        lines = [
            [int(word) for word in line.split()] for line in raw.content.decode("ascii").splitlines() if line.strip()
        ]
        labels = [line[0] for line in lines]
        names = tuple("".join(map(chr, line[1:])) for line in lines)
        if not labels or labels != list(range(labels[0], labels[0] + len(labels))) or not all(names):
            raise ValueError("labels do not follow each other")
    except (ValueError, IndexError, OverflowError) as error:
        raise UserError(
            found=f"{raw.place}, which is not a mapping file: {error}",
            expected="lines of a label and character codes, such as '10 65'",
            hint=f"get it again from {ARCHIVE.name}",
        ) from None
    return names, labels[0]


def _archive(split: str) -> PublishedArchive:
    return PublishedArchive(ARCHIVE, tuple(_names(split).values()), split)


def _load(options: SourceOptions) -> tuple[RawSplit, ...]:
    files, names = _archive(options.split).open(options.raw), _names(options.split)
    mapping = files.read(names["mapping"])
    classes, first_label = parse_mapping(mapping)
    parts = []
    for part in ("train", "test"):
        raw_images, raw_labels = files.read(names[f"{part} images"]), files.read(names[f"{part} labels"])
        images, labels = decode_pair(raw_images, raw_labels, len(classes), first_label)
        files_read = (raw_images.record(), raw_labels.record(), mapping.record())
        parts.append(RawSplit.from_arrays(part, images, labels, classes, transposed=True, files=files_read))
    return tuple(parts)


SOURCES = (
    DatasetSource(
        name="emnist",
        description="EMNIST, handwritten letters and digits, 28x28 gray, six splits",
        splits=SPLITS,
        plan=lambda options: _archive(options.split).plan(options.raw),
        load=_load,
    ),
)
