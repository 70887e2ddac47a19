"""How any picture becomes an image as a packed set holds them, so that a model may be shown it.

Where the set is ink on a plain background (measured on its images), the ink is found and laid as the set has it, see
`pipeline.ink.geometry`. A picture that has the size of the set's images and whose ink lies as theirs is taken as it is. Pictures
for other sets are brought to their size in the way that the set was packed.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.ink.geometry import InkFrame, NoInk, find_ink, frame_ink, within
from pipeline.ink.shading import evenly_lit
from pipeline.readers.archives.files import CorruptFileError
from pipeline.readers.formats import image as pictures
from shards.stores.base import Store

_MEASURED = 256  # images of the set
_FITS = ("pad", "crop", "stretch")


class Unusable(Exception):
    """A picture that cannot be shown to a model: damaged, or with nothing on it. The text says why."""


class Blank(Unusable):
    """A whole picture with nothing on it."""


class Taken(NamedTuple):
    """image: uint8 [H, W, C] upright, as the set has them, or a picture file uint8 [bytes] where it holds those.

    done: what was done to the picture, in words.
    """

    image: NDArray[np.uint8]
    done: str


@dataclass(frozen=True)
class Intake:
    """What is known of a set's images, and decides how pictures are brought to it.

    image_shape: (H, W, C) of the upright images, (None, None, C) where the set holds picture files. fit: how pictures
    get that size, as in `readers.formats.image.decode`. frame: how ink lies in the images, None if they are not ink.
    """

    image_shape: tuple[int | None, int | None, int]
    fit: str
    frame: InkFrame | None

    @classmethod
    def of(cls, store: Store) -> Intake:
        """The intake of a packed part, measured on its first images, which are a fair sample."""
        manifest = store.manifest
        height, width, channels = manifest.image_shape
        fit = str(manifest.options.get("fit", "pad"))
        frame = None
        if channels == 1 and not manifest.encoded:
            images = np.asarray(store.read(np.arange(min(len(store), _MEASURED))))[..., 0]
            frame = InkFrame.measured(images.swapaxes(1, 2) if manifest.transposed else images)
        if manifest.transposed:
            height, width = width, height
        return cls((height, width, channels), fit if fit in _FITS else "pad", frame)

    def state(self) -> dict[str, Any]:
        """Plain values, from which `of_state` makes it again."""
        return asdict(self)

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> Intake:
        frame = InkFrame(**{**state["frame"], "centre": tuple(state["frame"]["centre"])}) if state["frame"] else None
        return cls(tuple(state["image_shape"]), state["fit"], frame)

    def take(self, content: bytes) -> Taken:
        """Bring a picture file (PNG, JPEG, WebP, BMP or GIF; gray, RGB, palette, transparent, 16 bits) to the set.

        Raises `Unusable`.
        """
        height, width, channels = self.image_shape
        try:
            if self.frame is not None:
                return self._take_ink(pictures.decode(content, channels, None))
            header = pictures.header(content)
            if height is None or width is None:
                return Taken(_as_png(pictures.decode(content, channels, None)), "taken as it is")
            image = pictures.decode(content, channels, (height, width), self.fit)
        except CorruptFileError as error:
            raise Unusable(str(error)) from None
        except NoInk as error:
            raise Blank(str(error)) from None
        if (header.height, header.width) == (height, width):
            return Taken(image, "taken as it is")
        return Taken(image, f"{header.width}x{header.height} brought to {width}x{height} ({self.fit})")

    def _take_ink(self, picture: NDArray[np.uint8]) -> Taken:
        assert self.frame is not None
        height, width, _ = self.image_shape
        assert height and width, "ink is in images of one size"
        own_height, own_width, _ = picture.shape
        ink = find_ink(evenly_lit(within(picture[..., 0])))
        if (own_height, own_width) == (height, width) and self.frame.holds(ink):
            return Taken(picture, "taken as it is")
        image = frame_ink(ink, self.frame, (height, width))[..., None]
        how = "dark" if self.frame.light else "light"
        inverted = "" if ink.light == self.frame.light else f"{how} ink inverted; "
        return Taken(image, f"{inverted}ink of {own_width}x{own_height} centred and scaled")


def _as_png(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    content = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(content, "PNG", compress_level=1)
    return np.frombuffer(content.getvalue(), np.uint8)
