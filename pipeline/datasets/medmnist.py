"""MedMNIST: medical images of eleven kinds, each at 28, 64, 128 and 224 pixels (Yang et al. 2023).

https://doi.org/10.1038/s41597-022-01721-8, https://medmnist.com. A variant is a published npz file without its ending:
`bloodmnist` has 28 pixels, `bloodmnist_64` the same images at 64. The splits train, val and test are the official ones
and the same at every size. Class names and MD5 are those of the package medmnist 3.0.2; sizes are not published.
ChestMNIST, which has several labels per image, and the sets of volumes are left out.
"""

from __future__ import annotations

from pipeline.datasets.base import DatasetSource, published
from pipeline.datasets.npz import read_npz
from pipeline.readers.download import Download
from pipeline.readers.raw_dir import PublishedFiles
from pipeline.readers.raw_split import RawSplit, SourceOptions

_ADDRESS = "https://zenodo.org/records/10519652/files/{}?download=1"


def _published(variant: str) -> PublishedFiles:
    name = f"{variant}.npz"
    md5 = published("medmnist")[variant.partition("_")[0]]["md5"][name]
    return PublishedFiles((name,), (Download(_ADDRESS.format(name), name, md5=md5),), variant)


def _load(options: SourceOptions) -> tuple[RawSplit, ...]:
    path = _published(options.variant).open(options.raw).path(f"{options.variant}.npz")
    return read_npz(path, tuple(published("medmnist")[options.variant.partition("_")[0]]["classes"]))


SOURCES = (
    DatasetSource(
        name="medmnist",
        description="MedMNIST, medical images of eleven kinds, 28x28 to 224x224, gray or RGB",
        variants=tuple(name.removesuffix(".npz") for each in published("medmnist").values() for name in each["md5"]),
        plan=lambda options: _published(options.variant).plan(options.raw),
        load=_load,
    ),
)
