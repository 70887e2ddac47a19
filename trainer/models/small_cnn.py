"""The small network for small images on a CPU: three blocks, as of an earlier MNIST system."""

from __future__ import annotations

from torch import nn

_CHANNELS = (32, 64, 128)
_FEATURES = 128


def three_block_cnn(channels: int, classes: int, drop_rate: float) -> tuple[nn.Sequential, int]:
    """Three blocks of convolution, batch norm, ReLU and pooling; a hidden layer of 128; a classifier. And 128.

    channels of the blocks: 32, 64, 128; 241,898 parameters with 1 channel and 10 classes. Images of any size from 4x4
    up: the last feature map is pooled to 3x3 (its size for 28x28 images). classes 0: no classifier, the 128 features
    come out.
    """
    layers: list[nn.Module] = []
    width = channels
    for number, block_width in enumerate(_CHANNELS):
        layers += [
            nn.Conv2d(width, block_width, 3, padding=1, bias=False),
            nn.BatchNorm2d(block_width),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2) if number < 2 else nn.AdaptiveMaxPool2d(3),
        ]
        width = block_width
    layers += [
        nn.Flatten(),
        nn.Linear(9 * width, _FEATURES, bias=False),
        nn.BatchNorm1d(_FEATURES),
        nn.ReLU(inplace=True),
    ]
    if classes:
        layers += [nn.Dropout(drop_rate), nn.Linear(_FEATURES, classes)]
    return nn.Sequential(*layers), _FEATURES
