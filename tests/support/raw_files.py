"""Made-up raw files for the tests of sources: pictures, archives, idx files, and what was refused of them."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from pipeline.datasets import find_source
from pipeline.readers.raw_split import RawSplit, SourceOptions, UnreadableImages
from shards import UserError
from support.image_files import turned_exif


def refusal(action: Callable[[], object]) -> UserError:
    with pytest.raises(UserError) as caught:
        action()
    return caught.value


def load(source: str, raw: Path, split: str = "", **options: object) -> tuple[RawSplit, ...]:
    return find_source(source).load(SourceOptions(raw, split, **options))


def read_all(part: RawSplit) -> NDArray[np.uint8]:
    return part.read(part.source_index)


def unreadable(part: RawSplit) -> dict[int, str]:
    with pytest.raises(UnreadableImages) as caught:
        read_all(part)
    return caught.value.reasons


def in_a_process(code: str) -> tuple[list[str], int]:
    """Lines that some code prints in a process of its own, and the most memory it took, in MB."""
    ending = "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    process = subprocess.run(
        [sys.executable, "-c", f"{code}\n{ending}"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    *lines, memory = process.stdout.splitlines()
    return lines, int(memory) >> 10


def idx(array: NDArray, kind: int = 8) -> bytes:
    """An idx file as the format's page describes it, written independently of the code under test."""
    return struct.pack(f">HBB{array.ndim}I", 0, kind, array.ndim, *array.shape) + array.tobytes()


def pixels(height: int = 8, width: int = 8, channels: int = 1, seed: int = 0) -> NDArray[np.uint8]:
    """A random picture, uint8 [H, W, C]."""
    return np.random.default_rng([seed, height, width, channels]).integers(0, 256, (height, width, channels), np.uint8)


def picture(image: NDArray | Image.Image, kind: str = "PNG", **options: object) -> bytes:
    """A picture file of an array [H, W, C] (gray, gray and alpha, RGB or RGBA) or an image."""
    if not isinstance(image, Image.Image):
        image = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def turned_without_exif_block(image: Image.Image) -> dict[str, bytes]:
    """Files of an image that is seen turned clockwise by 90 degrees, but whose EXIF block does not say so."""
    xmp = b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'
    exif = turned_exif(6).tobytes()
    texts = {name: PngInfo() for name in ("XMP", "text")}
    texts["XMP"].add_itxt("XML:com.adobe.xmp", xmp.decode())
    texts["text"].add_text("Raw profile type exif", f"\nexif\n{len(exif):8}\n{exif.hex()}\n", zip=True)
    chunk = b"eXIf" + exif.removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return {
        "JPEG turned by XMP": picture(image, "JPEG", xmp=xmp),
        "WebP turned by XMP": picture(image, "WEBP", xmp=xmp),
        "PNG turned by XMP": picture(image, pnginfo=texts["XMP"]),
        "PNG turned by EXIF in a text": picture(image, pnginfo=texts["text"]),
        "PNG turned behind its pixels": picture(image)[:-12] + chunk + picture(image)[-12:],
    }


def png_claiming(height: int, width: int) -> bytes:
    """A whole PNG of a few bytes whose header promises so many gray pixels."""
    pieces = (
        (b"IHDR", struct.pack(">2I5B", width, height, 8, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(bytes(100))),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in pieces
    )


def write_tree(directory: Path, files: Mapping[str, bytes]) -> Path:
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return directory


def write_zip(path: Path, files: Mapping[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def write_tar(path: Path, files: Mapping[str, bytes | tarfile.TarInfo], mode: str = "w") -> Path:
    """A tar of these files; a TarInfo in place of the bytes is written as it is, without content."""
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            if isinstance(content, tarfile.TarInfo):
                content.name = name
                archive.addfile(content)
            else:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return path
