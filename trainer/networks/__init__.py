"""Which networks are written down here rather than taken from timm? Small ones, and those of earlier systems."""
