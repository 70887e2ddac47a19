"""What a picture looks like, in few numbers: a miniature, its spectrum, and a perceptual hash of 128 bits.

The hash follows pHash (Zauner 2010, https://phash.org/docs/pubs/thesis_zauner.pdf): the picture in gray
at 32x32, its two-dimensional DCT-II, and the signs of the coefficients of low frequency. Three things differ, so that
it survives small shifts and tells line drawings apart:
- the borders are faded out by a half sine before the transform, so that a shift moves little in or out;
- coefficients come in order of their frequency (not a square of them, without the mean), and as many more of them
  make a second word, for the details;
- they are compared with zero, not with their median, which found as many copies and takes no sorting. So each bit is
  the sign of a projection, and bits differ in proportion to the angle between two spectra (Charikar 2002,
  https://doi.org/10.1145/509907.509965).
All of it is one linear map from the miniature, and one product of matrices for many pictures.
"""

from __future__ import annotations

import hashlib
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.readers.archives.files import BadFile
from pipeline.readers.formats.image import decode
from pipeline.transforms.ops.resize import resize_weights

SIDE = 32  # of a miniature, pixels
WORDS = 2  # of a hash, 64 bits each
UNREADABLE = np.uint64(0)  # digest of a picture that cannot be read
# One pixel of a miniature in each direction: 3 % of its side. The first is no shift.
SHIFTS = tuple((down, right) for down in (0, -1, 1) for right in (0, -1, 1))
_COEFFICIENTS = 256
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601
# A spectrum shorter than this is that of an empty picture: of 28x28 pixels, less than one that differs by 30 levels.
_FLAT = 20.0


class Miniatures(NamedTuple):
    """n pictures in gray: float32 [n, 32, 32], 0 .. 255, and digests uint64 [n] of what they were made from.

    Pictures of equal digests are equal; where a picture cannot be read, its digest is `UNREADABLE`.
    """

    images: NDArray[np.float32]
    digests: NDArray[np.uint64]


def shrink_arrays(images: NDArray[np.uint8], transposed: bool) -> Miniatures:
    """The miniatures of pixels uint8 [n, H, W, C] with C 1 or 3, stretched to a square.

    transposed: their rows and columns are exchanged, which is undone first.
    """
    upright = np.ascontiguousarray(images.swapaxes(1, 2) if transposed else images)
    digests = _digests(upright)
    gray = upright[..., 0].astype(np.float32) if images.shape[3] == 1 else upright @ _LUMA
    height, width = gray.shape[1:]
    down = resize_weights(height, SIDE, "linear").astype(np.float32)
    across = resize_weights(width, SIDE, "linear").astype(np.float32)
    return Miniatures(down @ (gray.reshape(-1, width) @ across.T).reshape(-1, height, SIDE), digests)


def digests_of(images: NDArray[np.uint8], transposed: bool) -> NDArray[np.uint64]:
    """The digests uint64 [n] of pixels, as `shrink_arrays` gives them."""
    return _digests(np.ascontiguousarray(images.swapaxes(1, 2) if transposed else images))


def _digests(upright: NDArray[np.uint8]) -> NDArray[np.uint64]:
    return np.array([_digest(image.data) for image in upright], np.uint64)


def shrink_files(contents: list[bytes]) -> Miniatures:
    """The miniatures of picture files."""
    images = np.zeros((len(contents), SIDE, SIDE), np.float32)
    digests = np.full(len(contents), UNREADABLE)
    for place, content in enumerate(contents):
        try:
            images[place] = decode(content, 1, (SIDE, SIDE), "stretch")[..., 0]
        except BadFile:
            continue
        digests[place] = _digest(content)
    return Miniatures(images, digests)


def _digest(content: bytes | memoryview) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little") or 1


def spectra(images: NDArray[np.float32], shift: tuple[int, int] = (0, 0)) -> NDArray[np.float32]:
    """Directions of the spectra of miniatures [n, 32, 32], moved by `shift` pixels: float32 [n, 256] of length 1.

    Coefficients of the DCT of the picture with faded borders, in order of frequency without the mean, weighted with
    the frequency as in the DCT of its slopes, and with the response of a binomial filter, against noise. So brightness
    and contrast change nothing. A picture without structure has length 0.
    """
    values = images.reshape(len(images), -1) @ _maps()[SHIFTS.index(shift)]
    length = np.linalg.norm(values, axis=1, keepdims=True)
    return np.where(length < _FLAT, 0, values / np.maximum(length, _FLAT))


def hashes(images: NDArray[np.float32], shift: tuple[int, int] = (0, 0)) -> NDArray[np.uint64]:
    """Perceptual hashes uint64 [n, 2] of miniatures [n, 32, 32], moved by `shift` pixels; 0 without structure.

    The first word is of the 64 coefficients of lowest frequency; both are compared by the number of bits that differ.
    """
    low = _maps()[SHIFTS.index(shift)][:, : 64 * WORDS]
    values = images.reshape(len(images), -1) @ low
    words = np.packbits(values > 0, axis=1).view(np.uint64)
    words[np.linalg.norm(values, axis=1) < _FLAT] = 0
    return words


@cache
def _maps() -> list[NDArray[np.float32]]:
    """For each shift the matrix float32 [1024, 256] from a miniature's pixels to its weighted spectrum."""
    steps = np.arange(SIDE)
    cosines = np.cos(np.pi / SIDE * steps[:, None] * (steps + 0.5)) * np.sqrt(2 / SIDE)
    cosines[0] /= np.sqrt(2)
    faded = cosines * np.sin(np.pi / SIDE * (steps + 0.5))
    down, across = np.divmod(np.arange(SIDE * SIDE), SIDE)
    frequency = np.hypot(down, across)
    order = np.lexsort((down, frequency))[1 : _COEFFICIENTS + 1]
    smoothing = (np.cos(np.pi / 2 * down / SIDE) * np.cos(np.pi / 2 * across / SIDE)) ** 2
    maps = []
    for shift_down, shift_right in SHIFTS:
        # Pixels that move in are those of the border.
        rows, columns = (np.clip(steps - shift, 0, SIDE - 1) for shift in (shift_down, shift_right))
        axes = [np.zeros((SIDE, SIDE)), np.zeros((SIDE, SIDE))]
        for axis, sources in zip(axes, (rows, columns), strict=True):
            np.add.at(axis.T, sources, faded.T)
        pixels = np.einsum("ky,kx->kyx", axes[0][down[order]], axes[1][across[order]]).reshape(_COEFFICIENTS, -1)
        pixels *= (frequency * smoothing)[order, None]
        pixels -= pixels.mean(axis=1, keepdims=True)
        maps.append(np.ascontiguousarray(pixels.T, np.float32))
    return maps
