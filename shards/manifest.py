"""`manifest.json`, the description of a packed split. It is written last: a split with a manifest is complete."""

from __future__ import annotations

import hashlib
import json
import math
import platform
import re
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

from shards.atomic import read_file, with_checksum, without_checksum, write_file
from shards.errors import CorruptError, MismatchError, NotFoundError, UserError, printable, quote

MANIFEST_NAME = "manifest.json"
REQUIRED_SPLITS = ("train", "test")
VALIDATION = "val"  # optional
SPLITS = (*REQUIRED_SPLITS, VALIDATION)
# The names by which the Hugging Face Hub recognizes splits.
_SPLIT_NAMES = {
    "train": ("train", "training"),
    "test": ("test", "testing", "eval", "evaluation"),
    VALIDATION: ("val", "valid", "validation", "dev"),
}
_WITH_VARIANTS = ("emnist", "cifar100", "numtadb", "qmnist")  # published data sets, packed as NAME-VARIANT
_PUBLISHED = (*_WITH_VARIANTS, "mnist", "fashionmnist", "kmnist", "cifar10", "digits")
_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_MAX_LOOKED_AT = 1000  # files
StoreKind = Literal["tar", "zarr", "records"]
ARRAYS = LABELS, ROWS, BLOCKS = ("labels.npy", "rows.npy", "blocks.npy")  # of every split of version 3
Content: TypeAlias = bytes | memoryview
VERSION: Literal[3] = 3  # of the format that is written
STATISTICS_SAMPLES = 65_536  # of the pixel statistics
MAX_MANIFEST_BYTES = 1 << 28  # of a manifest
MAX_BLOCK_BYTES = 1 << 30  # of pixels: readers hold a block in memory


def split_named(name: str) -> str | None:
    """Return the split (`train`, `test` or `val`) that a directory, file or array of this name holds, or None."""
    return next((split for split, names in _SPLIT_NAMES.items() if name.lower() in names), None)


def splits_in(name: str) -> set[str]:
    """Return the splits that the words of a file name stand for: `val` for `birds-validation-00.tar`."""
    return {split for word in re.split("[^A-Za-z]+", name) if (split := split_named(word))}


def package_versions(*packages: str) -> dict[str, str]:
    """Return the versions of Inkstream, of packages and of Python, for `Manifest.versions`."""
    versions = {package: version(package) for package in packages}
    try:
        inkstream = version("inkstream")
    except PackageNotFoundError:  # a checkout on PYTHONPATH
        inkstream = "unknown"
    return {"inkstream": inkstream, **versions, "python": platform.python_version()}


def is_file_name(name: str) -> bool:
    """Whether a name is that of a file below a directory, on any system, and safe to print."""
    path = PurePosixPath(name)
    inside = path.parts and not path.is_absolute() and ".." not in path.parts
    return bool(inside and printable(name) == name and "\\" not in name and not PureWindowsPath(name).drive)


class _Record(BaseModel):
    # Python names differ from the names on disk: those are read and written as aliases.
    model_config = ConfigDict(extra="forbid", frozen=True, validate_by_name=True, validate_by_alias=False)


class RawFile(_Record):
    """Name, size in bytes and SHA-256 (hex) of a file when the split was packed."""

    name: str
    bytes: int = Field(ge=0)
    sha256: str

    @classmethod
    def of(cls, directory: Path, name: str) -> RawFile:
        """Measure and hash a file in a directory."""
        with open(directory / name, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return cls(name=name, bytes=file.tell(), sha256=digest)

    @classmethod
    def of_content(cls, name: str, content: Content) -> RawFile:
        """Measure and hash the content of a file."""
        return cls(name=name, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


class Shard(_Record):
    """A file of images: number of samples, size in bytes, SHA-256 (hex); before version 3 a CRC-32 for each block."""

    name: str
    samples: int = Field(gt=0)
    bytes: int = Field(gt=0)
    sha256: str
    blocks_crc32: tuple[int, ...] = ()


class PixelStatistics(_Record):
    """Sums over the stored pixels (0 .. 255) of the first images, and over their squares, for each channel.

    Packing permutes the images, so the first ones are a random subset. With 65,536 of them, the error of the mean is
    below a thousandth of the std.
    """

    samples: PositiveInt
    sums: tuple[NonNegativeInt, ...]
    squares: tuple[NonNegativeInt, ...]


class Manifest(_Record):
    """A packed split (train, test or val) of a data set. `docs/format.md` describes every field."""

    format: Literal["inkstream-blocks"] = "inkstream-blocks"
    version: Literal[1, 2, 3] = VERSION
    store: StoreKind = "tar"
    dataset: str
    variant: str = Field(validation_alias="split", serialization_alias="split")
    split: str = Field(validation_alias="part", serialization_alias="part")
    classes: tuple[str, ...]
    counts: tuple[NonNegativeInt, ...]
    image_shape: tuple[PositiveInt | None, PositiveInt | None, PositiveInt]
    transposed: bool
    samples: int = Field(gt=0)
    block_size: int = Field(gt=0)
    seed: int
    options: dict[str, str | int | float] = {}
    shards: tuple[Shard, ...]
    files: tuple[RawFile, ...] = ()
    raw: tuple[RawFile, ...]
    versions: dict[str, str]
    statistics: PixelStatistics | None = None

    @model_validator(mode="after")
    def _sums_agree(self) -> Manifest:
        if len(self.counts) != len(self.classes):
            raise ValueError(f"{len(self.counts)} counts for {len(self.classes)} classes")
        for text in (self.dataset, self.variant, *self.classes):
            if printable(text) != text:
                raise ValueError(f"control characters in {text!r}")
        if sum(self.counts) != self.samples:
            raise ValueError(f"counts by class add up to {sum(self.counts)}, samples is {self.samples}")
        if sum(shard.samples for shard in self.shards) != self.samples:
            raise ValueError("the shards' samples do not add up to samples")
        if len({file.name for file in self.everything}) != len(self.everything):
            raise ValueError("a file is named twice")
        if self.encoded != (self.store == "records") or (self.image_shape[1] is None) != self.encoded:
            raise ValueError(f"images of shape {list(self.image_shape)} in a store of {self.store}")
        for file in self.everything:
            if not is_file_name(file.name):
                raise ValueError(f"a file {file.name!r} outside the split")
        if self.version == VERSION and not set(ARRAYS) <= {file.name for file in self.files}:
            raise ValueError(f"not all of the files {', '.join(ARRAYS)}")
        if self.statistics and {len(self.statistics.sums), len(self.statistics.squares)} != {self.image_shape[2]}:
            raise ValueError("statistics for another number of channels than that of the images")
        if not self.encoded:
            self._check_blocks()
        return self

    def _check_blocks(self) -> None:
        """Raise ValueError for shards too small for their samples. Readers allocate memory by these numbers."""
        if min(self.block_size, self.samples) * max(self.image_bytes, 8) > MAX_BLOCK_BYTES:
            raise ValueError(f"blocks of {self.block_size:,} images of {self.image_bytes:,} bytes")
        for shard in self.shards:
            if self.version < VERSION and len(shard.blocks_crc32) != -(-shard.samples // self.block_size):
                raise ValueError(f"{shard.name}: number of blocks does not fit its {shard.samples} samples")
            if self.store == "tar" and shard.samples * self.image_bytes > shard.bytes:
                raise ValueError(f"{shard.name}: {shard.bytes:,} bytes are too few for its {shard.samples:,} samples")
        if any(shard.samples % self.block_size for shard in self.shards[:-1]):
            raise ValueError("a shard other than the last ends inside a block")

    @property
    def name(self) -> str:
        """Data set and variant, for instance `emnist-byclass`."""
        return f"{self.dataset}-{self.variant}" if self.variant else self.dataset

    @property
    def encoded(self) -> bool:
        """Whether the images are files (JPEG, PNG, ...) of different sizes; image_shape is then [None, None, C]."""
        return self.image_shape[0] is None

    @property
    def pixel_shape(self) -> tuple[int, int, int]:
        """[H, W, C] of every image. Only for images of one size."""
        height, width, channels = self.image_shape
        assert height and width, "encoded images differ in size"
        return height, width, channels

    @property
    def image_bytes(self) -> int:
        """Bytes of one raw image, H * W * C. Only for images of one size."""
        return math.prod(self.pixel_shape)

    @property
    def packed_bytes(self) -> int:
        """Total bytes of all files of the split except the manifest."""
        return sum(file.bytes for file in self.everything)

    @property
    def everything(self) -> tuple[Shard | RawFile, ...]:
        """All files of the split except the manifest."""
        return (*self.shards, *self.files)

    def to_json(self) -> str:
        """Return the content of the file."""
        fields = with_checksum(self._fields())
        return json.dumps(fields, indent=1, ensure_ascii=False) + "\n"

    def digest(self) -> str:
        """Return a SHA-256 (hex) of the content of the split, independent of the versions that packed it."""
        content = {name: value for name, value in self._fields().items() if name != "versions"}
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def identity(self) -> str:
        """Return a SHA-256 (hex) that identifies the samples and their order.

        An upgrade of the format version does not change it.

        Labels and rows are those in the shards; version 3 repeats them in its arrays.
        """
        upgraded = {"version", "versions", "statistics", "shards", "files"}
        content = {name: value for name, value in self._fields().items() if name not in upgraded}
        kept = (file for file in self.everything if file.name not in ARRAYS and not file.name.endswith(".idx"))
        content["files"] = [(file.name, file.bytes, file.sha256) for file in kept]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def _fields(self) -> dict[str, Any]:
        """Return the fields of the file, those of this version only."""
        fields = self.model_dump(mode="json", by_alias=True)
        if self.version < VERSION:
            del fields["statistics"]
        else:
            for shard in fields["shards"]:
                del shard["blocks_crc32"]
        return fields

    def check_one_size(self, directory: Path) -> None:
        """Raise `UserError` if the split in a directory holds image files."""
        if self.encoded:
            raise UserError(
                found=f"{directory}, which holds image files of different sizes",
                expected="images of one size",
                hint="pack it again with a size: python -m pipeline.shard ... --size N",
            )

    def write(self, directory: Path) -> None:
        """Write `manifest.json` into the directory of the split."""
        write_file(directory / MANIFEST_NAME, self.to_json())

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Read the manifest of a split; raise `UserError` if it is missing or damaged."""
        try:
            content = read_file(directory / MANIFEST_NAME, MAX_MANIFEST_BYTES)
        except FileNotFoundError:
            raise _missing(directory) from None
        return cls.parse(content, directory / MANIFEST_NAME)

    @classmethod
    def parse(cls, content: bytes, path: object) -> Manifest:
        """Parse the content of a manifest.

        Args:
            content: The bytes of the file.
            path: Path or address of the file, for error messages.

        Raises:
            UserError: If the manifest is damaged, or of a later version.
        """
        try:
            fields = json.loads(content.decode("utf-8"))
            if isinstance(fields, dict) and fields.get("version", 1) not in (1, 2, 3):
                raise MismatchError(
                    found=f"{path} of format version {fields['version']}",
                    expected="format version 1, 2 or 3",
                    hint="use the version of Inkstream that packed it, or pack again with --force",
                )
            # Manifests written before do not have a checksum.
            fields = without_checksum(fields, required=False) if isinstance(fields, dict) else fields
            return cls.model_validate(fields, by_alias=True, by_name=False)
        except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, not a manifest
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
            raise CorruptError(
                found=f"{path}, which is damaged: {reason}",
                expected="the manifest that was packed",
                hint="pack again: python -m pipeline.shard SOURCE --out DIR --force",
            ) from None


def check_several_classes(classes: Sequence[str], counts: Sequence[int], source: object) -> None:
    """Raise `UserError` if all training images are of one class: a model of it is always right.

    Args:
        classes: The class names.
        counts: Training images of each class.
        source: The data set, for the message.
    """
    present = [name for name, count in zip(classes, counts, strict=True) if count]
    if len(present) < 2:
        raise UserError(
            found=f"one class, {', '.join(map(printable, present))!r}, in the training images of {source}",
            expected="training images of at least two classes",
            hint="arrange images in one directory per class, or list them with their labels in a CSV table, and pack "
            "them again: python -m pipeline.shard folder --raw DIR",
        )


def is_packed_dataset(directory: Path) -> bool:
    """Whether a directory holds a complete `train` and a complete `test` split."""
    return all(has_split(directory, split) for split in REQUIRED_SPLITS)


def has_split(directory: Path, split: str) -> bool:
    """Whether a directory holds the named split completely."""
    return (directory / split / MANIFEST_NAME).is_file()


def manifest_paths(directory: Path) -> tuple[Path, ...]:
    """Return where the manifests of a data set, and of a directory that is a split itself, may be."""
    return directory / MANIFEST_NAME, *(directory / split / MANIFEST_NAME for split in SPLITS)


def _packing_arguments(directory: Path) -> str:
    """The arguments of `pipeline.shard` that pack a data set into a directory of this name."""
    dataset = directory.parent if directory.name in SPLITS else directory
    source, _, variant = dataset.name.partition("-")
    if source in _WITH_VARIANTS and variant:
        return f"{source} --split {variant} --out {quote(dataset)}"
    return f"{source if source in _PUBLISHED else 'SOURCE'} --out {quote(dataset)}"


def _missing(directory: Path) -> NotFoundError:
    """Return the error for a directory without a manifest. The hint depends on what the directory holds."""
    if directory.exists() and not directory.is_dir():
        return NotFoundError(
            found=f"{directory}, which is no directory",
            expected="a directory that holds a manifest and shards",
            hint=f"name the directory of a packed data set, not a file in it (ls -l {quote(directory.parent)})",
        )
    if not directory.is_dir():
        return NotFoundError(
            found=f"no such directory: {directory}",
            expected=f"a packed split: a directory with {MANIFEST_NAME} and shards",
            hint=f"pack a data set first: python -m pipeline.shard {_packing_arguments(directory)}",
        )
    splits = [split for split in SPLITS if has_split(directory, split)]
    datasets = sorted(path.parent.parent for path in directory.glob(f"*/train/{MANIFEST_NAME}"))
    if any(directory.glob("*.tar")):
        dataset = directory.parent if directory.name in SPLITS else directory
        hint = f"if WebDataset shards of another tool: python -m shards.index {quote(dataset)}; else pack again"
    elif splits:
        hint = f"name one split: {quote(directory / splits[0])}"
    elif datasets:
        hint = f"name the packed data set inside it: {quote(datasets[0])}"
    elif any(path.suffix.lower() in _IMAGES for path in islice(directory.rglob("*.*"), _MAX_LOOKED_AT)):
        hint = f"pack the images in it first: python -m pipeline.shard folder --raw {quote(directory)} --out DIR"
    else:
        hint = "pack again: python -m pipeline.shard SOURCE --out DIR (without a manifest a split is incomplete)"
    return NotFoundError(
        found=f"{directory} without {MANIFEST_NAME}", expected="the directory of a complete split", hint=hint
    )
