"""MNIST, Fashion-MNIST and Kuzushiji-MNIST: four idx files each, images and labels of train and test.

MNIST: LeCun, Cortes and Burges, http://yann.lecun.com/exdb/mnist/. Fashion-MNIST: Xiao, Rasul and Vollgraf 2017,
https://arxiv.org/abs/1708.07747. Kuzushiji-MNIST: Clanuwat et al. 2018, https://arxiv.org/abs/1812.01718,
http://codh.rois.ac.jp/kmnist/; a class is named by the reading of its modern character. Sizes and hashes of the last
two are those of the checksums of TensorFlow Datasets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipeline.datasets.base import DatasetSource
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
# Name, description, folder of torchvision, classes, address, and bytes and SHA-256 of the four files in the order of
# `_FILES`.
_SETS = (
    (
        "mnist",
        "MNIST, handwritten digits, 28x28 gray",
        "MNIST",
        DIGITS,
        # The original server refuses downloads; this mirror of the PyTorch project has the original files.
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        (
            (9_912_422, "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"),
            (28_881, "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"),
            (1_648_877, "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"),
            (4_542, "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"),
        ),
    ),
    (
        "fashionmnist",
        "Fashion-MNIST, clothes, 28x28 gray",
        "FashionMNIST",
        _FASHION,
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        (
            (26_421_880, "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84"),
            (29_515, "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"),
            (4_422_102, "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073"),
            (5_148, "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"),
        ),
    ),
    (
        "kmnist",
        "Kuzushiji-MNIST, cursive Japanese, 28x28 gray",
        "KMNIST",
        ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
        "http://codh.rois.ac.jp/kmnist/dataset/kmnist/",
        (
            (18_165_135, "51467d22d8cc72929e2a028a0428f2086b092bb31cfb79c69cc0a90ce135fde4"),
            (29_497, "e38f9ebcd0f3ebcdec7fc8eabdcdaef93bb0df8ea12bee65224341c8183d8e17"),
            (3_041_136, "edd7a857845ad6bb1d0ba43fe7e794d164fe2dce499a1694695a792adfac43c5"),
            (5_120, "20bb9a0ef54c7db3efc55a92eef5582c109615df22683c380526788f98e42a1c"),
        ),
    ),
)


def published_in_gzip(
    address: str, names: Sequence[str], files: Sequence[tuple[int, str]], torchvision: str
) -> PublishedFiles:
    """Describe files that are published one by one, compressed by gzip.

    Args:
        address: The address of their directory, which ends in `/`.
        names: Their names without `.gz`.
        files: The bytes and SHA-256 of each.
        torchvision: The directory in which torchvision keeps the data set.
    """
    downloads = tuple(
        Download(f"{address}{name}.gz", f"{name}.gz", size, sha256)
        for name, (size, sha256) in zip(names, files, strict=True)
    )
    return PublishedFiles(tuple(names), downloads, str(len(names)), torchvision_folders(torchvision))


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


def _source(
    name: str,
    description: str,
    torchvision: str,
    classes: tuple[str, ...],
    address: str,
    files: Sequence[tuple[int, str]],
) -> DatasetSource:
    published = published_in_gzip(address, [name for names in _FILES.values() for name in names], files, torchvision)
    return DatasetSource(
        name,
        description,
        plan=lambda options: published.plan(options.raw),
        load=lambda options: read_idx_splits(published.open(options.raw), _FILES, classes),
    )


SOURCES = tuple(_source(*fields) for fields in _SETS)
