"""Plain networks: convolutions with ReLU and pooling, then dense layers, for images of one size.

| name | input | what | parameters (3 channels, 10 classes) |
|---|---|---|---|
| cifar_cnn | 32 | convolutions 32, 64 (3x3); dense 128 | 545,098 |
| cifar_cnn_batchnorm | 32 | the same with batch norm after each convolution; dense 256 | 1,070,986 |
| lenet | 28 | convolutions 6, 16 (5x5, not padded); dense 120, 84: LeNet-5 with ReLU and max pooling | 44,726 |
| numtadb_model1 | 64 | convolutions 16, 32, 32 (3x3); dense 1024, 512 | 2,642,442 |
| numtadb_model2 | 48 | convolutions 6, 16 (5x5, not padded), 32 (3x3); dense 120, 84 | 80,086 |
| numtadb_model3 | 48 | convolutions 16, 32, 32 (3x3); dense 1024, 512 | 1,724,938 |

LeNet-5: LeCun et al. 1998, https://doi.org/10.1109/5.726791. The others are those of earlier systems for CIFAR-10 and
NumtaDB.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn


@dataclass(frozen=True)
class Plain:
    """What a plain network consists of.

    side: of its square input, in pixels. filters: output channels of each convolution. kernels: their sides in pixels.
    padded: which of them keep the size of the image. dense: widths of the dense layers before the classifier.
    batch_norm: whether one follows each convolution.
    """

    side: int
    filters: tuple[int, ...]
    kernels: tuple[int, ...]
    padded: tuple[bool, ...]
    dense: tuple[int, ...]
    batch_norm: bool = False

    def changed(self, filters: Sequence[int] | None, kernel: int | None, dense: Sequence[int] | None) -> Plain:
        """With other filters, one kernel side for all convolutions, or other dense layers; None leaves what is there.

        Raises `ValueError` for what does not fit.
        """
        if filters is not None and len(filters) != len(self.filters):
            raise ValueError(f"{len(filters)} numbers of filters for {len(self.filters)} convolutions (model.filters)")
        if kernel is not None and kernel % 2 == 0 and any(self.padded):
            raise ValueError(f"a kernel of {kernel}x{kernel} (model.kernel), where only an odd one is padded evenly")
        changed = replace(
            self,
            filters=self.filters if filters is None else tuple(filters),
            kernels=self.kernels if kernel is None else (kernel,) * len(self.kernels),
            dense=self.dense if dense is None else tuple(dense),
        )
        if changed.last_side < 1:
            raise ValueError(f"a kernel of {kernel}x{kernel} (model.kernel), which leaves nothing of the image")
        return changed

    @property
    def last_side(self) -> int:
        """Side of the last feature map; below 1 for none."""
        side = self.side
        for kernel, padded in zip(self.kernels, self.padded, strict=True):
            side = (side if padded else side - kernel + 1) // 2
        return side


_TWO = Plain(32, filters=(32, 64), kernels=(3, 3), padded=(True, True), dense=(128,))
_THREE = Plain(64, filters=(16, 32, 32), kernels=(3, 3, 3), padded=(True, True, True), dense=(1024, 512))

PLAIN = {
    "cifar_cnn": _TWO,
    "cifar_cnn_batchnorm": replace(_TWO, dense=(256,), batch_norm=True),
    "lenet": Plain(28, filters=(6, 16), kernels=(5, 5), padded=(False, False), dense=(120, 84)),
    "numtadb_model1": _THREE,
    "numtadb_model2": Plain(48, filters=(6, 16, 32), kernels=(5, 5, 3), padded=(False, False, True), dense=(120, 84)),
    "numtadb_model3": replace(_THREE, side=48),
}


def plain(network: Plain, channels: int, classes: int, drop_rate: float) -> tuple[nn.Sequential, int]:
    """The network of images float [B, channels, side, side], and the width of its last dense layer.

    drop_rate: dropout before every dense layer and the classifier. classes 0: no classifier, the features come out.
    """
    layers: list[nn.Module] = []
    width = channels
    for filters, kernel, padded in zip(network.filters, network.kernels, network.padded, strict=True):
        layers.append(nn.Conv2d(width, filters, kernel, padding=kernel // 2 if padded else 0))
        if network.batch_norm:
            layers.append(nn.BatchNorm2d(filters))
        layers += [nn.ReLU(inplace=True), nn.MaxPool2d(2)]
        width = filters
    layers.append(nn.Flatten())
    width *= network.last_side**2
    for dense in network.dense:
        layers += [*_dropout(drop_rate), nn.Linear(width, dense), nn.ReLU(inplace=True)]
        width = dense
    if classes:
        layers += [*_dropout(drop_rate), nn.Linear(width, classes)]
    return nn.Sequential(*layers), width


def _dropout(rate: float) -> list[nn.Module]:
    return [nn.Dropout(rate)] if rate else []
