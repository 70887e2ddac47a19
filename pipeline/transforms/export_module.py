"""The transform as a torch module, part of an exported model."""

from __future__ import annotations

import torch
from torch import nn

from pipeline.transforms.ops.resize import resize_weights
from pipeline.transforms.spec import TransformSpec


class TransformModule(nn.Module):
    """The computation of `TorchTransform` without augmentation, in plain tensor operations without state.

    Maps stored images uint8 [N, H, W, C] to float32 [N, C, R, S]. Image files of differing sizes are not supported.
    """

    def __init__(self, spec: TransformSpec) -> None:
        super().__init__()
        assert not spec.encoded
        self.scale: torch.Tensor
        self.shift: torch.Tensor
        self.rows: torch.Tensor
        self.columns: torch.Tensor
        self._transposed = spec.transposed
        self._preprocessing = spec.preprocessing
        self._resizes = spec.needs_resize
        mean, std = (torch.tensor(each, dtype=torch.float64)[:, None, None] for each in (spec.mean, spec.std))
        buffers = {"scale": 1 / (255 * std), "shift": -mean / std}
        if spec.needs_resize:
            (height, width), size = spec.upright_size, spec.input_size
            buffers["rows"] = torch.from_numpy(resize_weights(height, size[0], spec.interpolation))  # [R, H]
            columns = resize_weights(width, size[1], spec.interpolation)  # [S, W]
            buffers["columns"] = torch.from_numpy(columns.T.copy())
        for name, values in buffers.items():
            self.register_buffer(name, values.float())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        planes = self._preprocessing(images).permute(0, 3, 1, 2)
        pixels = (planes.mT if self._transposed else planes).float() * self.scale + self.shift
        return self.rows @ (pixels @ self.columns) if self._resizes else pixels
