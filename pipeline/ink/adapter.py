"""Bring any picture to the form of the images of a packed set, so that a model can predict it.

Where the set is ink on a plain background (measured on its images), `pipeline.ink.geometry` finds the ink and lays it
as in the set. A picture of the size of the set's images whose ink lies as theirs stays as it is. Pictures for other
sets are brought to their size in the way that the set was packed.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.ink.geometry import InkFrame, NoInkError, find_ink, frame_ink, limit_size
from pipeline.ink.shading import remove_shading
from pipeline.readers.archives.files import CorruptFileError
from pipeline.readers.formats import image as pictures
from shards.stores.base import Store

_MEASURED_IMAGES = 256
_UNCHANGED = "taken as it is"
_FITS = ("pad", "crop", "stretch")


class UnusableImageError(Exception):
    """A picture that cannot be shown to a model: damaged, or without content. The text says why."""


class BlankImageError(UnusableImageError):
    """A complete picture without content."""


class AdaptedImage(NamedTuple):
    """A picture in the form of the set's images.

    Attributes:
        image: uint8 [H, W, C], upright; an image file uint8 [bytes] where the set holds those.
        done: what was done to the picture, in words.
    """

    image: NDArray[np.uint8]
    description: str


@dataclass(frozen=True)
class InputAdapter:
    """Brings pictures to the form of a set's images.

    Attributes:
        image_shape: (H, W, C) of the upright images, (None, None, C) where the set holds image files.
        fit: how pictures get that size, as in `pipeline.readers.formats.image.decode`.
        frame: how ink lies in the images, None if they are not ink.
    """

    image_shape: tuple[int | None, int | None, int]
    fit: str
    frame: InkFrame | None

    @classmethod
    def of(cls, store: Store) -> InputAdapter:
        """The adapter for a packed split, measured on its first images, which are a fair sample."""
        manifest = store.manifest
        height, width, channels = manifest.image_shape
        fit = str(manifest.options.get("fit", "pad"))
        frame = None
        if channels == 1 and not manifest.encoded:
            images = np.asarray(store.read(np.arange(min(len(store), _MEASURED_IMAGES))))[..., 0]
            frame = InkFrame.measure(images.swapaxes(1, 2) if manifest.transposed else images)
        if manifest.transposed:
            height, width = width, height
        return cls((height, width, channels), fit if fit in _FITS else "pad", frame)

    def state_dict(self) -> dict[str, Any]:
        """Plain values, from which `from_state_dict` makes the adapter again."""
        return asdict(self)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> InputAdapter:
        frame = InkFrame(**{**state["frame"], "centre": tuple(state["frame"]["centre"])}) if state["frame"] else None
        return cls(tuple(state["image_shape"]), state["fit"], frame)

    def adapt(self, content: bytes) -> AdaptedImage:
        """Bring a picture to the set.

        Args:
            content: of a file: PNG, JPEG, WebP, BMP or GIF; gray, RGB, palette, transparent or 16 bits.

        Raises:
            UnusableImageError: if the file is damaged or the picture has no content.
        """
        height, width, channels = self.image_shape
        try:
            if self.frame is not None:
                return self._adapt_ink(pictures.decode(content, channels, None))
            header = pictures.header(content)
            if height is None or width is None:
                return AdaptedImage(_as_png(pictures.decode(content, channels, None)), _UNCHANGED)
            image = pictures.decode(content, channels, (height, width), self.fit)
        except CorruptFileError as error:
            raise UnusableImageError(str(error)) from None
        except NoInkError as error:
            raise BlankImageError(str(error)) from None
        if (header.height, header.width) == (height, width):
            return AdaptedImage(image, _UNCHANGED)
        return AdaptedImage(image, f"{header.width}x{header.height} brought to {width}x{height} ({self.fit})")

    def _adapt_ink(self, picture: NDArray[np.uint8]) -> AdaptedImage:
        assert self.frame is not None
        height, width, _ = self.image_shape
        assert height and width, "ink is in images of one size"
        own_height, own_width, _ = picture.shape
        ink = find_ink(remove_shading(limit_size(picture[..., 0])))
        if (own_height, own_width) == (height, width) and self.frame.holds(ink):
            return AdaptedImage(picture, _UNCHANGED)
        image = frame_ink(ink, self.frame, (height, width))[..., None]
        how = "dark" if self.frame.light else "light"
        inverted = "" if ink.light == self.frame.light else f"{how} ink inverted; "
        return AdaptedImage(image, f"{inverted}ink of {own_width}x{own_height} centred and scaled")


def _as_png(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    content = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(content, "PNG", compress_level=1)
    return np.frombuffer(content.getvalue(), np.uint8)
