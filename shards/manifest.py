"""`manifest.json`: description of a packed split. It is written last, so a split with a manifest is complete."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

from shards.atomic import write_file
from shards.errors import CorruptError, NotFoundError, UserError

MANIFEST_NAME = "manifest.json"
REQUIRED_SPLITS = ("train", "test")
VALIDATION = "val"  # a third split, which a set may have
SPLITS = (*REQUIRED_SPLITS, VALIDATION)
StoreKind = Literal["tar", "zarr", "records"]
MOST_BLOCK_BYTES = 1 << 30  # of pixels: what a reader of blocks has to have room for


class _Record(BaseModel):
    # Python names differ from the names on disk: those are read and written as aliases.
    model_config = ConfigDict(extra="forbid", frozen=True, validate_by_name=True, validate_by_alias=False)


class RawFile(_Record):
    """A file as it was when the split was packed: its name, size in bytes and SHA-256 (hex)."""

    name: str
    bytes: int = Field(ge=0)
    sha256: str


class Shard(_Record):
    """A file of images: its size in bytes, SHA-256 (hex), samples, and a CRC-32 for each block in it."""

    name: str
    samples: int = Field(gt=0)
    bytes: int = Field(gt=0)
    sha256: str
    blocks_crc32: tuple[int, ...]


class Manifest(_Record):
    """A packed split (train, test or val) of a data set. `docs/format.md` gives the meaning of every field."""

    format: Literal["inkstream-blocks"] = "inkstream-blocks"
    version: Literal[1, 2] = 2
    store: StoreKind = "tar"
    dataset: str
    variant: str = Field(alias="split")
    split: str = Field(alias="part")
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

    @model_validator(mode="after")
    def _sums_agree(self) -> Manifest:
        if len(self.counts) != len(self.classes):
            raise ValueError(f"{len(self.counts)} counts for {len(self.classes)} classes")
        if sum(self.counts) != self.samples:
            raise ValueError(f"counts by class add up to {sum(self.counts)}, samples is {self.samples}")
        if sum(shard.samples for shard in self.shards) != self.samples:
            raise ValueError("the shards' samples do not add up to samples")
        if len({file.name for file in self.everything}) != len(self.everything):
            raise ValueError("a file is named twice")
        if self.encoded != (self.store == "records") or (self.image_shape[1] is None) != self.encoded:
            raise ValueError(f"images of shape {list(self.image_shape)} in a store of {self.store}")
        for name in (file.name for file in self.everything):
            path = PurePosixPath(name)
            inside = path.parts and not path.is_absolute() and ".." not in path.parts
            if not inside or not name.isprintable() or "\\" in name or PureWindowsPath(name).drive:
                raise ValueError(f"a file {name!r} outside the split")
        if not self.encoded:
            self._check_blocks()
        return self

    def _check_blocks(self) -> None:
        """Raise ValueError for shards that cannot hold what they claim: readers allocate by these numbers."""
        if min(self.block_size, self.samples) * max(self.image_bytes, 8) > MOST_BLOCK_BYTES:
            raise ValueError(f"blocks of {self.block_size:,} images of {self.image_bytes:,} bytes")
        for shard in self.shards:
            if len(shard.blocks_crc32) != -(-shard.samples // self.block_size):
                raise ValueError(f"{shard.name}: number of blocks does not fit its {shard.samples} samples")
            if self.store == "tar" and shard.samples * self.image_bytes > shard.bytes:
                raise ValueError(f"{shard.name}: {shard.bytes:,} bytes are too few for its {shard.samples:,} samples")
        if any(shard.samples % self.block_size for shard in self.shards[:-1]):
            raise ValueError("a shard other than the last ends inside a block")

    @property
    def name(self) -> str:
        """Data set and split, for instance `emnist-byclass`."""
        return f"{self.dataset}-{self.variant}" if self.variant else self.dataset

    @property
    def encoded(self) -> bool:
        """Whether the images are files (JPEG, PNG, ...) of differing sizes, image_shape [None, None, C]."""
        return self.image_shape[0] is None

    @property
    def image_bytes(self) -> int:
        """Bytes of one raw image, height x width x channels. Not for encoded images."""
        height, width, channels = self.image_shape
        assert height and width, "encoded images have no one size"
        return height * width * channels

    @property
    def packed_bytes(self) -> int:
        """Bytes of all files of the split together, but for the manifest."""
        return sum(file.bytes for file in self.everything)

    @property
    def everything(self) -> tuple[Shard | RawFile, ...]:
        """All files of the split but the manifest itself, with sizes and hashes."""
        return (*self.shards, *self.files)

    def to_json(self) -> str:
        return json.dumps(self.model_dump(mode="json", by_alias=True), indent=1, ensure_ascii=False) + "\n"

    def digest(self) -> str:
        """SHA-256 (hex) that stands for the content of the split, whichever versions packed it."""
        content = self.model_dump(mode="json", by_alias=True, exclude={"versions"})
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def write(self, directory: Path) -> None:
        write_file(directory / MANIFEST_NAME, self.to_json())

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Read a split's manifest; a missing or damaged one is a `UserError`."""
        try:
            content = (directory / MANIFEST_NAME).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise _missing(directory) from None
        return cls.parse(content, directory / MANIFEST_NAME)

    @classmethod
    def parse(cls, content: bytes, place: object) -> Manifest:
        """A manifest from the content of its file. place: where that is, for the `UserError` about a damaged one."""
        try:
            fields = json.loads(content.decode("utf-8"))
            if isinstance(fields, dict) and fields.get("version", 1) not in (1, 2):
                raise UserError(
                    found=f"{place} of format version {fields['version']}",
                    expected="format version 1 or 2",
                    hint="use the version of Inkstream that packed it, or pack again with --force",
                )
            return cls.model_validate(fields, by_alias=True, by_name=False)
        except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, not a manifest
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
            raise CorruptError(
                found=f"{place}, which is damaged: {reason}",
                expected="the manifest that the packer wrote",
                hint="pack again: python -m pipeline.shard SOURCE --out DIR --force",
            ) from None


def is_packed_dataset(directory: Path) -> bool:
    """Whether a directory holds complete splits (each of `train` and `test` has a manifest)."""
    return all(has_split(directory, split) for split in REQUIRED_SPLITS)


def has_split(directory: Path, split: str) -> bool:
    """Whether a directory holds the named split, complete."""
    return (directory / split / MANIFEST_NAME).is_file()


def _missing(directory: Path) -> NotFoundError:
    if not directory.is_dir():
        return NotFoundError(
            found=f"no such directory: {directory}",
            expected=f"a packed split: a directory with {MANIFEST_NAME} and shards",
            hint="pack a data set first: python -m pipeline.shard emnist (or mnist, or digits)",
        )
    splits = [split for split in SPLITS if has_split(directory, split)]
    inside = sorted(path.parent.parent for path in directory.glob(f"*/train/{MANIFEST_NAME}"))
    if any(directory.glob("*.tar")):
        whole = directory.parent if directory.name in SPLITS else directory
        hint = f"if others wrote these shards, a picture a record: python -m shards.index {whole}; if not, pack again"
    elif splits:
        hint = f"name one split: {directory / splits[0]}"
    elif inside:
        hint = f"name the packed set inside it: {inside[0]}"
    else:
        hint = "pack it again: python -m pipeline.shard SOURCE --out DIR (a pack without manifest is incomplete)"
    return NotFoundError(
        found=f"{directory} without {MANIFEST_NAME}", expected="a directory that holds a complete pack", hint=hint
    )
