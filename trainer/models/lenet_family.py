"""LeNet-5 and its relatives: convolutions with ReLU and pooling, then dense layers, for images of one size.

| name | input | layers | parameters (3 channels, 10 classes) |
|---|---|---|---|
| cifar_cnn | 32 | convolutions 32, 64 (3x3); dense 128 | 545,098 |
| cifar_cnn_batchnorm | 32 | the same with batch norm after each ReLU; dense 256 | 1,070,986 |
| lenet | 28 | convolutions 6, 16 (5x5, not padded); dense 120, 84: LeNet-5 with ReLU and max pooling | 44,726 |
| numtadb_model1 | 64 | convolutions 16, 32, 32 (3x3); dense 1024, 512 | 2,642,442 |
| numtadb_model2 | 48 | convolutions 6, 16 (5x5, not padded), 32 (3x3); dense 120, 84 | 80,086 |
| numtadb_model3 | 48 | convolutions 16, 32, 32 (3x3); dense 1024, 512 | 1,724,938 |

LeNet-5: LeCun et al. 1998, https://doi.org/10.1109/5.726791.
"""

from __future__ import annotations

from torch import nn

from trainer.config.architectures import PlainCnn


def make_plain_cnn(network: PlainCnn, channels: int, classes: int, drop_rate: float) -> tuple[nn.Sequential, int]:
    """Build a network.

    Args:
        network: Its architecture.
        channels: Channels of the input, float [B, channels, side, side].
        classes: Number of logits; 0 for no classifier.
        drop_rate: Dropout before every dense layer and the classifier.

    Returns:
        The network and the width of its features.
    """
    layers: list[nn.Module] = []
    width = channels
    for filters, kernel, padded in zip(network.filters, network.kernels, network.padded, strict=True):
        layers.append(nn.Conv2d(width, filters, kernel, padding=kernel // 2 if padded else 0))
        layers.append(nn.ReLU(inplace=True))
        if network.batch_norm:
            layers.append(nn.BatchNorm2d(filters))
        layers.append(nn.MaxPool2d(2))
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
