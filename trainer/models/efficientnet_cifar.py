"""EfficientNet for 32x32 images: timm's blocks with smaller strides.

Tan and Le 2019, https://arxiv.org/abs/1905.11946. 4,020,358 parameters with 3 channels and 10 classes,
where the multipliers are 1.
"""

from __future__ import annotations

from functools import partial

from timm.models._efficientnet_builder import decode_arch_def, round_channels
from timm.models.efficientnet import EfficientNet
from torch import nn

from trainer.config.schema import ModelConfig

# Stages of EfficientNet-B0 in timm's notation. The strides of the stem and of the second stage are 1, not 2: at 32x32
# the published ones would leave a single pixel of the last feature map, these leave 4x4.
_STAGES = [
    ["ds_r1_k3_s1_e1_c16_se0.25"],
    ["ir_r2_k3_s1_e6_c24_se0.25"],
    ["ir_r2_k5_s2_e6_c40_se0.25"],
    ["ir_r3_k3_s2_e6_c80_se0.25"],
    ["ir_r3_k5_s1_e6_c112_se0.25"],
    ["ir_r4_k5_s2_e6_c192_se0.25"],
    ["ir_r1_k3_s1_e6_c320_se0.25"],
]


def efficientnet_cifar(settings: ModelConfig, channels: int, classes: int) -> tuple[EfficientNet, int]:
    """Build the network.

    Args:
        settings: Dropout before the classifier, stochastic depth of the last block (it rises linearly with the depth),
            the factors of all widths and of the number of blocks in a stage, and further arguments, as stem_size.
        channels: Channels of the input, float [B, channels, H, W] of any size.
        classes: Number of logits; 0 for no classifier, so that the features come out.

    Returns:
        The network and the width of its features.
    """
    round_chs_fn = partial(round_channels, multiplier=settings.channel_multiplier)
    network = EfficientNet(
        decode_arch_def(_STAGES, settings.depth_multiplier),
        num_classes=classes,
        num_features=round_chs_fn(1280),
        in_chans=channels,
        act_layer=nn.SiLU,
        round_chs_fn=round_chs_fn,
        drop_rate=settings.drop_rate,
        drop_path_rate=settings.drop_path_rate,
        **{"stem_size": 32, **settings.options},
    )
    network.conv_stem.stride = (1, 1)
    return network, network.num_features
