"""A picture of what a model saw in each image, with what it said."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pipeline.preview import to_pil_image

MOST_TILES = 240
_COLUMNS = 12
_TILE = 84  # side of an image, pixels
_GAP = 12
_CAPTION = 36
_HEADER = 72
_MARGIN = 24
_INK = (24, 24, 27)
_MUTED = (113, 113, 122)
_PAPER = (250, 250, 250)
_WRONG = (190, 18, 60)


class Tile(NamedTuple):
    """image: uint8 [R, R, C]. said: the predicted class, with its probability. true: the true class, if known."""

    image: NDArray[np.uint8]
    said: str
    probability: float
    true: str | None


def prediction_sheet(tiles: list[Tile], title: str, left_out: int = 0) -> Image.Image:
    """The tiles in rows, in their order; wrong ones have a red frame and name the true class.

    left_out: how many more images there were.
    """
    columns = min(_COLUMNS, max(5, len(tiles)))
    rows = -(-len(tiles) // columns)
    width = 2 * _MARGIN + columns * (_TILE + _GAP) - _GAP
    sheet = Image.new("RGB", (width, _HEADER + rows * (_TILE + _CAPTION + _GAP) + _MARGIN - _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, 16), _cut(title, width - 2 * _MARGIN, 20), _INK, ImageFont.load_default(20))
    more = f"; {left_out:,} more are not shown" if left_out else ""
    draw.text((_MARGIN, 44), f"what the model saw, and what it said{more}", _MUTED, ImageFont.load_default(13))
    for place, tile in enumerate(tiles):
        x = _MARGIN + place % columns * (_TILE + _GAP)
        y = _HEADER + place // columns * (_TILE + _CAPTION + _GAP)
        wrong = tile.true is not None and tile.true != tile.said
        if wrong:
            draw.rectangle((x - 3, y - 3, x + _TILE + 2, y + _TILE + 2), fill=_WRONG)
        grows = Image.Resampling.NEAREST if tile.image.shape[0] * 2 <= _TILE else Image.Resampling.LANCZOS
        sheet.paste(to_pil_image(tile.image).resize((_TILE, _TILE), grows), (x, y))
        share = f"{tile.probability:.0%}"
        room = _TILE - draw.textlength(share, ImageFont.load_default(12)) - 4
        draw.text((x, y + _TILE + 4), _cut(tile.said, room, 14), _WRONG if wrong else _INK, ImageFont.load_default(14))
        draw.text((x + _TILE, y + _TILE + 6), share, _MUTED, ImageFont.load_default(12), anchor="ra")
        if wrong:
            draw.text((x, y + _TILE + 21), _cut(f"is {tile.true}", _TILE, 12), _MUTED, ImageFont.load_default(12))
    return sheet


def _cut(text: str, room: float, size: int) -> str:
    """A text that is not wider than so many pixels."""
    font = ImageFont.load_default(size)
    if font.getlength(text) <= room:
        return text
    while text and font.getlength(f"{text}…") > room:
        text = text[:-1]
    return f"{text}…"
