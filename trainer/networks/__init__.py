"""Which networks are written down here rather than taken from timm? Small ones, and those of earlier systems."""

# Those that take images of any size, and the smallest side in pixels that leaves something of the last feature map.
SMALLEST = {"three_block_cnn": 4, "cifar_efficientnet": 1, "squeezenet1_1": 17}
