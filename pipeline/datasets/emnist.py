"""EMNIST: 814,255 handwritten characters in six variants (Cohen et al. 2017, https://arxiv.org/abs/1702.05373)."""

from __future__ import annotations

from dataclasses import replace

from pipeline.datasets.base import DatasetSource
from pipeline.datasets.mnist_family import read_idx_splits
from pipeline.readers.archives.files import CorruptFileError, corrupt_as_user_error
from pipeline.readers.download import Download
from pipeline.readers.raw_dir import PublishedFiles, RawContent
from pipeline.readers.raw_split import RawSplit, SourceOptions
from shards.manifest import REQUIRED_SPLITS

ARCHIVE = Download(
    url="https://biometrics.nist.gov/cs_links/EMNIST/gzip.zip",
    name="gzip.zip",
    bytes=561_753_746,
    sha256="fb9bb67e33772a9cc0b895e4ecf36d2cf35be8b709693c3564cea2a019fcda8e",
)
VARIANTS = ("byclass", "bymerge", "balanced", "letters", "digits", "mnist")


def _files(variant: str) -> tuple[str, dict[str, tuple[str, str]]]:
    """The mapping file, and the files of images and labels of each split."""
    prefix = f"emnist-{variant}"
    pairs = {
        split: (f"{prefix}-{split}-images-idx3-ubyte", f"{prefix}-{split}-labels-idx1-ubyte")
        for split in REQUIRED_SPLITS
    }
    return f"{prefix}-mapping.txt", pairs


def parse_mapping(raw: RawContent) -> tuple[tuple[str, ...], int]:
    """Parse a mapping file.

    A line is a label and the character codes of its class: `10 65`, or in `letters`, which is numbered from 1,
    `1 65 97`, which is named `Aa`.

    Returns:
        The class names in the order of the labels, and the label of the first class.

    Raises:
        UserError: If the file has another form.
    """
    with corrupt_as_user_error(
        raw.path, "lines of a label and character codes, such as '10 65'", f"get it again from {ARCHIVE.name}"
    ):
        try:
            lines = [list(map(int, line.split())) for line in raw.content.decode("ascii").splitlines() if line.strip()]
            labels = [line[0] for line in lines]
            names = tuple("".join(map(chr, line[1:])) for line in lines)
            if not labels or labels != list(range(labels[0], labels[0] + len(labels))) or not all(names):
                raise ValueError("labels are not consecutive")
        except (ValueError, OverflowError) as error:
            raise CorruptFileError(f"not a mapping file: {error}") from None
    return names, labels[0]


def _published(variant: str) -> PublishedFiles:
    mapping, pairs = _files(variant)
    return PublishedFiles((mapping, *(name for pair in pairs.values() for name in pair)), (ARCHIVE,), variant)


def _load(options: SourceOptions) -> tuple[RawSplit, ...]:
    directory = _published(options.variant).open(options.raw)
    mapping_name, pairs = _files(options.variant)
    mapping = directory.read(mapping_name)
    classes, first_label = parse_mapping(mapping)
    splits = read_idx_splits(directory, pairs, classes, first_label)
    return tuple(replace(split, transposed=True, files=(*split.files, mapping.record())) for split in splits)


SOURCES = (
    DatasetSource(
        name="emnist",
        description="EMNIST, handwritten letters and digits, 28x28 gray, six variants",
        variants=VARIANTS,
        plan=lambda options: _published(options.variant).plan(options.raw),
        load=_load,
    ),
)
