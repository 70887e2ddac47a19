"""Image files of several sizes and kinds, made in memory."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

# Height and width; from one pixel to more than any target, squares among them.
SIZES = ((5, 7), (28, 28), (40, 90), (96, 131), (1, 1), (64, 63), (16, 16))


def as_array(content: bytes) -> NDArray[np.uint8]:
    """As stores give them: not writable."""
    return np.frombuffer(content, np.uint8)


def smooth(count: int, height: int = 28, width: int = 28, channels: int = 1, seed: int = 0) -> NDArray[np.uint8]:
    """Pictures of random low frequencies, uint8 [count, height, width, channels]."""
    random = np.random.default_rng([seed, count, height])
    rows, columns = (np.cos(np.pi * np.outer(np.arange(side) + 0.5, np.arange(9)) / side) for side in (height, width))
    waves = random.normal(size=(count, channels, 9, 9))
    values = np.einsum("yk,nckl,xl->nyxc", rows, waves, columns)
    values -= values.min(axis=(1, 2, 3), keepdims=True)
    return np.rint(values / values.max(axis=(1, 2, 3), keepdims=True) * 255).astype(np.uint8)


def png(image: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(file, "PNG")
    return file.getvalue()


def turned_exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif
