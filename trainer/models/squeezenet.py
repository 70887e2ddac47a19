"""SqueezeNet 1.1 (Iandola et al. 2016, https://arxiv.org/abs/1602.07360), which timm does not have: torchvision's."""

from __future__ import annotations

import torch
from torch import nn
from torchvision.models import SqueezeNet1_1_Weights
from torchvision.models import squeezenet1_1 as torchvision_squeezenet

_WEIGHTS = SqueezeNet1_1_Weights.IMAGENET1K_V1
PUBLISHED = _WEIGHTS.url
_FEATURES = 512


def squeezenet1_1(channels: int, classes: int, drop_rate: float, published: bool = False) -> tuple[nn.Module, int]:
    """The network of images float [B, channels, R, R], R from 17 up, and the width of its features.

    727,626 parameters with 3 channels and 10 classes. The classifier is a 1x1 convolution with ReLU, as published, and
    its mean over the image. published: begin with the ImageNet weights, but for the classifier; a first convolution of
    one channel is then the sum over the three. classes 0: no classifier, the features come out.
    """
    network = torchvision_squeezenet(weights=_WEIGHTS if published else None)
    stem = network.features[0]
    if channels != stem.in_channels:
        network.features[0] = nn.Conv2d(channels, stem.out_channels, stem.kernel_size, stem.stride)
        if published and channels == 1:
            with torch.no_grad():
                network.features[0].weight.copy_(stem.weight.sum(dim=1, keepdim=True))
                network.features[0].bias.copy_(stem.bias)
    if not classes:
        network.classifier = nn.AdaptiveAvgPool2d(1)
        return network, _FEATURES
    head = nn.Conv2d(_FEATURES, classes, 1)
    nn.init.normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)
    network.classifier = nn.Sequential(nn.Dropout(drop_rate), head, nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1))
    return network, _FEATURES
