"""Architectures of the networks in `trainer.models`, as data, so that settings are checked without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

# Networks that take images of any size, and the smallest side in pixels with a non-empty last feature map.
MIN_RESOLUTION = {
    "three_block_cnn": 4,
    "small_resnet": 11,
    "cifar_efficientnet": 1,
    "cifar_resnet20": 1,
    "cifar_resnet32": 1,
    "squeezenet1_1": 17,
}


@dataclass(frozen=True)
class PlainCnn:
    """Architecture of a network of convolutions with pooling, followed by dense layers.

    Attributes:
        side: Side of the square input in pixels.
        filters: Output channels of each convolution.
        kernels: Kernel size of each convolution.
        padded: Whether each convolution keeps the size of the image.
        dense: Widths of the dense layers before the classifier.
        batch_norm: Whether batch norm follows the ReLU of each convolution.
    """

    side: int
    filters: tuple[int, ...]
    kernels: tuple[int, ...]
    padded: tuple[bool, ...]
    dense: tuple[int, ...]
    batch_norm: bool = False

    def with_layers(
        self, filters: Sequence[int] | None, kernel: int | Sequence[int] | None, dense: Sequence[int] | None
    ) -> PlainCnn:
        """Replace layers; None keeps them.

        Args:
            filters: Output channels of each convolution.
            kernel: Kernel size of all convolutions, or of each.
            dense: Widths of the dense layers.

        Raises:
            ValueError: The layers do not fit together.
        """
        if filters is not None and len(filters) != len(self.filters):
            raise ValueError(f"model.filters has {len(filters)} numbers for {len(self.filters)} convolutions")
        kernels = (kernel,) * len(self.kernels) if isinstance(kernel, int) else tuple(kernel or self.kernels)
        if len(kernels) != len(self.kernels):
            raise ValueError(f"model.kernel has {len(kernels)} numbers for {len(self.kernels)} convolutions")
        for size, padded in zip(kernels, self.padded, strict=True):
            if padded and size % 2 == 0:
                raise ValueError(f"model.kernel={size} is even, but padded convolutions need an odd kernel size")
        network = replace(
            self,
            filters=self.filters if filters is None else tuple(filters),
            kernels=kernels,
            dense=self.dense if dense is None else tuple(dense),
        )
        if network.last_side < 1:
            raise ValueError(f"model.kernel={kernel} is too large for images of {self.side} pixels")
        return network

    @property
    def last_side(self) -> int:
        """Side of the last feature map; below 1 for an empty one."""
        side = self.side
        for kernel, padded in zip(self.kernels, self.padded, strict=True):
            side = (side if padded else side - kernel + 1) // 2
        return side


_TWO = PlainCnn(32, filters=(32, 64), kernels=(3, 3), padded=(True, True), dense=(128,))
_THREE = PlainCnn(64, filters=(16, 32, 32), kernels=(3, 3, 3), padded=(True, True, True), dense=(1024, 512))
_LENET = PlainCnn(28, filters=(6, 16), kernels=(5, 5), padded=(False, False), dense=(120, 84))

PLAIN_CNNS = {
    "cifar_cnn": _TWO,
    "cifar_cnn_batchnorm": replace(_TWO, dense=(256,), batch_norm=True),
    "lenet": _LENET,
    "numtadb_model1": _THREE,
    "numtadb_model2": replace(_LENET, side=48, filters=(6, 16, 32), kernels=(5, 5, 3), padded=(False, False, True)),
    "numtadb_model3": replace(_THREE, side=48),
}
