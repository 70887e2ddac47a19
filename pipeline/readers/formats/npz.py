"""Arrays in npz archives, as `numpy.savez` writes them, of any size; never a pickled object.

The format of a member: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
"""

from __future__ import annotations

import io
import math
from contextlib import AbstractContextManager
from pathlib import Path
from tokenize import TokenError
from typing import IO, Literal

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

from pipeline.readers.archives.files import CorruptFileError, corrupt_as_user_error
from pipeline.readers.archives.zip_tar import ZipTree
from shards.errors import first_line
from shards.manifest import RawFile

_ENDING = ".npy"
_MAX_HEADER = 1 << 14  # bytes; numpy itself reads no header beyond 10,000
_KINDS = "buifUS"  # booleans, integers, floats, texts


class NpzFile:
    """An npz archive.

    Attributes:
        path: The archive.
        names: The names of its arrays.

    Raises:
        UserError: If it is damaged or not an npz file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._errors(str(path)):
            self._tree = ZipTree(path)
        self.names = [name.removesuffix(_ENDING) for name in self._tree.names if name.endswith(_ENDING)]

    @property
    def records(self) -> tuple[RawFile, ...]:
        """The file with its hash."""
        return self._tree.records

    def path_of(self, name: str) -> str:
        """Return the path of an array, for messages."""
        return f"{self.path}:{name}"

    def array(self, name: str) -> NDArray:
        """Return an array, read-only and mapped from a temporary file.

        Its header is compared with the size of the member before memory is reserved.

        Raises:
            UserError: If the array is damaged, or holds Python objects, which are code.
        """
        with self._errors(self.path_of(name)):
            file = self._tree.unpack(name + _ENDING)
            head = io.BytesIO(file.read(0, min(file.size, _MAX_HEADER)))
            shape, fortran_order, dtype = read_header(head)
            if dtype.kind not in _KINDS:
                content = "pickled objects" if dtype.hasobject else dtype
                raise CorruptFileError(f"it holds {content}, not numbers or texts")
            if any(side < 0 for side in shape):
                raise CorruptFileError(f"its header says a shape of {list(shape)}")
            size = head.tell() + math.prod(shape) * dtype.itemsize
            if size != file.size:
                raise CorruptFileError(
                    f"its header says {list(shape)} of {dtype}, {size:,} bytes, where it has {file.size:,}"
                )
        order: Literal["C", "F"] = "F" if fortran_order else "C"
        return np.ndarray(shape, dtype, file.mapped(), head.tell(), order=order)

    def _errors(self, path: str) -> AbstractContextManager[None]:
        return corrupt_as_user_error(
            path,
            expected="a complete npz file of number and text arrays, as numpy.savez writes it",
            hint="save it again: np.savez(NAME, x_train=..., y_train=..., x_test=..., y_test=...)",
        )


def read_header(head: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Return shape, Fortran order and type of an array in npy format; the position is then behind the header.

    Raises:
        CorruptFileError: If it is no such array.
    """
    readers = {(1, 0): npy_format.read_array_header_1_0, (2, 0): npy_format.read_array_header_2_0}
    try:
        version = npy_format.read_magic(head)
        if version not in readers:
            raise ValueError(f"version {version} of the format, not 1.0 or 2.0")
        return readers[version](head)
    # The header is a Python literal: parsing it may fail in all the ways in which parsing Python fails.
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError, EOFError, TokenError) as error:
        raise CorruptFileError(f"it is no array of numpy: {first_line(error)}") from None
