"""torchvision's SqueezeNet 1.1 (Iandola et al. 2016, https://arxiv.org/abs/1602.07360), which timm does not have."""

from __future__ import annotations

import torch
from torch import nn
from torchvision.models import SqueezeNet1_1_Weights
from torchvision.models import squeezenet1_1 as torchvision_squeezenet

_WEIGHTS = SqueezeNet1_1_Weights.IMAGENET1K_V1
WEIGHTS_URL = _WEIGHTS.url
_FEATURES = 512


def squeezenet1_1(channels: int, classes: int, drop_rate: float, pretrained: bool = False) -> tuple[nn.Module, int]:
    """Build the network: 727,626 parameters with 3 channels and 10 classes.

    Args:
        channels: Channels of the input, float [B, channels, H, W] with sides of 17 or more.
        classes: Number of logits; 0 for no classifier. The classifier is a 1x1 convolution with ReLU and average
            pooling, as published.
        drop_rate: Dropout before the classifier.
        pretrained: Start from ImageNet weights, except for the classifier. The weights of the first convolution are
            summed over its channels for gray images, and are random for other numbers of channels than 1 and 3.

    Returns:
        The network and the width of its features.
    """
    network = torchvision_squeezenet(weights=_WEIGHTS if pretrained else None)
    stem = network.features[0]
    if channels != stem.in_channels:
        network.features[0] = nn.Conv2d(channels, stem.out_channels, stem.kernel_size, stem.stride)
        if pretrained and channels == 1:
            with torch.no_grad():
                network.features[0].weight.copy_(stem.weight.sum(dim=1, keepdim=True))
                network.features[0].bias.copy_(stem.bias)
    if not classes:
        network.classifier = nn.AdaptiveAvgPool2d(1)
        return network, _FEATURES
    head = nn.Conv2d(_FEATURES, classes, 1)
    nn.init.normal_(head.weight, std=0.01)
    assert head.bias is not None
    nn.init.zeros_(head.bias)
    network.classifier = nn.Sequential(nn.Dropout(drop_rate), head, nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1))
    return network, _FEATURES
