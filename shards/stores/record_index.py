"""What a record of one picture consists of, and the index that says where in its shard each component lies."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shards.errors import UserError
from shards.manifest import RawFile, Shard
from shards.stores.base import INDEX_VERSION
from shards.stores.image_header import EXTENSIONS, MAX_BYTES
from shards.stores.tar_members import Member, read_members

LABELS = ("cls", "cls.txt")
ROW = "row"
_MOST_TEXT = 32  # bytes of a label or row, blanks around it included
_NUMBER = re.compile(rb"(?=.{1,32}\Z)[ \t\r\n]*[0-9]{1,18}[ \t\r\n]*", re.DOTALL)  # fits in 64 bits
_NAME = re.compile(r"((?:.*/|)[^./]+)\.([^/]+)", re.DOTALL)
_META = re.compile(r"__[^/]*__($|/)")
_UNFIT_FOR_INDEX = re.compile(r"[^!-$&-~]")  # blanks, which divide an index, whatever is not ASCII, and the escape


def split_name(name: str) -> tuple[str, str] | None:
    """Key of the record and component, as webdataset divides a name; None for files that belong to no record.

    The component is what follows the first dot of the base name, in small letters.
    """
    match = _NAME.fullmatch(name)
    return (match[1], match[2].lower()) if match and not _META.match(name) else None


def read_records(path: Path) -> Iterator[tuple[str, dict[str, Member]]]:
    """Key and components of each record of a shard, as webdataset groups its members: those in a row of one key.

    Raises `UserError` for a damaged shard (see `read_members`) and for a key or a component that comes again.
    """
    keys: set[str] = set()
    key, components = "", dict[str, Member]()
    for member in read_members(path):
        divided = split_name(member.name)
        if divided is None:
            continue
        if divided[0] != key:
            if components:
                yield key, components
            key, components = divided[0], {}
            if key in keys:
                raise bad_record(path, key, "comes again after other records")
            keys.add(key)
        if divided[1] in components:
            raise bad_record(path, member.name, "comes twice")
        components[divided[1]] = member
    if components:
        yield key, components


def bad_record(path: Path, name: str, fault: str) -> UserError:
    """The message about a record, or a file of it, that cannot be trained on."""
    return UserError(
        found=f"{path}: {name!r} {fault}",
        expected=f"under each key one picture ({', '.join(EXTENSIONS)}) and its class, a number from 0 on (cls)",
        hint="write the shard again without that record, or leave the shard out",
    )


class Choice(NamedTuple):
    """Which of a record's components are its picture, its label and its row (None if it has none), by number."""

    picture: int
    label: int
    row: int | None


@lru_cache(maxsize=256)
def choose(components: tuple[str, ...]) -> Choice:
    """Find the picture, the label and the row among a record's components; ValueError if that cannot be done.

    A picture is a component with a picture's extension; one that is nothing else (`jpg`) comes before those with
    several dots (`mask.png`).
    """
    components = tuple(map(str.lower, components))  # wds2idx keeps capitals
    pictures = [name for name in components if name.rpartition(".")[2] in EXTENSIONS]
    pictures = [name for name in pictures if "." not in name] or pictures
    labels = [name for name in LABELS if name in components]
    there = " and ".join(components)[:200]
    if not pictures:
        raise ValueError(f"no picture ({', '.join(EXTENSIONS)}) but {there}")
    if len(pictures) > 1:
        raise ValueError(f"several pictures ({' and '.join(pictures)})")
    if not labels:
        raise ValueError(f"no label ({' or '.join(LABELS)}) but {there}")
    row = components.index(ROW) if ROW in components else None
    return Choice(components.index(pictures[0]), components.index(labels[0]), row)


def index_line(components: Mapping[str, Member]) -> str:
    """A record's line in an index. Blanks and the like in names are escaped as in addresses."""
    return " ".join(
        f"{_escaped(component)} {member.offset} {member.size} {_escaped(member.name)}"
        for component, member in components.items()
    )


def _escaped(name: str) -> str:
    return _UNFIT_FOR_INDEX.sub(lambda match: "".join(f"%{byte:02X}" for byte in match[0].encode()), name)


def index_content(lines: list[str]) -> bytes:
    """The whole index, from a line for each record."""
    return "\n".join([f"{INDEX_VERSION} {len(lines)}", *lines, ""]).encode("ascii")


class Places(NamedTuple):
    """Where the components of each record of a shard lie: int64 [n, 2], byte offset and size."""

    pictures: NDArray[np.int64]
    labels: NDArray[np.int64]
    rows: NDArray[np.int64] | None

    def check_within(self, size: int) -> None:
        """ValueError if a component is empty or reaches out of a file of `size` bytes, or if a picture is too large."""
        if self.pictures[:, 1].max() > MAX_BYTES:
            raise ValueError(f"a picture of {self.pictures[:, 1].max():,} bytes, more than {MAX_BYTES:,}")
        for places in self:
            if places is None:
                continue
            offsets, sizes = places.T
            if offsets.min() < 0 or sizes.min() < 1 or (offsets > size - sizes).any():
                raise ValueError(f"an empty file, or one outside the {size:,} bytes of the shard")


def read_index(content: bytes, choose: Callable[[tuple[str, ...]], tuple[int | None, ...]]) -> NDArray[np.int64]:
    """Read a `.idx` file: where the chosen components of each record lie in its shard.

    Args:
        content: The whole file.
        choose: Positions of the wanted components among those of a record, None for one that it lacks.

    Returns:
        Byte offsets and sizes, int64 [records, components, 2].

    Raises:
        ValueError: If it is no index, if `choose` raises it, or if records differ in which components they have.
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
        chosen = [position for position in choose(tuple(words[::4])) if position is not None]
        if len(chosen) != columns and flat:
            raise ValueError("some records with a row, some without")
        columns = len(chosen)
        for position in chosen:
            flat += map(int, words[4 * position + 1 : 4 * position + 3])
    try:
        return np.array(flat, np.int64).reshape(len(lines), columns, 2)
    except OverflowError:
        raise ValueError("a number of more than 64 bits") from None


def read_places(content: bytes) -> Places:
    """Read the index of records; ValueError if it is none, or if one of its records has no picture or no label."""
    table = read_index(content, choose)
    return Places(table[:, 0], table[:, 1], table[:, 2] if table.shape[1] > 2 else None)


def same_places(one: bytes, other: bytes) -> bool:
    """Whether two indexes say the same of pictures, labels and rows; False if one of them is no index."""
    try:
        return all(map(np.array_equal, read_places(one), read_places(other)))
    except ValueError:
        return False


def name_in_index(content: bytes, record: int) -> str:
    """The name of a record's picture in an index that `read_places` accepts; record: counted from 0."""
    words = content.decode("ascii").split("\n", record + 2)[record + 1].split(" ")
    return words[4 * choose(tuple(words[::4])).picture + 3]


class NotANumber(Exception):
    """record: the one, counted from 0, whose label or row is no decimal number."""

    def __init__(self, record: int, text: bytes) -> None:
        super().__init__(record, text)
        self.record = record
        self.text = text


def parse_number(text: bytes) -> int:
    """A decimal number of 0 or more, perhaps between blanks; ValueError if it is none."""
    if not _NUMBER.fullmatch(text):
        raise ValueError(f"{text[:20]!r} and no number")
    return int(text)


def read_numbers(data: NDArray[np.uint8], places: NDArray[np.int64]) -> NDArray[np.int64]:
    """The decimal numbers at places (offset, size) of a file: int64 [n].

    data: uint8, all bytes of the file. Raises `NotANumber` for the first place where there is none.
    """
    values = np.empty(len(places), np.int64)
    for record, (offset, size) in enumerate(places.tolist()):
        text = data[offset : offset + min(size, _MOST_TEXT + 1)].tobytes()
        try:
            values[record] = parse_number(text)
        except ValueError:
            raise NotANumber(record, text[:_MOST_TEXT]) from None
    return values


def index_file(shard: Shard, content: bytes) -> RawFile:
    """What the manifest says of a shard's index."""
    return RawFile(name=index_name(shard), bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def index_name(shard: Shard) -> str:
    """File name of a shard's index."""
    return Path(shard.name).with_suffix(".idx").as_posix()
