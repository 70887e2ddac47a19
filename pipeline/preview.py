"""Draw a contact sheet of a packed data set: raw images next to the model input.

    python -m pipeline.preview DIR [--out FILE] [--resolution N]

The sheet shows a few examples of each class.
"""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps

from pipeline.common.rng import permutation
from pipeline.loader import undecodable_image_error
from pipeline.transforms.augmentation import NO_AUGMENTATION, Augmentation
from pipeline.transforms.build import build_transform, choose_backend
from pipeline.transforms.preprocess import MAX_RESOLUTION, NO_PREPROCESSING, Preprocessing, Resolution, format_size
from pipeline.transforms.spec import TransformSpec
from shards.atomic import check_writable, write_file
from shards.cli import command_parser, run_command
from shards.errors import UserError
from shards.open import open_dataset_or_split
from shards.remote.datasets import is_remote, resolve_dataset
from shards.stores.base import Store
from shards.stores.image_header import decode

_EXAMPLES = 4  # of a class, without augmentation
_AUGMENTED_EXAMPLES = 2  # of a class, with augmentation, each in so many versions:
_VERSIONS = 4
_TILE = 56  # side of an image on the sheet, pixels
_GAP = 6
_EXAMPLE_GAP = 14
_LABEL = 96
_HEADER = 64
_MARGIN = 24
_COLUMN_GAP = 28
TEXT = (24, 24, 27)
MUTED = (113, 113, 122)
PAPER = (250, 250, 250)


def read_images(store: Store, samples: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
    """Read raw images as stored; image files are decoded.

    Args:
        store: Open split.
        samples: int64 [n], positions in the store.

    Returns:
        n images uint8 [H, W, C].

    Raises:
        UserError: An image file cannot be decoded.
    """
    images = store.read(samples)
    if isinstance(images, np.ndarray):
        return list(images)
    pixels = []
    for sample, image in zip(samples.tolist(), images, strict=True):
        try:
            pixels.append(decode(image, store.manifest.image_shape[2]))
        except ValueError as error:
            raise undecodable_image_error(store, sample, str(error)) from None
    return pixels


def upright(image: NDArray[np.uint8], transposed: bool) -> NDArray[np.uint8]:
    """Return an image [H, W, C] with its orientation corrected."""
    return image.swapaxes(0, 1) if transposed else image


def to_pil_image(image: NDArray[np.uint8]) -> Image.Image:
    """Convert an image [H, W, C] with 1 or 3 channels to RGB."""
    return Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).convert("RGB")


def to_png(picture: Image.Image) -> bytes:
    """Encode a picture as PNG."""
    content = io.BytesIO()
    picture.save(content, "PNG", optimize=True)
    return content.getvalue()


def contact_sheet(
    store: Store,
    resolution: Resolution,
    interpolation: str = "linear",
    preprocessing: Preprocessing = NO_PREPROCESSING,
    augmentation: Augmentation = NO_AUGMENTATION,
) -> Image.Image:
    """Draw a few examples of each class: the raw image (left) and the model input (right).

    With an augmentation, the model input is drawn in several versions.

    Args:
        store: Open split.
        resolution: Side of a square model input in pixels, or `HEIGHTxWIDTH`.
        interpolation: Interpolation of the resize.
        preprocessing: Deterministic steps on raw images.
        augmentation: Augmentation of training images.
    """
    manifest = store.manifest
    count, versions = (_AUGMENTED_EXAMPLES, _VERSIONS) if augmentation else (_EXAMPLES, 1)
    examples = _examples(store, count)
    columns = 1 if len(examples) <= 12 else 2 if len(examples) <= 64 else 3
    lines = -(-len(examples) // columns)
    strip_width = (1 + versions) * (_TILE + _GAP) - _GAP
    block_width = _LABEL + count * (strip_width + _EXAMPLE_GAP)
    line_height = _TILE + 2 * _GAP
    width = 2 * _MARGIN + columns * block_width + (columns - 1) * _COLUMN_GAP
    sheet = Image.new("RGB", (width, _HEADER + _MARGIN + lines * line_height), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw_text(draw, (_MARGIN, 16), f"{manifest.name}, {manifest.split}", 20, width - 2 * _MARGIN)
    orientation = "transposed" if manifest.transposed else "upright"
    raw = "original size" if manifest.encoded else "{}x{}, stored {}".format(*manifest.image_shape[:2], orientation)
    processed = f"augmented, {versions} versions" if augmentation else "model input"
    note = f"left: raw ({raw}), right: {processed} ({format_size(resolution)})"
    draw_text(draw, (_MARGIN, 42), note, 13, width - 2 * _MARGIN, MUTED)

    cpu = torch.device("cpu")
    spec = TransformSpec.of(manifest, resolution, interpolation, preprocessing)
    transform = build_transform(spec, choose_backend("auto", cpu.type, spec.encoded)[0], cpu, count, augmentation)
    for number, (label, samples) in enumerate(examples):
        left = _MARGIN + number // lines * (block_width + _COLUMN_GAP)
        top = _HEADER + number % lines * line_height
        name = manifest.classes[label]
        draw_text(draw, (left, top + 6), name, 26 if len(name) < 4 else 13, _LABEL - _GAP)
        draw_text(draw, (left, top + _TILE - 16), f"{manifest.counts[label]:,}", 12, _LABEL - _GAP, MUTED)
        images, stored = read_images(store, samples), store.read(samples)
        inputs = []
        for version in range(versions):
            params = augmentation.sample_params(0, version, label, slice(0, len(samples))) if augmentation else None
            inputs.append(_to_bytes(transform(stored, params)))
        for index, image in enumerate(images):
            x = left + _LABEL + index * (strip_width + _EXAMPLE_GAP)
            sheet.paste(_raw_tile(to_pil_image(image), keep_shape=manifest.encoded), (x, top))
            for model_input in inputs:
                x += _TILE + _GAP
                sheet.paste(_padded(to_pil_image(model_input[index])), (x, top))
    return sheet


def _to_bytes(images: torch.Tensor) -> NDArray[np.uint8]:
    """Convert model input float32 [B, C, R, S] of 0 .. 1 to uint8 [B, R, S, C]."""
    return images.clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()


def _raw_tile(image: Image.Image, keep_shape: bool) -> Image.Image:
    return _padded(image) if keep_shape else image.resize((_TILE, _TILE), Image.Resampling.NEAREST)


def _padded(image: Image.Image) -> Image.Image:
    return ImageOps.pad(image, (_TILE, _TILE), Image.Resampling.LANCZOS, color=PAPER)


def _examples(store: Store, count: int) -> list[tuple[int, NDArray[np.int64]]]:
    """The label of each class that has samples, and up to `count` of its samples."""
    order = permutation(len(store), seed=0, stream=0)
    labels = store.labels[order]
    examples = ((label, order[labels == label][:count]) for label in range(len(store.manifest.classes)))
    return [(label, samples) for label, samples in examples if len(samples)]


def draw_text(
    draw: ImageDraw.ImageDraw,
    position: tuple[int, int],
    text: str,
    size: int,
    width: int,
    colour: tuple[int, int, int] = TEXT,
) -> None:
    """Draw text, shortened to a width in pixels, in a font that has its letters; else its escape sequences."""
    path = None if text.isascii() else _font_file(frozenset(map(ord, text)))
    if path is None:
        text = text.encode("ascii", "backslashreplace").decode()
    font = ImageFont.truetype(path, size) if path else ImageFont.load_default(size)
    if font.getlength(text) > width:
        while text and font.getlength(f"{text}...") > width:
            text = text[:-1]
        text += "..."
    draw.text((position[0], position[1] + size), text, colour, font, anchor="ls")  # fonts share the baseline


@cache
def _font_file(letters: frozenset[int]) -> str | None:
    """A font file, of matplotlib or of the system, that has all letters (code points) and ASCII; None if none has."""
    from matplotlib import font_manager  # takes half a second to import
    from matplotlib.ft2font import FT2Font

    needed = letters | {*range(32, 127)}
    fonts = sorted(font_manager.findSystemFonts(), key=lambda path: ("Regular" not in path, path))
    for path in (font_manager.findfont("DejaVu Sans"), *fonts):
        try:
            if needed <= FT2Font(path).get_charmap().keys():
                return path
        except (OSError, RuntimeError):  # a file that FreeType cannot read
            continue
    return None


def main() -> int:
    """Run the command line."""
    parser = command_parser("pipeline.preview", __doc__)
    parser.add_argument(
        "dataset", metavar="DIR", help="packed data set (its train split) or one split; a directory or a URL"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="PNG file (default: DIR/preview.png)")
    parser.add_argument(
        "--resolution", type=int, default=112, metavar="N", help="side of the model input in pixels (default: 112)"
    )
    arguments = parser.parse_args()
    if not 1 <= arguments.resolution <= MAX_RESOLUTION:
        raise UserError(
            found=f"--resolution {arguments.resolution}",
            expected=f"a side of 1 .. {MAX_RESOLUTION} pixels",
            hint="omit --resolution for the default",
        )
    store = open_dataset_or_split(arguments.dataset, "train")
    # The cache of remote data sets is not modified.
    directory = Path() if is_remote(arguments.dataset) else resolve_dataset(arguments.dataset)
    out = arguments.out or directory / "preview.png"
    check_writable(out)
    save_png(contact_sheet(store, arguments.resolution), out)
    return 0


def save_png(sheet: Image.Image, out: Path) -> None:
    """Write a contact sheet as a PNG file and print its path."""
    write_file(out, to_png(sheet))
    print(out)


if __name__ == "__main__":
    run_command(main)
