"""Small networks for small images, which a CPU trains in minutes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
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
            *_convolution(width, block_width),
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


class _ResidualBlock(nn.Sequential):
    """Two convolutions around a shortcut; ReLU follows the sum."""

    def __init__(self, width: int) -> None:
        super().__init__(*_convolution(width, width), *_convolution(width, width)[:2])
        self.relu = nn.ReLU(inplace=True)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map float [B, width, H, W] to the same shape."""
        residual = images
        for layer in list(self)[:-1]:
            residual = layer(residual)
        return self.relu(images + residual)


def small_resnet(
    channels: int,
    classes: int,
    drop_rate: float,
    widths: Sequence[int] = (32, 64, 128),
    depths: Sequence[int] | None = None,
) -> tuple[nn.Sequential, int]:
    """Build a small residual network: a stem, and stages of residual blocks with pooling and widening between.

    The form is that of Page's ResNet-9, https://github.com/davidcpage/cifar10-fast, except that the maps are pooled
    before they are widened, which takes a quarter of the time. The stem is a convolution of 5x5 with stride 2 without
    padding. It maps 28x28 pixels, whose border is empty in EMNIST, to 12x12, which can be pooled twice. The default
    has 482,666 parameters with 1 channel and 10 classes.

    Args:
        channels: Channels of the input, float [B, channels, H, W] with sides of 11 or more.
        classes: Number of logits; 0 for no classifier.
        drop_rate: Dropout before the classifier.
        widths: Channels of each stage. Multiples of 16 are fastest on a CPU.
        depths: Residual blocks of each stage; None for one.

    Returns:
        The network and the width of its features.

    Raises:
        ValueError: A width is below 1, or widths and depths differ in length.
    """
    if not widths or min(widths) < 1:
        raise ValueError(f"widths={list(widths)}, not one or more numbers above 0")
    stages: list[nn.Module] = []
    for number, (width, depth) in enumerate(zip(widths, depths or [1] * len(widths), strict=True)):
        if number:
            stages += [nn.MaxPool2d(2), *_convolution(widths[number - 1], width)]
        stages += [_ResidualBlock(width) for _ in range(depth)]
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        stem=nn.Sequential(*_convolution(channels, widths[0], kernel=5, stride=2, padding=0)),
        stages=nn.Sequential(*stages),
        pool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
    )
    if classes:
        layers["dropout"] = nn.Dropout(drop_rate)
        layers["classifier"] = nn.Linear(widths[-1], classes)
    return nn.Sequential(layers), widths[-1]


def _convolution(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, padding: int = 1) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    ]
