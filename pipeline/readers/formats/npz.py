"""Arrays in npz archives, as `numpy.savez` writes them, of any size; never a pickled object.

The format of a member: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
"""

from __future__ import annotations

import io
import math
from pathlib import Path
from tokenize import TokenError

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

from pipeline.readers.archives.files import CorruptFileError
from pipeline.readers.archives.zip_tar import ZipTree
from shards.errors import UserError, first_line

_ENDING = ".npy"
_MOST_HEADER = 1 << 14  # bytes; numpy itself takes no header beyond 10,000
_KINDS = "buifUS"  # truth values, integers, floats, texts


class NpzFile:
    """An npz archive. names: of its arrays. Raises `UserError` if it is damaged, or no npz."""

    def __init__(self, place: Path) -> None:
        self.place = place
        try:
            self._tree = ZipTree(place)
        except CorruptFileError as error:
            raise self._bad(str(place), str(error)) from None
        self.names = [name.removesuffix(_ENDING) for name in self._tree.names if name.endswith(_ENDING)]
        self.records = self._tree.records

    def place_of(self, name: str) -> str:
        return f"{self.place}:{name}"

    def array(self, name: str) -> NDArray:
        """An array, read-only, and read from a temporary file as it is used.

        Its header is held against the size of the member before anything of the array's size is made. Raises
        `UserError` for a damaged one, and for one of Python objects, which are code.
        """
        place = self.place_of(name)
        try:
            file = self._tree.unpack(name + _ENDING)
            head = io.BytesIO(file.read(0, min(file.size, _MOST_HEADER)))
            shape, fortran_order, dtype = _read_header(head)
            if dtype.kind not in _KINDS:
                raise CorruptFileError(
                    f"it holds {'pickled objects' if dtype.hasobject else dtype}, not numbers or texts"
                )
            if any(side < 0 for side in shape):
                raise CorruptFileError(f"its header says a shape of {list(shape)}")
            claimed = head.tell() + math.prod(shape) * dtype.itemsize
            if claimed != file.size:
                raise CorruptFileError(
                    f"its header says {list(shape)} of {dtype}, {claimed:,} bytes, where it has {file.size:,}"
                )
        except CorruptFileError as error:
            raise self._bad(place, str(error)) from None
        order = "F" if fortran_order else "C"
        return np.ndarray(shape, dtype, file.mapped(0, file.size), head.tell(), order=order)

    def _bad(self, place: str, what: str) -> UserError:
        return UserError(
            found=f"{place}: {what}",
            expected="a whole npz file of number and text arrays, as numpy.savez writes it",
            hint="save it again: np.savez(NAME, x_train=..., y_train=..., x_test=..., y_test=...)",
        )


def _read_header(head: io.BytesIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, order and type of an array; the position is behind the header then. Raises `CorruptFileError`."""
    readers = {(1, 0): npy_format.read_array_header_1_0, (2, 0): npy_format.read_array_header_2_0}
    try:
        version = npy_format.read_magic(head)
        if version not in readers:
            raise ValueError(f"version {version} of the format, not 1.0 or 2.0")
        return readers[version](head)
    # The header is a Python literal: parsing it may fail in all the ways in which parsing Python fails.
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError, EOFError, TokenError) as error:
        raise CorruptFileError(f"it is no array of numpy: {first_line(error)}") from None
