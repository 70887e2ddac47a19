"""`manifest.json`: what a packed part is, written last, so that where it stands the part is complete."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from shards.atomic import write_file
from shards.errors import UserError

MANIFEST_NAME = "manifest.json"
PARTS = ("train", "test")


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RawFile(_Record):
    """A raw file that the part was packed from: its name, size in bytes and SHA-256 (hex)."""

    name: str
    bytes: int = Field(ge=0)
    sha256: str


class Shard(_Record):
    """A tar file: its size in bytes, SHA-256 (hex), samples, and a CRC-32 for each block record in it."""

    name: str
    samples: int = Field(gt=0)
    bytes: int = Field(gt=0)
    sha256: str
    blocks_crc32: tuple[int, ...]


class Manifest(_Record):
    """A packed part (train or test) of a data set. `FORMAT.md` gives the meaning of every field."""

    format: Literal["inkstream-blocks"] = "inkstream-blocks"
    version: Literal[1] = 1
    dataset: str
    split: str
    part: str
    classes: tuple[str, ...]
    counts: tuple[int, ...]
    image_shape: tuple[PositiveInt, PositiveInt, PositiveInt]
    transposed: bool
    samples: int = Field(gt=0)
    block_size: int = Field(gt=0)
    seed: int
    shards: tuple[Shard, ...]
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
        if len({shard.name for shard in self.shards}) != len(self.shards):
            raise ValueError("a shard is named twice")
        for shard in self.shards:
            if len(shard.blocks_crc32) != -(-shard.samples // self.block_size):
                raise ValueError(f"{shard.name}: number of blocks does not fit its {shard.samples} samples")
        return self

    @property
    def name(self) -> str:
        """Data set and split, for instance `emnist-byclass`."""
        return f"{self.dataset}-{self.split}" if self.split else self.dataset

    @property
    def image_bytes(self) -> int:
        """Bytes of one raw image, height x width x channels."""
        height, width, channels = self.image_shape
        return height * width * channels

    @property
    def packed_bytes(self) -> int:
        """Bytes of all shards together."""
        return sum(shard.bytes for shard in self.shards)

    def to_json(self) -> str:
        return json.dumps(self.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n"

    def digest(self) -> str:
        """SHA-256 (hex) that stands for the content of the part, whichever versions packed it."""
        content = self.model_dump(mode="json", exclude={"versions"})
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def write(self, directory: Path) -> None:
        write_file(directory / MANIFEST_NAME, self.to_json())

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Read a part's manifest; a missing or damaged one is a `UserError`."""
        path = directory / MANIFEST_NAME
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(content, dict) and content.get("version", 1) != 1:
                raise UserError(
                    found=f"{path} of format version {content['version']}",
                    expected="format version 1",
                    hint="use the version of Inkstream that packed it, or pack again with --force",
                )
            return cls.model_validate(content)
        except (FileNotFoundError, NotADirectoryError):
            raise _missing(directory) from None
        except (json.JSONDecodeError, UnicodeDecodeError, ValidationError) as error:
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
            raise UserError(
                found=f"{path}, which is damaged: {reason}",
                expected="the manifest that the packer wrote",
                hint="pack again: python -m pipeline.shard SOURCE --out DIR --force",
            ) from None


def is_packed_set(directory: Path) -> bool:
    """Whether a directory holds complete parts (each of `train` and `test` has a manifest)."""
    return all((directory / part / MANIFEST_NAME).is_file() for part in PARTS)


def _missing(directory: Path) -> UserError:
    if not directory.is_dir():
        return UserError(
            found=f"no directory {directory}",
            expected=f"a packed part: a directory with {MANIFEST_NAME} and shards",
            hint="pack a data set first: python -m pipeline.shard emnist (or mnist, or digits)",
        )
    parts = [part for part in PARTS if (directory / part / MANIFEST_NAME).is_file()]
    inside = sorted(path.parent.parent for path in directory.glob(f"*/train/{MANIFEST_NAME}"))
    if parts:
        hint = f"name one part: {directory / parts[0]}"
    elif inside:
        hint = f"name the packed set inside it: {inside[0]}"
    else:
        hint = "pack it again: python -m pipeline.shard SOURCE --out DIR (a pack without manifest is incomplete)"
    return UserError(
        found=f"{directory} without {MANIFEST_NAME}", expected="a directory that holds a complete pack", hint=hint
    )
