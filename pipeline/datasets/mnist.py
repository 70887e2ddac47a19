"""MNIST: 70,000 handwritten digits (LeCun, Cortes and Burges, http://yann.lecun.com/exdb/mnist/)."""

from __future__ import annotations

from pipeline.raw.idx_source import idx_source

SOURCE = idx_source(
    name="mnist",
    description="MNIST, handwritten digits, 28x28 gray",
    classes=tuple("0123456789"),
    # The original server refuses downloads; this mirror, kept by the PyTorch project, has the original files.
    address="https://ossci-datasets.s3.amazonaws.com/mnist/",
    files=(
        (9_912_422, "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"),
        (28_881, "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"),
        (1_648_877, "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"),
        (4_542, "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"),
    ),
)
