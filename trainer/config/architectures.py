"""Descriptions of the networks defined in `trainer.models`, as data: settings are checked against them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

# Those that take images of any size, and the smallest side in pixels that leaves something of the last feature map.
MIN_RESOLUTION = {"three_block_cnn": 4, "cifar_efficientnet": 1, "squeezenet1_1": 17}


@dataclass(frozen=True)
class PlainCnn:
    """What a plain network consists of.

    side: of its square input, in pixels. filters: output channels of each convolution. kernels: their sides in pixels.
    padded: which of them keep the size of the image. dense: widths of the dense layers before the classifier.
    batch_norm: whether one follows each convolution.
    """

    side: int
    filters: tuple[int, ...]
    kernels: tuple[int, ...]
    padded: tuple[bool, ...]
    dense: tuple[int, ...]
    batch_norm: bool = False

    def with_layers(self, filters: Sequence[int] | None, kernel: int | None, dense: Sequence[int] | None) -> PlainCnn:
        """With other filters, one kernel side for all convolutions, or other dense layers; None leaves what is there.

        Raises `ValueError` for what does not fit.
        """
        if filters is not None and len(filters) != len(self.filters):
            raise ValueError(f"{len(filters)} numbers of filters for {len(self.filters)} convolutions (model.filters)")
        if kernel is not None and kernel % 2 == 0 and any(self.padded):
            raise ValueError(f"a kernel of {kernel}x{kernel} (model.kernel), where only an odd one is padded evenly")
        changed = replace(
            self,
            filters=self.filters if filters is None else tuple(filters),
            kernels=self.kernels if kernel is None else (kernel,) * len(self.kernels),
            dense=self.dense if dense is None else tuple(dense),
        )
        if changed.last_side < 1:
            raise ValueError(f"a kernel of {kernel}x{kernel} (model.kernel), which leaves nothing of the image")
        return changed

    @property
    def last_side(self) -> int:
        """Side of the last feature map; below 1 for none."""
        side = self.side
        for kernel, padded in zip(self.kernels, self.padded, strict=True):
            side = (side if padded else side - kernel + 1) // 2
        return side


_TWO = PlainCnn(32, filters=(32, 64), kernels=(3, 3), padded=(True, True), dense=(128,))
_THREE = PlainCnn(64, filters=(16, 32, 32), kernels=(3, 3, 3), padded=(True, True, True), dense=(1024, 512))

PLAIN_CNNS = {
    "cifar_cnn": _TWO,
    "cifar_cnn_batchnorm": replace(_TWO, dense=(256,), batch_norm=True),
    "lenet": PlainCnn(28, filters=(6, 16), kernels=(5, 5), padded=(False, False), dense=(120, 84)),
    "numtadb_model1": _THREE,
    "numtadb_model2": PlainCnn(
        48, filters=(6, 16, 32), kernels=(5, 5, 3), padded=(False, False, True), dense=(120, 84)
    ),
    "numtadb_model3": replace(_THREE, side=48),
}
