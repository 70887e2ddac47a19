"""The graph as a module of plain tensor operations, which travels inside an exported model."""

from __future__ import annotations

import torch
from torch import nn

from pipeline.graph import GraphSpec
from pipeline.graph_torch import Folded


class GraphModule(nn.Module):
    """Images uint8 [N, H, W, C] as they lie at rest to float32 [N, C, R, R]; the numbers of `TorchGraph`."""

    def __init__(self, spec: GraphSpec) -> None:
        """Raises `UserError` for picture files of differing sizes."""
        super().__init__()
        self._transposed = spec.transposed
        self._resizes = spec.resizes
        for name, numbers in Folded.of(spec)._asdict().items():
            if name in (("rows", "columns", "offset") if spec.resizes else ("scale", "shift")):
                self.register_buffer(name, numbers)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        planes = images.permute(0, 3, 1, 2)
        pixels = (planes.mT if self._transposed else planes).float()
        if not self._resizes:
            return pixels * self.scale + self.shift
        return self.rows @ ((pixels - self.offset) @ self.columns)
