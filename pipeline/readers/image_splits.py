"""Splits of image files: shape and color are read from the headers, pixels are decoded on demand."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from pipeline.common.process_pool import default_workers, map_in_processes
from pipeline.readers.archives.file_trees import FileTree
from pipeline.readers.archives.files import CorruptFileError, corrupt_as_user_error
from pipeline.readers.archives.zip_tar import open_tree
from pipeline.readers.formats import image as image_format
from pipeline.readers.naming import text_column
from pipeline.readers.raw_dir import RawContent
from pipeline.readers.raw_split import RawSplit, SourceOptions, UnreadableImages
from pipeline.transforms.build import has_dali
from shards.errors import UserError, printable, quote
from shards.manifest import RawFile

T = TypeVar("T")

# Files that are given in place of the directory or archive of images, and the source that reads them.
_OTHER_FILES = {
    ".npz": "npz",
    ".parquet": "parquet",
    **{f".{extension}": "folder" for extension in ("csv", "tsv", *image_format.EXTENSIONS)},
}

IMAGE_OPTIONS = ("size", "fit", "color", "encoded")  # the fields of `SourceOptions` that `image_splits` uses
TABLE_OPTIONS = (*IMAGE_OPTIONS, "image_column", "label_column")  # if a table lists the images
_CHUNK = 256  # headers that a process reads at a time
_UNKNOWN = 0  # height and width of an image whose header cannot be read
_HEADER = np.dtype([("height", "i4"), ("width", "i4"), ("gray", "?"), ("bytes", "i8"), ("sha256", "u1", 32)])


@dataclass(frozen=True)
class ImageSplit:
    """The image files of one split.

    Attributes:
        name: `train`, `test` or `val`.
        labels: int64 [N].
        read: Returns the bytes of image 0 .. N-1, or raises `CorruptFileError`. Several threads and processes call it.
        path_of: Returns the path of an image, for messages.
        files: The files from which the images are read, with hashes.
        hashed_as: If the images are loose files, the name of one more `RawFile` that stands for all of them: its size
            is the sum of their sizes, its SHA-256 that of the lines that sha256sum prints for them, in order.
        names: The names of loose files, as sha256sum prints them.
        columns: See `RawSplit`.
    """

    name: str
    labels: NDArray[np.int64]
    read: Callable[[int], bytes]
    path_of: Callable[[int], str]
    files: tuple[RawFile, ...] = ()
    hashed_as: str = ""
    names: Sequence[str] = ()
    columns: Mapping[str, NDArray[np.str_]] = field(default_factory=dict)


def open_tree_of_images(options: SourceOptions) -> FileTree:
    """Open a directory or archive of images.

    Raises:
        UserError: If it does not exist or is damaged.
    """
    path = options.raw
    if not path.exists():
        raise UserError(
            found=f"no such file or directory: {path}",
            expected="a directory, or a zip or tar archive, of images",
            hint="name it with --raw",
        )
    if path.is_file() and (source := _OTHER_FILES.get(path.suffix.lower())):
        raise UserError(
            found=f"{path}, a {path.suffix} file",
            expected="a directory, or a zip or tar archive, of images",
            hint=f"--raw {quote(path.parent)}"
            if source == "folder"
            else f"python -m pipeline.shard {source} --raw {quote(path)}",
        )
    with corrupt_as_user_error(
        path,
        expected="images in a directory, a zip, or a tar (uncompressed, or by gzip, bzip2 or xz)",
        hint="get the archive again, or unpack it and name the directory with --raw",
    ):
        return open_tree(path, options.out)


def split_of_tree(
    tree: FileTree,
    split: str,
    labels: NDArray[np.int64],
    names: Sequence[str],
    tables: Sequence[str],
    columns: Mapping[str, Sequence[str]],
) -> ImageSplit:
    """Return the split of some images in a tree.

    Args:
        tree: The directory or archive.
        split: The name of the split.
        labels: int64 [N].
        names: The names of the images in the tree, N.
        tables: The tables in the tree that list the images.
        columns: Further columns than `path`, N values each.
    """
    archive = tree.records
    return ImageSplit(
        name=split,
        labels=labels,
        read=lambda number: tree.read(names[number]),
        path_of=lambda number: tree.path_of(names[number]),
        files=archive
        or tuple(RawContent(printable(name), tree.path_of(name), tree.read(name)).record() for name in tables),
        hashed_as="" if archive else f"pictures of {tree.path.name}",
        names=names,
        columns={name: text_column(values) for name, values in {"path": names, **columns}.items()},
    )


def image_splits(
    splits: Sequence[ImageSplit], classes: tuple[str, ...], options: SourceOptions
) -> tuple[RawSplit, ...]:
    """Return splits of images of one shape, or of encoded images.

    The shape is `options.size` and `options.color`, or the common shape of the images according to their headers. An
    image whose header cannot be read is reported by `RawSplit.read`.

    Raises:
        UserError: If the images have different sizes and `options` has none.
    """
    if options.encoded and options.size:
        raise UserError(
            found=f"--size {options.size[0]}x{options.size[1]} with --store records",
            expected="one of the two: records keep the files as they are",
            hint="omit --size or --store",
        )
    for split in splits:
        if not len(split.labels):
            raise UserError(
                found=f"no image in the {split.name} split", expected="at least one", hint="check the raw files"
            )
    detect_color = options.color == "auto"
    detect_size = options.size is None and not options.encoded
    headers = [_read_headers(split, detect_color or detect_size) for split in splits]
    channels = _channels(headers) if detect_color else {"gray": 1, "rgb": 3}[options.color]
    size = _size(splits, headers) if detect_size else options.size
    result = []
    for split, headers_of_split in zip(splits, headers, strict=True):
        shape: tuple[Any, Any, int]
        read: Callable[..., Any]
        if options.encoded:
            shape, read = (None, None, channels), partial(_decode_each, split, decode=image_format.make_record)
        else:
            assert size is not None
            shape = (*size, channels)
            read = partial(_read_pixels, split, shape, options.fit if options.size else None)
        files = (*split.files, *_hash_of_all(split, headers_of_split))
        result.append(RawSplit(split.name, classes, split.labels, shape, False, read, files, columns=split.columns))
    return tuple(result)


def _read_pixels(
    split: ImageSplit, shape: tuple[int, int, int], fit: str | None, numbers: NDArray[np.int64]
) -> NDArray[np.uint8]:
    """Decode images. fit: how they are resized; None if they have the shape."""
    height, width, channels = shape

    def decode(content: bytes) -> NDArray[np.uint8]:
        image = image_format.decode(content, channels, (height, width) if fit else None, fit or "")
        if image.shape != shape:
            raise CorruptFileError(
                f"of {image.shape[0]} x {image.shape[1]} pixels, where others have {height} x {width}"
            )
        return image

    return np.array(_decode_each(split, numbers, decode), np.uint8).reshape(-1, *shape)


def _decode_each(split: ImageSplit, numbers: NDArray[np.int64], decode: Callable[[bytes], T]) -> list[T]:
    """Decode images; raise `UnreadableImages` for all corrupt ones."""
    images, unreadable = [], {}
    for number in numbers.tolist():
        try:
            images.append(decode(split.read(number)))
        except CorruptFileError as error:
            unreadable[number] = f"{split.path_of(number)}: {error}"
    if unreadable:
        raise UnreadableImages(unreadable)
    return images


def _read_headers(split: ImageSplit, has_to_parse: bool) -> NDArray | None:
    """Read the headers, and hash the files if required, of all images; `_HEADER` [N], None if nothing is required."""
    if not has_to_parse and not split.hashed_as:
        return None
    count = len(split.labels)
    chunks = [range(start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK)]

    def read_chunk(chunk: int) -> NDArray:
        headers = np.zeros(len(chunks[chunk]), _HEADER)
        for header, number in zip(headers, chunks[chunk], strict=True):
            try:
                content = split.read(number)
                header["bytes"] = len(content)
                if split.hashed_as:
                    header["sha256"] = np.frombuffer(hashlib.sha256(content).digest(), np.uint8)
                if has_to_parse:
                    found = image_format.header(content)
                    header["height"], header["width"], header["gray"] = found.height, found.width, found.gray
            except CorruptFileError:
                pass  # reported when the pixels are read
        return headers

    title = f"reading headers of {split.name}"
    with tqdm(total=count, desc=title, unit=" images", unit_scale=True, disable=None, leave=False) as bar:
        return np.concatenate(map_in_processes(read_chunk, list(map(len, chunks)), default_workers(), bar))


def _channels(headers: Sequence[NDArray | None]) -> int:
    """1 if all images are gray according to their headers, else 3."""
    known = [each["gray"][each["height"] != _UNKNOWN] for each in headers if each is not None]
    return 1 if all(gray.all() for gray in known) else 3


def _size(splits: Sequence[ImageSplit], headers: Sequence[NDArray | None]) -> tuple[int, int]:
    """Height and width of all images; raises `UserError`, which names two images, if they differ."""
    sizes: dict[tuple[int, int], str] = {}
    for split, each in zip(splits, headers, strict=True):
        assert each is not None
        known = np.flatnonzero(each["height"] != _UNKNOWN)
        heights, widths = each["height"].astype(np.int64), each["width"].astype(np.int64)
        _, firsts = np.unique((heights << 32 | widths)[known], return_index=True)
        for number in known[np.sort(firsts)].tolist():
            sizes.setdefault((int(heights[number]), int(widths[number])), split.path_of(number))
    if len(sizes) > 1:
        first, second = (f"{path} of {height} x {width} pixels" for (height, width), path in list(sizes.items())[:2])
        raise UserError(
            found=f"images of different sizes: {first}, {second} (height x width)",
            expected="one size, or a size at which they are stored",
            hint="--size 64 (with --fit pad, crop or stretch)"
            + (", or --store records to keep the files as they are" if has_dali() else ""),
        )
    # If no header can be read, the size does not matter: reading reports every image.
    return next(iter(sizes), (1, 1))


def _hash_of_all(split: ImageSplit, headers: NDArray | None) -> tuple[RawFile, ...]:
    if not split.hashed_as:
        return ()
    assert headers is not None
    digest = hashlib.sha256()
    for value, name in zip(headers["sha256"], split.names, strict=True):
        digest.update(f"{value.tobytes().hex()}  {printable(name)}\n".encode())
    return (RawFile(name=split.hashed_as, bytes=int(headers["bytes"].sum()), sha256=digest.hexdigest()),)
