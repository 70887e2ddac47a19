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

from torch import nn

from trainer.config.architectures import PlainCnn


def make_plain_cnn(network: PlainCnn, channels: int, classes: int, drop_rate: float) -> tuple[nn.Sequential, int]:
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
