"""Components of a record of one image, and the index with their byte ranges in the shard."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shards.errors import UserError
from shards.manifest import Shard
from shards.stores.base import INDEX_VERSION, read_at
from shards.stores.image_header import EXTENSIONS, MAX_BYTES
from shards.stores.tar_members import Member, read_members

LABELS = ("cls", "cls.txt")
ROW = "row"
MAX_NUMBER_BYTES = 32  # bytes of a label or row, including surrounding blanks
_NUMBER = re.compile(rb"(?=.{1,32}\Z)[ \t\r\n]*[0-9]{1,18}[ \t\r\n]*", re.DOTALL)  # fits in 64 bits
_NAME = re.compile(r"((?:.*/|)[^./]+)\.([^/]+)", re.DOTALL)
_META = re.compile(r"__[^/]*__($|/)")
_ESCAPED = re.compile(r"[^!-$&-~]")  # blanks (the separator of an index), non-ASCII characters, and %


def split_name(name: str) -> tuple[str, str] | None:
    """Split a file name into record key and component, as webdataset does; None for files that belong to no record.

    The component is the base name after the first dot, in lower case.
    """
    match = _NAME.fullmatch(name)
    return (match[1], match[2].lower()) if match and not _META.match(name) else None


def read_records(path: Path) -> Iterator[tuple[str, dict[str, Member]]]:
    """Yield key and components of each record of a shard. As in webdataset, consecutive members of a key are a record.

    Raises:
        UserError: If the shard is damaged (see `read_members`), or a key or a component occurs again.
    """
    keys: set[str] = set()
    key, components = "", dict[str, Member]()
    for member in read_members(path):
        split = split_name(member.name)
        if split is None:
            continue
        if split[0] != key:
            if components:
                yield key, components
            key, components = split[0], {}
            if key in keys:
                raise bad_record(path, f"{key!r} comes again after other records")
            keys.add(key)
        if split[1] in components:
            raise bad_record(path, f"{member.name!r} comes twice")
        components[split[1]] = member
    if components:
        yield key, components


def bad_record(path: Path, fault: object) -> UserError:
    """Return the error for a record that cannot be used for training. `fault` names it, or a file of it."""
    hint = "write the shard again without that record, or remove the shard"
    if "has no label" in str(fault) or "no number" in str(fault):
        hint = (
            "write the class number of every record as a component cls (labels in json, txt and others are not read), "
            "or unpack the images into one directory per class and pack them: python -m pipeline.shard folder --raw DIR"
        )
    return UserError(
        found=f"{path}: {fault}",
        expected=f"one picture ({', '.join(EXTENSIONS)}) and its class, an integer from 0 (cls), per key",
        hint=hint,
    )


class RecordComponents(NamedTuple):
    """Positions of the image, the label and the row (None if absent) among the components of a record."""

    image: int
    label: int
    row: int | None


@lru_cache(maxsize=256)
def find_components(components: tuple[str, ...]) -> RecordComponents:
    """Find the image, the label and the row among the components of a record.

    An image is a component with the extension of an image. A plain extension (`jpg`) has precedence over a component
    with further dots (`mask.png`).

    Raises:
        ValueError: If there is no image, no label, or more than one image.
    """
    components = tuple(map(str.lower, components))  # wds2idx keeps capitals
    pictures = [name for name in components if name.rpartition(".")[2] in EXTENSIONS]
    pictures = [name for name in pictures if "." not in name] or pictures
    labels = [name for name in LABELS if name in components]
    listed = " and ".join(components)[:200]
    if not pictures:
        raise ValueError(f"no picture ({', '.join(EXTENSIONS)}) but {listed}")
    if len(pictures) > 1:
        raise ValueError(f"several pictures ({' and '.join(pictures)})")
    if not labels:
        raise ValueError(f"no label ({' or '.join(LABELS)}) but {listed}")
    row = components.index(ROW) if ROW in components else None
    return RecordComponents(components.index(pictures[0]), components.index(labels[0]), row)


def index_line(components: Mapping[str, Member]) -> str:
    """Return a record's line in an index. Special characters in names are percent-encoded."""
    return " ".join(
        f"{_escaped(component)} {member.offset} {member.size} {_escaped(member.name)}"
        for component, member in components.items()
    )


def _escaped(name: str) -> str:
    return _ESCAPED.sub(lambda match: "".join(f"%{byte:02X}" for byte in match[0].encode()), name)


def index_content(lines: list[str]) -> bytes:
    """Return the content of an index with a line for each record."""
    return "\n".join([f"{INDEX_VERSION} {len(lines)}", *lines, ""]).encode("ascii")


def read_index(content: bytes, find: Callable[[tuple[str, ...]], tuple[int | None, ...]]) -> NDArray[np.int64]:
    """Read the byte ranges of selected components from a `.idx` file.

    Args:
        content: The bytes of the file.
        find: Returns the positions of the selected components among those of a record, None for an absent one.

    Returns:
        Byte offsets and sizes, int64 [records, components, 2].

    Raises:
        ValueError: If it is no index, if `find` raises it, or if records differ in their components.
    """
    first, *lines = content.decode("ascii").split("\n")
    if len(lines) < 2 or first != f"{INDEX_VERSION} {len(lines) - 1}" or lines.pop():
        raise ValueError(f"first line {first[:40]!r} above {len(lines):,} others")
    flat: list[int] = []
    columns = 0
    for line in lines:
        words = line.split(" ")
        if len(words) % 4:
            raise ValueError(f"{len(words)} words in the line {line[:80]!r}")
        selected = [position for position in find(tuple(words[::4])) if position is not None]
        if len(selected) != columns and flat:
            raise ValueError("some records with a row, some without")
        columns = len(selected)
        for position in selected:
            flat += map(int, words[4 * position + 1 : 4 * position + 3])
    try:
        return np.array(flat, np.int64).reshape(len(lines), columns, 2)
    except OverflowError:
        raise ValueError("a number of more than 64 bits") from None


def check_within(ranges: NDArray[np.int64], size: int) -> None:
    """Raise ValueError if a byte range of an index, int64 [..., 2], is empty or outside a shard of `size` bytes."""
    offsets, sizes = ranges[..., 0], ranges[..., 1]
    if offsets.min() < 0 or sizes.min() < 1 or (offsets > size - sizes).any():
        raise ValueError(f"an empty file, or one outside the {size:,} bytes of the shard")


def read_component_ranges(content: bytes) -> NDArray[np.int64]:
    """Read the byte offset and size of image, label and (if there is one) row of each record from an index.

    Returns:
        int64 [records, 2 or 3, 2].

    Raises:
        ValueError: If the index is invalid, or a record has no image or no label.
    """
    return read_index(content, find_components)


def is_index_of(path: Path, expected: bytes) -> bool:
    """Whether an index file agrees with another index on the byte ranges of images, labels and rows."""
    with open(path, "rb") as file:
        content = file.read(4 * len(expected))
    try:
        return np.array_equal(read_component_ranges(content), read_component_ranges(expected))
    except ValueError:
        return False


def name_in_index(content: bytes, record: int) -> str:
    """Return the name of the image of record number `record` (from 0) in a valid index."""
    words = content.decode("ascii").split("\n", record + 2)[record + 1].split(" ")
    return words[4 * find_components(tuple(words[::4])).image + 3]


def parse_number(text: bytes) -> int:
    """Parse a decimal integer of 0 or more, blanks around it allowed; raise ValueError if it is invalid."""
    if not _NUMBER.fullmatch(text):
        raise ValueError(f"{text[:20]!r} and no number")
    return int(text)


def parse_record(
    file: BinaryIO, key: str, components: dict[str, Member], classes: int
) -> tuple[Member, int, int | None]:
    """Find the image of a record, and parse its label and its row.

    Args:
        file: The shard.
        key: The key of the record, for messages.
        components: As `read_records` returns them.
        classes: The number of classes.

    Returns:
        The image, the label, and the row (None if there is none).

    Raises:
        ValueError: If the record has no image or no label, or they are invalid. Names the key or the file.
    """
    try:
        found = find_components(tuple(components))
    except ValueError as error:
        raise ValueError(f"{key!r} has {error}") from None
    members = list(components.values())
    image = members[found.image]
    if image.size > MAX_BYTES:
        raise ValueError(f"{image.name!r} is of {image.size:,} bytes, more than {MAX_BYTES:,}")
    label = _read_number(file, members[found.label])
    if label >= classes:
        raise ValueError(f"{members[found.label].name!r} holds {label}, a label outside 0 .. {classes - 1}")
    return image, label, None if found.row is None else _read_number(file, members[found.row])


def _read_number(file: BinaryIO, member: Member) -> int:
    try:
        return parse_number(read_at(file, member.offset, min(member.size, MAX_NUMBER_BYTES + 1)))
    except ValueError as error:
        raise ValueError(f"{member.name!r} holds {error}") from None


def index_name(shard: Shard) -> str:
    """Return the file name of a shard's index."""
    return Path(shard.name).with_suffix(".idx").as_posix()
