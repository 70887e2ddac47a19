"""Parts made of picture files: shape and color found from the headers, pixels decoded when they are asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from pipeline.common.process_pool import Advance, default_workers, map_in_processes
from pipeline.readers.archives.file_trees import FileTree
from pipeline.readers.archives.files import CorruptFileError
from pipeline.readers.archives.zip_tar import open_tree
from pipeline.readers.formats import image as pictures
from pipeline.readers.naming import printable, text_column
from pipeline.readers.raw_dir import RawContent
from pipeline.readers.raw_split import RawSplit, SourceOptions, UnreadableImages
from shards.errors import UserError
from shards.manifest import RawFile
from shards.stores.base import EncodedImage

IMAGE_OPTIONS = ("size", "fit", "color", "encoded")  # of a `SourceOptions`, heeded by `image_splits`
TABLE_OPTIONS = (*IMAGE_OPTIONS, "image_column", "label_column")  # where a table lists the pictures
_LOOK = 256  # pictures looked at by a process at a time
_UNKNOWN = 0  # height and width of a picture whose header cannot be read


@dataclass(frozen=True)
class ImageSplit:
    """The picture files of one part.

    labels: int64 [N]. content: the bytes of picture 0 .. N-1; raises `CorruptFileError`; for any thread and process.
    place: where it lies. files: what the pictures were read from; hashed_as: the name of one more file, which stands
    for all of the pictures, where they lie loose: its bytes are theirs together, its SHA-256 that of the lines
    that sha256sum prints for the pictures by these names, in order.
    columns: as of a `RawSplit`.
    """

    name: str
    labels: NDArray[np.int64]
    content: Callable[[int], bytes]
    place: Callable[[int], str]
    files: tuple[RawFile, ...] = ()
    hashed_as: str = ""
    names: Sequence[str] = ()
    columns: Mapping[str, NDArray[np.str_]] = field(default_factory=dict)


class _Looks(NamedTuple):
    """What is known of n pictures: heights, widths int32 [n], gray bool [n], bytes int64 [n], digests [n]."""

    heights: NDArray[np.int32]
    widths: NDArray[np.int32]
    gray: NDArray[np.bool_]
    bytes: NDArray[np.int64]
    digests: list[bytes]


def open_tree_of_images(place: Path) -> FileTree:
    """A directory or archive of pictures; raises `UserError`."""
    if not place.exists():
        raise UserError(
            found=f"no {place}",
            expected="a directory, or a zip or tar archive, of pictures",
            hint="name it with --raw",
        )
    try:
        return open_tree(place)
    except CorruptFileError as error:
        raise UserError(
            found=f"{place}: {error}",
            expected="pictures in a directory, a zip, or a tar (not compressed, or by gzip, bzip2 or xz)",
            hint="get the archive again, or unpack it yourself and name the directory with --raw",
        ) from None


def split_of_tree(
    tree: FileTree,
    part: str,
    labels: NDArray[np.int64],
    names: Sequence[str],
    tables: Sequence[str],
    columns: Mapping[str, Sequence[str]] | None = None,
) -> ImageSplit:
    """The pictures of these names in a tree, told by these tables in it; columns: further ones than `path`."""
    whole = tree.records()
    return ImageSplit(
        name=part,
        labels=labels,
        content=lambda number: tree.read(names[number]),
        place=lambda number: tree.place_of(names[number]),
        files=whole or tuple(RawContent(name, tree.place_of(name), tree.read(name)).record() for name in tables),
        hashed_as="" if whole else f"pictures of {tree.place.name}",
        names=names,
        columns={name: text_column(values) for name, values in {"path": names, **(columns or {})}.items()},
    )


def image_splits(sets: Sequence[ImageSplit], classes: tuple[str, ...], options: SourceOptions) -> tuple[RawSplit, ...]:
    """Parts of pictures, all of one shape: that of `options.size`, or the one they all have; or of encoded images.

    Headers are read by all cores, as far as the request leaves something to be found. A picture whose header cannot
    be read is left for `RawSplit.read` to report. Raises `UserError` if the pictures differ and no size is given.
    """
    if options.encoded and options.size:
        raise UserError(
            found=f"--size {options.size[0]}x{options.size[1]} with --store records",
            expected="one of the two: records keep the files as they are",
            hint="leave --size or --store out",
        )
    for one in sets:
        if not len(one.labels):
            raise UserError(
                found=f"no picture in the {one.name} part", expected="at least one", hint="look into the raw files"
            )
    find_color = options.color == "auto"
    find_size = options.size is None and not options.encoded
    looks = [_look_at(one, find_color or find_size) for one in sets]
    channels = {"gray": 1, "rgb": 3}.get(options.color) or _channels(looks)
    size = _size(sets, looks) if find_size else options.size
    parts = []
    for one, look in zip(sets, looks, strict=True):
        if options.encoded:
            shape, read = (None, None, channels), partial(_read_records, one)
        else:
            assert size is not None
            shape = (*size, channels)
            read = partial(_read_pixels, one, shape, options.fit if options.size else None)
        files = (*one.files, _combined(one, look)) if one.hashed_as else one.files
        parts.append(RawSplit(one.name, classes, one.labels, shape, False, read, files, columns=one.columns))
    return tuple(parts)


def _read_pixels(
    one: ImageSplit, shape: tuple[int, int, int], fit: str | None, rows: NDArray[np.int64]
) -> NDArray[np.uint8]:
    """fit: how pictures are brought to the shape; None if they have it."""
    images = np.empty((len(rows), *shape), np.uint8)
    height, width, channels = shape

    def read(content: bytes, position: int) -> None:
        image = pictures.decode(content, channels, (height, width) if fit else None, fit or "")
        if image.shape != shape:
            raise CorruptFileError(
                f"of {image.shape[0]} x {image.shape[1]} pixels, where others have {height} x {width}"
            )
        images[position] = image

    _for_each(one, rows, read)
    return images


def _read_records(one: ImageSplit, rows: NDArray[np.int64]) -> list[EncodedImage]:
    images: list[EncodedImage] = []

    def read(content: bytes, _: int) -> None:
        images.append(EncodedImage(content, pictures.check_record(content)))

    _for_each(one, rows, read)
    return images


def _for_each(one: ImageSplit, rows: NDArray[np.int64], read: Callable[[bytes, int], None]) -> None:
    """Give `read` the content of every row, and its position in rows; raises `UnreadableImages` for the bad ones."""
    unreadable = {}
    for position, row in enumerate(rows.tolist()):
        try:
            read(one.content(row), position)
        except CorruptFileError as error:
            unreadable[row] = f"{one.place(row)}: {error}"
    if unreadable:
        raise UnreadableImages(unreadable)


def _look_at(one: ImageSplit, headers: bool) -> _Looks | None:
    """Read the headers, or the whole files where they are hashed, of all pictures of a part."""
    if not headers and not one.hashed_as:
        return None
    count = len(one.labels)

    def look(chunk: int, advance: Advance) -> _Looks:
        numbers = range(chunk * _LOOK, min((chunk + 1) * _LOOK, count))
        seen = _Looks(*(np.zeros(len(numbers), kind) for kind in (np.int32, np.int32, bool, np.int64)), [])
        for place, number in enumerate(numbers):
            digest = b""
            try:
                content = one.content(number)
                seen.bytes[place] = len(content)
                digest = hashlib.sha256(content).digest() if one.hashed_as else b""
                if headers:
                    header = pictures.header(content)
                    seen.heights[place], seen.widths[place] = header.height, header.width
                    seen.gray[place] = header.gray
            except CorruptFileError:
                pass  # it is reported when its pixels are asked for
            seen.digests.append(digest)
        advance(len(numbers))
        return seen

    bar = tqdm(total=count, desc=f"looking at {one.name}", unit=" images", unit_scale=True, disable=None, leave=False)
    with bar:
        looks = map_in_processes(look, range(-(-count // _LOOK)), default_workers(), bar)
    arrays = [np.concatenate(values) for values in list(zip(*looks, strict=True))[:-1]]
    return _Looks(*arrays, [digest for seen in looks for digest in seen.digests])


def _channels(looks: Sequence[_Looks | None]) -> int:
    """1 if all pictures are gray by their headers, else 3."""
    known = [look.gray[look.heights != _UNKNOWN] for look in looks if look is not None]
    return 1 if all(gray.all() for gray in known) else 3


def _size(sets: Sequence[ImageSplit], looks: Sequence[_Looks | None]) -> tuple[int, int]:
    """Height and width of all pictures; raises `UserError`, naming two, if they differ."""
    first: tuple[int, int] | None = None
    first_named = ""
    for one, look in zip(sets, looks, strict=True):
        assert look is not None
        known = np.flatnonzero(look.heights != _UNKNOWN)
        if not len(known):
            continue
        if first is None:
            first = int(look.heights[known[0]]), int(look.widths[known[0]])
            first_named = f"{one.place(int(known[0]))} of {first[0]} x {first[1]} pixels"
        others = known[(look.heights[known] != first[0]) | (look.widths[known] != first[1])]
        if len(others):
            other = int(others[0])
            raise UserError(
                found=f"pictures of differing sizes: {first_named}, {one.place(other)} of {look.heights[other]} x "
                f"{look.widths[other]} (height x width)",
                expected="one size, or a size to store them at",
                hint="--size 64 (with --fit pad, crop or stretch), or --store records to keep the files as they are",
            )
    # Where no header at all can be read any size will do: reading will name every picture.
    return first or (1, 1)


def _combined(one: ImageSplit, look: _Looks | None) -> RawFile:
    assert look is not None
    digest = hashlib.sha256()
    for value, name in zip(look.digests, one.names, strict=True):
        digest.update(f"{value.hex()}  {printable(name)}\n".encode())
    return RawFile(name=one.hashed_as, bytes=int(look.bytes.sum()), sha256=digest.hexdigest())
