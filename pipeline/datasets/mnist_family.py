"""MNIST, Fashion-MNIST and Kuzushiji-MNIST: four idx files each, images and labels of train and test.

MNIST: LeCun, Cortes and Burges, http://yann.lecun.com/exdb/mnist/. This server refuses downloads; they come from a
mirror of the PyTorch project, which has the original files. Fashion-MNIST: Xiao, Rasul and Vollgraf 2017,
https://arxiv.org/abs/1708.07747. Kuzushiji-MNIST: Clanuwat et al. 2018, https://arxiv.org/abs/1812.01718,
http://codh.rois.ac.jp/kmnist/; a class is named by the reading of its modern character. Sizes and hashes of the last
two are those of the checksums of TensorFlow Datasets.
"""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.datasets.base import DatasetSource, published
from pipeline.readers.download import Download
from pipeline.readers.formats.idx import decode_pair
from pipeline.readers.raw_dir import PublishedFiles, RawDirectory
from pipeline.readers.raw_split import RawSplit

DIGITS = tuple("0123456789")
# The names of the four files, without `.gz`: images and labels of each split.
_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
_FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
_KUZUSHIJI = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")


def published_in_gzip(name: str, torchvision: str) -> PublishedFiles:
    """Describe files that are published one by one, compressed by gzip.

    Args:
        name: The data set. `published.json` holds the address of the directory of its files, which ends in `/`, and
            bytes and SHA-256 of each file by its name without `.gz`.
        torchvision: The directory in which torchvision keeps the data set.
    """
    address, files = published(name)["address"], published(name)["files"]
    downloads = tuple(
        Download(f"{address}{file}.gz", f"{file}.gz", size, sha256) for file, (size, sha256) in files.items()
    )
    return PublishedFiles(tuple(files), downloads, str(len(files)), torchvision_folders(torchvision))


def torchvision_folders(name: str) -> tuple[str, ...]:
    """Return where torchvision puts raw files, seen from its root and from the directory of the data set."""
    return f"{name}/raw", "raw"


def read_idx_splits(
    directory: RawDirectory, files: Mapping[str, tuple[str, str]], classes: tuple[str, ...], first_label: int = 0
) -> tuple[RawSplit, ...]:
    """Read splits from idx files.

    Args:
        directory: The directory of raw files.
        files: The files of images and of labels of each split.
        classes: The class names.
        first_label: The number of the first class in the files.
    """
    splits = []
    for split, names in files.items():
        raw_images, raw_labels = map(directory.read, names)
        images, labels = decode_pair(raw_images, raw_labels, len(classes), first_label)
        records = (raw_images.record(), raw_labels.record())
        splits.append(RawSplit.from_arrays(split, images, labels, classes, files=records))
    return tuple(splits)


def _source(name: str, description: str, torchvision: str, classes: tuple[str, ...]) -> DatasetSource:
    files = published_in_gzip(name, torchvision)
    return DatasetSource(
        name,
        description,
        plan=lambda options: files.plan(options.raw),
        load=lambda options: read_idx_splits(files.open(options.raw), _FILES, classes),
    )


SOURCES = (
    _source("mnist", "MNIST, handwritten digits, 28x28 gray", "MNIST", DIGITS),
    _source("fashionmnist", "Fashion-MNIST, clothes, 28x28 gray", "FashionMNIST", _FASHION),
    _source("kmnist", "Kuzushiji-MNIST, cursive Japanese, 28x28 gray", "KMNIST", _KUZUSHIJI),
)
