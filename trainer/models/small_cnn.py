"""A small CNN for small images on a CPU."""

from __future__ import annotations

from torch import nn

_CHANNELS = (32, 64, 128)
_FEATURES = 128


def three_block_cnn(channels: int, classes: int, drop_rate: float) -> tuple[nn.Sequential, int]:
    """Build three blocks of convolution, batch norm, ReLU and pooling, and a hidden layer.

    241,898 parameters with 1 channel and 10 classes. The last feature map is pooled to 3x3.

    Args:
        channels: Channels of the input, float [B, channels, H, W] with sides of 4 or more.
        classes: Number of logits; 0 for no classifier.
        drop_rate: Dropout before the classifier.

    Returns:
        The network and the width of its features.
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
