"""One look at a packed set: a contact sheet of raw images beside what the model will see, by class.

python -m pipeline.preview DIR [--out FILE] [--resolution N]
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps

from pipeline.common.rng import permutation
from pipeline.loader import Loader, undecodable_image_error
from pipeline.sampler import SequentialBatchSampler
from pipeline.transforms.augmentation import NO_AUGMENTATION, Augmentation
from pipeline.transforms.build import build_transform, choose_backend
from pipeline.transforms.preprocess import NO_PREPROCESSING, Preprocessing
from pipeline.transforms.spec import TransformSpec
from shards.atomic import check_writable, write_file
from shards.cli import program_name, run_command
from shards.open import open_dataset_or_split
from shards.remote.sets import is_remote, resolve_dataset
from shards.stores.base import Store
from shards.stores.image_header import decode

_PAIRS = 4  # examples of a class
_AUGMENTED = 2  # examples of a class with an augmentation, each in so many versions:
_VERSIONS = 4
_TILE = 56  # side of a picture on the sheet, pixels
_GAP = 6
_PAIR_GAP = 14
_LABEL = 96
_HEADER = 64
_MARGIN = 24
_COLUMN_GAP = 28
_INK = (24, 24, 27)
_MUTED = (113, 113, 122)
_PAPER = (250, 250, 250)


def read_images(store: Store, samples: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
    """Raw images as stored, each uint8 [H, W, C]; picture files are decoded. Raises `UserError`."""
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
    """An image [H, W, C] the way a person reads it."""
    return image.swapaxes(0, 1) if transposed else image


def to_picture(image: NDArray[np.uint8]) -> Image.Image:
    """One image [H, W, C] of 1 or 3 channels as an RGB picture."""
    return Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).convert("RGB")


def contact_sheet(
    store: Store,
    resolution: int,
    interpolation: str = "linear",
    preprocessing: Preprocessing = NO_PREPROCESSING,
    augmentation: Augmentation = NO_AUGMENTATION,
) -> Image.Image:
    """A picture: for every class its name and a few examples, each raw (left) and processed (right), in several
    versions if they are augmented."""
    manifest = store.manifest
    count, versions = (_AUGMENTED, _VERSIONS) if augmentation else (_PAIRS, 1)
    examples = _examples(store, count)
    columns = 1 if len(examples) <= 12 else 2 if len(examples) <= 64 else 3
    rows = -(-len(examples) // columns)
    strip_width = (1 + versions) * (_TILE + _GAP) - _GAP
    block_width = _LABEL + count * (strip_width + _PAIR_GAP)
    row_height = _TILE + 2 * _GAP
    size = (2 * _MARGIN + columns * block_width + (columns - 1) * _COLUMN_GAP, _HEADER + _MARGIN + rows * row_height)
    sheet = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    stored = "rows and columns exchanged" if manifest.transposed else "upright"
    draw.text((_MARGIN, 16), f"{manifest.name}, {manifest.split}", _INK, ImageFont.load_default(20))
    height, width, _ = manifest.image_shape
    size = "at its own size" if manifest.encoded else f"{height}x{width} (stored {stored})"
    side = f"{resolution}x{resolution}"
    seen = f"augmented in {versions} ways, {side}," if augmentation else f"processed {side}"
    note = f"{'strips' if augmentation else 'pairs'}: raw {size}, and {seen} as the model sees it"
    draw.text((_MARGIN, 42), note, _MUTED, ImageFont.load_default(13))

    cpu = torch.device("cpu")
    spec = TransformSpec.of(manifest, resolution, interpolation, preprocessing)
    transform = build_transform(spec, choose_backend("auto", cpu, spec)[0], cpu, count, augmentation)
    for place, (label, samples) in enumerate(examples):
        left = _MARGIN + place // rows * (block_width + _COLUMN_GAP)
        top = _HEADER + place % rows * row_height
        name = manifest.classes[label]
        draw.text((left, top + 6), _fitted(name), _INK, ImageFont.load_default(26 if len(name) < 4 else 13))
        draw.text((left, top + _TILE - 16), f"{manifest.counts[label]:,}", _MUTED, ImageFont.load_default(12))
        raw = read_images(store, samples)
        if augmentation:
            params = [
                augmentation.sample_params(0, version, label, slice(0, len(samples))) for version in range(versions)
            ]
            processed = [_pixels(transform(store.read(samples), each)) for each in params]
        else:
            (batch,) = Loader(store, SequentialBatchSampler(samples, count), transform, cpu).batches()
            processed = [_pixels(batch.images)]
        for number, before in enumerate(raw):
            x = left + _LABEL + number * (strip_width + _PAIR_GAP)
            sheet.paste(_raw_tile(to_picture(before), keep_shape=manifest.encoded), (x, top))
            for version in processed:
                x += _TILE + _GAP
                sheet.paste(to_picture(version[number]).resize((_TILE, _TILE), Image.Resampling.LANCZOS), (x, top))
    return sheet


def _pixels(images: torch.Tensor) -> NDArray[np.uint8]:
    """Model input float32 [B, C, R, R] of 0 .. 1 as uint8 [B, R, R, C]."""
    return images.clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()


def _raw_tile(picture: Image.Image, keep_shape: bool) -> Image.Image:
    if keep_shape:
        return ImageOps.pad(picture, (_TILE, _TILE), Image.Resampling.LANCZOS, color=_PAPER)
    return picture.resize((_TILE, _TILE), Image.Resampling.NEAREST)


def _examples(store: Store, count: int) -> list[tuple[int, NDArray[np.int64]]]:
    """For every class that has samples: its number and a few of their positions."""
    shuffled = permutation(len(store), seed=0, stream=0)
    found = []
    for label in range(len(store.manifest.classes)):
        samples = shuffled[store.labels[shuffled] == label][:count]
        if len(samples):
            found.append((label, samples))
    return found


def _fitted(name: str) -> str:
    return name if len(name) <= 12 else f"{name[:11]}…"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog=program_name("pipeline.preview"), description="Draw a contact sheet of a packed set: raw beside processed."
    )
    parser.add_argument(
        "place", metavar="DIR", help="packed set (its train part) or one part, a directory or an address"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="PNG to write (default DIR/preview.png)")
    parser.add_argument("--resolution", type=int, default=112, metavar="N", help="side of the processed image")
    arguments = parser.parse_args()
    store = open_dataset_or_split(arguments.place, "train")
    # What was fetched is not ours to write into.
    out = arguments.out or (Path() if is_remote(arguments.place) else resolve_dataset(arguments.place)) / "preview.png"
    check_writable(out)
    save(contact_sheet(store, arguments.resolution), out)
    return 0


def save(sheet: Image.Image, out: Path) -> None:
    """Write a contact sheet as PNG, and say where it is."""
    content = io.BytesIO()
    sheet.save(content, "PNG")
    write_file(out, content.getvalue())
    print(out)


if __name__ == "__main__":
    run_command(main)
