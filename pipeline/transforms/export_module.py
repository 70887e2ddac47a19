"""The transform as a module of plain tensor operations, which travels inside an exported model."""

from __future__ import annotations

import torch
from torch import nn

from pipeline.transforms.ops.resize import resize_weights
from pipeline.transforms.spec import TransformSpec


class TransformModule(nn.Module):
    """The computation of `TorchTransform` as a module without state: stored images uint8 [N, H, W, C] to float32
    [N, C, R, R]. Image files of differing sizes are not supported."""

    def __init__(self, spec: TransformSpec) -> None:
        super().__init__()
        assert not spec.encoded
        self._transposed = spec.transposed
        self._preprocessing = spec.preprocessing
        self._resizes = spec.needs_resize
        mean, std = (torch.tensor(each, dtype=torch.float64)[:, None, None] for each in (spec.mean, spec.std))
        numbers = {"scale": 1 / (255 * std), "shift": -mean / std}
        if spec.needs_resize:
            height, width = spec.upright_size
            numbers["rows"] = torch.from_numpy(resize_weights(height, spec.resolution, spec.interpolation))  # [R, H]
            columns = resize_weights(width, spec.resolution, spec.interpolation)  # [R, W]
            numbers["columns"] = torch.from_numpy(columns.T.copy())
        for name, each in numbers.items():
            self.register_buffer(name, each.float())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        planes = self._preprocessing(images).permute(0, 3, 1, 2)
        pixels = (planes.mT if self._transposed else planes).float() * self.scale + self.shift
        return self.rows @ (pixels @ self.columns) if self._resizes else pixels
