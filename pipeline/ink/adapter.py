"""Convert an arbitrary image to the format of a packed data set (size, channels, ink placement) before inference.

If the data set consists of ink on a plain background, `pipeline.ink.geometry` segments the ink and places it as in the
data set. An image that already has the size and ink placement of the data set is not changed. For other data sets,
images are resized with the method that was used for packing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from pipeline.ink.geometry import InkFrame, find_ink, frame_ink, limit_size
from pipeline.ink.shading import remove_shading
from pipeline.readers.formats import image as pictures
from shards.stores.base import Store

_MEASURED_IMAGES = 256
_UNCHANGED = "unchanged"
_FITS = ("pad", "crop", "stretch")


class AdaptedImage(NamedTuple):
    """An image in the format of a data set.

    Attributes:
        image: uint8 [H, W, C], upright; an image file, uint8 [bytes], for a data set of image files.
        description: Description of the conversion.
    """

    image: NDArray[np.uint8]
    description: str


@dataclass(frozen=True)
class InputAdapter:
    """Converts images to the format of a data set.

    Attributes:
        image_shape: (H, W, C) of the upright images; (None, None, C) for a data set of image files.
        fit: Resize method, as in `pipeline.readers.formats.image.decode`.
        frame: Placement of ink in the images; None if they do not consist of ink.
    """

    image_shape: tuple[int | None, int | None, int]
    fit: str
    frame: InkFrame | None

    @classmethod
    def of(cls, store: Store) -> InputAdapter:
        """Build the adapter of a packed split from its first images, which are a random subset."""
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
        """Return the state as plain values for `from_state_dict`."""
        return asdict(self)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> InputAdapter:
        """Build an adapter from `state_dict()`; raise `ValueError` if it is damaged."""
        adapter = TypeAdapter(cls).validate_python(dict(state))
        (height, width, channels), frame = adapter.image_shape, adapter.frame
        sides = [side for side in (height, width) if side is not None]
        fits = adapter.fit in _FITS and channels in (1, 3) and len(sides) != 1 and all(side > 0 for side in sides)
        if frame is not None and fits:
            lengths = (frame.side, frame.min_side, frame.max_side, frame.reach, *frame.centre)
            most = 2 * max(sides, default=0)
            fits = channels == 1 and frame.side >= 1 and all(abs(length) <= most for length in lengths)
        if not fits:
            raise ValueError("a size, fit or placement of ink that no data set has")
        return adapter

    def adapt(self, content: bytes) -> AdaptedImage:
        """Convert an image file to the format of the data set.

        Args:
            content: Bytes of a PNG, JPEG, WebP, BMP, GIF or TIFF file: gray,
                RGB, palette, with transparency or 16 bits.

        Raises:
            CorruptFileError: The file is damaged.
            NoInkError: The data set consists of ink, and the image has none.
        """
        height, width, channels = self.image_shape
        if self.frame is not None:
            return self._adapt_ink(pictures.decode(content, channels, None))
        header = pictures.header(content)
        if height is None or width is None:
            png = pictures.encode_png(pictures.decode(content, channels, None), compress_level=1)
            return AdaptedImage(np.frombuffer(png, np.uint8), _UNCHANGED)
        image = pictures.decode(content, channels, (height, width), self.fit)
        if (header.height, header.width) == (height, width):
            return AdaptedImage(image, _UNCHANGED)
        return AdaptedImage(image, f"resized from {header.height}x{header.width} to {height}x{width} ({self.fit})")

    def _adapt_ink(self, picture: NDArray[np.uint8]) -> AdaptedImage:
        assert self.frame is not None
        height, width, _ = self.image_shape
        assert height and width, "images with ink have one size"
        own_height, own_width, _ = picture.shape
        ink = find_ink(remove_shading(limit_size(picture[..., 0])))
        if (own_height, own_width) == (height, width) and self.frame.contains(ink):
            return AdaptedImage(picture, _UNCHANGED)
        image = frame_ink(ink, self.frame, (height, width))[..., None]
        polarity = "light" if ink.is_light else "dark"
        inverted = "" if ink.is_light == self.frame.is_light else f"{polarity} ink inverted; "
        return AdaptedImage(image, f"{inverted}ink of the {own_height}x{own_width} image centred and scaled")
