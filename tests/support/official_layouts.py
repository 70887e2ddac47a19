"""Made-up copies of published data sets in their official layouts: CIFAR's records, NumtaDB's tables, idx files."""

from __future__ import annotations

import csv
import gzip
import io
from pathlib import Path

import numpy as np

from support.raw_files import idx, picture, write_tree

TEN = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
# As NIST lists them: digits, capitals, small letters; Balanced has eleven of the small ones.
_BYCLASS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
EMNIST_CLASSES = {"byclass": _BYCLASS, "balanced": f"{_BYCLASS[:36]}abdefghnqrt", "digits": _BYCLASS[:10]}


def cifar_records(count: int, kinds: int, seed: int) -> tuple[bytes, np.ndarray, np.ndarray]:
    """A file as the CIFAR page describes it, record by record; its pictures [N, 32, 32, 3], its labels [N, kinds]."""
    random = np.random.default_rng(seed)
    images = random.integers(0, 256, (count, 32, 32, 3), np.uint8)
    labels = np.stack([random.integers(0, most, count) for most in ((10,), (20, 100))[kinds - 1]], axis=1)
    content = b"".join(
        bytes(label.tolist()) + b"".join(image[:, :, channel].tobytes() for channel in range(3))
        for image, label in zip(images, labels, strict=True)
    )
    return content, images, labels


def cifar10_files(train: int = 6, test: int = 4) -> dict[str, bytes]:
    """What cifar-10-binary.tar.gz unpacks to, with so many pictures in each of the five batches and in the test."""
    files = {f"data_batch_{number}.bin": cifar_records(train, 1, number)[0] for number in range(1, 6)}
    names = "\n".join(TEN).encode() + b"\n\n"
    return {
        **files,
        "test_batch.bin": cifar_records(test, 1, 9)[0],
        "batches.meta.txt": names,
        "readme.html": b"<html>",
    }


def numtadb_table(letter: str, rows: int, digits: list[str] | None = None) -> bytes:
    header = "filename,original filename,scanid,digit,database name original,contributing team,database name"
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(header.split(","))
    for row in range(rows):
        digit = digits[row] if digits else str((row * 3) % 10)
        lines.writerow(
            [f"{letter}{row:05}.png", "Scan 1, x.png", row, digit, f"DB{row % 2}", "Team", f"training-{letter}"]
        )
    return text.getvalue().encode()


def write_numtadb(directory: Path, rows: int) -> Path:
    """Sets a to d, as many pictures in each: dark strokes on light paper, thicker for higher digits."""
    files: dict[str, bytes] = {}
    for seed, letter in enumerate("abcd"):
        files[f"training-{letter}.csv"] = numtadb_table(letter, rows)
        for row in range(rows):
            image = np.random.default_rng([seed, row]).integers(200, 256, (60 + row, 50 + seed, 3), np.uint8)
            image[20 : 24 + 3 * (row * 3 % 10), 10:30] = 30
            files[f"training-{letter}/{letter}{row:05}.png"] = picture(image)
    return write_tree(directory, files)


def idx_pair(classes: int, count: int, seed: int) -> tuple[bytes, bytes]:
    """Images 28x28 and labels, every class as often as any other, as gzipped idx files."""
    images = np.random.default_rng(seed).integers(0, 256, (count, 28, 28), np.uint8)
    labels = (np.arange(count) % classes).astype(np.uint8)
    return gzip.compress(idx(images)), gzip.compress(idx(labels))


def write_mnist(directory: Path, train: int, test: int) -> Path:
    files = {}
    for seed, (name, count) in enumerate((("train", train), ("t10k", test))):
        images, labels = idx_pair(10, count, seed)
        files |= {f"{name}-images-idx3-ubyte.gz": images, f"{name}-labels-idx1-ubyte.gz": labels}
    return write_tree(directory, files)


def write_emnist(directory: Path, split: str, train: int, test: int) -> Path:
    classes = EMNIST_CLASSES[split]
    lines = "".join(f"{label} {ord(name)}\r\n" for label, name in enumerate(classes))
    files = {f"emnist-{split}-mapping.txt": lines.encode()}
    for seed, (name, count) in enumerate((("train", train), ("test", test))):
        images, labels = idx_pair(len(classes), count, seed)
        files[f"emnist-{split}-{name}-images-idx3-ubyte.gz"] = images
        files[f"emnist-{split}-{name}-labels-idx1-ubyte.gz"] = labels
    return write_tree(directory, files)
