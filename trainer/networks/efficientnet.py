"""EfficientNet-B0 built from its blocks (Tan and Le 2019, https://arxiv.org/abs/1905.11946), and its form for 32x32.

4,020,358 parameters with 3 channels and 10 classes, whatever the strides.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import nn

_STEM, _HEAD = 32, 1280  # channels
_REDUCTION = 4  # of a block's input channels, by squeeze and excitation


class Stage(NamedTuple):
    """Blocks of one kind: how many times as wide inside, output channels, number, kernel side."""

    expansion: int
    channels: int
    blocks: int
    kernel: int


STAGES = (
    Stage(1, 16, 1, 3),
    Stage(6, 24, 2, 3),
    Stage(6, 40, 2, 5),
    Stage(6, 80, 3, 3),
    Stage(6, 112, 3, 5),
    Stage(6, 192, 4, 5),
    Stage(6, 320, 1, 3),
)
# Of the stem and of each stage's first block. For 32x32, what makes 7x7 of 224x224 would leave a single pixel.
STRIDES_224 = (2, 1, 2, 2, 2, 1, 2, 1)
STRIDES_32 = (1, 1, 1, 2, 2, 1, 2, 1)


class SqueezeExcitation(nn.Module):
    """Channels scaled by what a small network makes of their means (Hu et al. 2018, https://arxiv.org/abs/1709.01507)."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, squeezed, 1)
        self.excite = nn.Conv2d(squeezed, channels, 1)
        self.activation = nn.SiLU(inplace=True)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """float [B, channels, H, W] to the same."""
        means = features.mean(dim=(2, 3), keepdim=True)
        return features * self.excite(self.activation(self.squeeze(means))).sigmoid()


class StochasticDepth(nn.Module):
    """A residual branch that is left out, image by image, in training (Huang et al. 2016, https://arxiv.org/abs/1603.09382).

    Those that stay are scaled up, so that the mean is the same as in evaluation.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, branch: torch.Tensor) -> torch.Tensor:
        """float [B, C, H, W] to the same."""
        if not self.training or self.rate == 0:
            return branch
        stays = torch.rand(len(branch), 1, 1, 1, dtype=torch.float32, device=branch.device) >= self.rate
        return branch * stays.to(branch.dtype) / (1 - self.rate) if self.rate < 1 else branch * 0


class MBConv(nn.Module):
    """Widened, convolved channel by channel, squeezed and excited, and narrowed again, around a residual connection
    where the shape stays (Sandler et al. 2018, https://arxiv.org/abs/1801.04381)."""

    def __init__(self, width: int, stage: Stage, stride: int, drop_path_rate: float) -> None:
        super().__init__()
        inner = width * stage.expansion
        layers = _convolution(width, inner, 1, 1) if stage.expansion > 1 else []
        layers += _convolution(inner, inner, stage.kernel, stride, groups=inner)
        layers += [SqueezeExcitation(inner, width // _REDUCTION), *_convolution(inner, stage.channels, 1, 1)[:2]]
        self.layers = nn.Sequential(*layers)
        self.stochastic_depth = StochasticDepth(drop_path_rate)
        self.residual = stride == 1 and width == stage.channels

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """float [B, width, H, W] to [B, channels, ceil(H / stride), ceil(W / stride)]."""
        branch = self.layers(features)
        return features + self.stochastic_depth(branch) if self.residual else branch


def efficientnet_b0(
    channels: int,
    classes: int,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    strides: tuple[int, ...] = STRIDES_32,
) -> tuple[nn.Sequential, int]:
    """The network of images float [B, channels, R, R] of any size, and the width of its features.

    drop_path_rate: of the deepest branch; it rises in proportion to the depth. strides: of the stem and of each stage.
    classes 0: no classifier, the features come out.
    """
    layers = _convolution(channels, _STEM, 3, strides[0])
    width, depth, total = _STEM, 0, sum(stage.blocks for stage in STAGES)
    for stage, stride in zip(STAGES, strides[1:], strict=True):
        for number in range(stage.blocks):
            layers.append(MBConv(width, stage, 1 if number else stride, drop_path_rate * depth / total))
            width, depth = stage.channels, depth + 1
    layers += [*_convolution(width, _HEAD, 1, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    if classes:
        layers += [nn.Dropout(drop_rate), nn.Linear(_HEAD, classes)]
    model = nn.Sequential(*layers)
    model.apply(_initialise)
    return model, _HEAD


def _convolution(width: int, channels: int, kernel: int, stride: int, groups: int = 1) -> list[nn.Module]:
    """A convolution, its batch norm and its activation."""
    return [
        nn.Conv2d(width, channels, kernel, stride, padding=kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(channels),
        nn.SiLU(inplace=True),
    ]


def _initialise(module: nn.Module) -> None:
    """First weights as in the authors' code: of a variance of 2 over what a kernel's pixels reach (fan out)."""
    if isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, 0.0, math.sqrt(2 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Linear):
        nn.init.uniform_(module.weight, -1 / math.sqrt(module.out_features), 1 / math.sqrt(module.out_features))
        nn.init.zeros_(module.bias)
