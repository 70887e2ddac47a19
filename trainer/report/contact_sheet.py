"""Contact sheet of predictions: each model input with its predicted class."""

from __future__ import annotations

from PIL import Image, ImageDraw, ImageFont, ImageOps

from pipeline.preview import MUTED, PAPER, TEXT, draw_text, to_pil_image
from trainer.runtime.loggers.base import PredictedImage

MAX_TILES = 240
_COLUMNS = 12
_TILE = 84  # side of an image, pixels
_GAP = 12
_CAPTION = 36
_HEADER = 72
_MARGIN = 24
_WRONG = (190, 18, 60)


def prediction_sheet(tiles: list[PredictedImage], title: str, not_shown: int = 0) -> Image.Image:
    """Draw the tiles in rows. Wrong predictions have a red frame and the true class.

    Args:
        tiles: At least one image.
        title: Heading of the sheet.
        not_shown: Number of further images, for the heading.
    """
    columns = min(_COLUMNS, max(5, len(tiles)))
    rows = -(-len(tiles) // columns)
    width = 2 * _MARGIN + columns * (_TILE + _GAP) - _GAP
    sheet = Image.new("RGB", (width, _HEADER + rows * (_TILE + _CAPTION + _GAP) + _MARGIN - _GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw_text(draw, (_MARGIN, 16), title, 20, width - 2 * _MARGIN)
    more = f"; {not_shown:,} more not shown" if not_shown else ""
    draw_text(draw, (_MARGIN, 44), f"model input and prediction{more}", 13, width - 2 * _MARGIN, MUTED)
    for position, tile in enumerate(tiles):
        x = _MARGIN + position % columns * (_TILE + _GAP)
        y = _HEADER + position // columns * (_TILE + _CAPTION + _GAP)
        is_wrong = tile.true is not None and tile.true != tile.predicted
        if is_wrong:
            draw.rectangle((x - 3, y - 3, x + _TILE + 2, y + _TILE + 2), fill=_WRONG)
            draw_text(draw, (x, y + _TILE + 21), f"true: {tile.true}", 12, _TILE, MUTED)
        resample = Image.Resampling.NEAREST if tile.image.shape[0] * 2 <= _TILE else Image.Resampling.LANCZOS
        sheet.paste(ImageOps.pad(to_pil_image(tile.image), (_TILE, _TILE), resample, color=PAPER), (x, y))
        percent, font = f"{tile.confidence:.0%}", ImageFont.load_default(12)
        draw.text((x + _TILE, y + _TILE + 6), percent, MUTED, font, anchor="ra")
        room = _TILE - int(font.getlength(percent)) - 4
        draw_text(draw, (x, y + _TILE + 4), tile.predicted, 14, room, _WRONG if is_wrong else TEXT)
    return sheet
