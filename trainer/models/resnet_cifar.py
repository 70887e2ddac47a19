"""ResNet-20 and ResNet-32 for 32x32 images, which neither timm nor torchvision has.

He et al. 2016, https://arxiv.org/abs/1512.03385, section 4.2: three stages of 16, 32 and 64 channels, and shortcuts
without parameters. With 3 channels and 10 classes, cifar_resnet20 has 269,722 parameters, cifar_resnet32 464,154.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

BLOCKS = {"cifar_resnet20": 3, "cifar_resnet32": 5}  # of each stage
_CHANNELS = (16, 32, 64)


class _Block(nn.Module):
    """Two convolutions and a shortcut, which subsamples and appends channels of zeros where the shape changes."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.stride = 1 if inputs == outputs else 2
        self.conv1 = nn.Conv2d(inputs, outputs, 3, self.stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.added_channels = outputs - inputs

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map float [B, inputs, H, W] to [B, outputs, H / stride, W / stride]."""
        residual = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(images)))))
        shortcut = images
        if self.added_channels:
            shortcut = F.pad(images[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.added_channels))
        return F.relu(residual + shortcut)


def resnet_cifar(blocks: int, channels: int, classes: int, drop_rate: float) -> tuple[nn.Sequential, int]:
    """Build the network of 6 blocks + 2 layers.

    Args:
        blocks: Blocks of each stage.
        channels: Channels of the input, float [B, channels, H, W] of any size.
        classes: Number of logits; 0 for no classifier.
        drop_rate: Dropout before the classifier; the published network has none.

    Returns:
        The network and the width of its features.
    """
    width = _CHANNELS[0]
    layers: list[nn.Module] = [
        nn.Conv2d(channels, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
    ]
    for outputs in _CHANNELS:
        for _ in range(blocks):
            layers.append(_Block(width, outputs))
            width = outputs
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    if classes:
        layers += [nn.Dropout(drop_rate), nn.Linear(width, classes)]
    network = nn.Sequential(*layers)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
    return network, width
