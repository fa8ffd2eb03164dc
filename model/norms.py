"""Normalisations with their weights."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from ..kernels import ops
from .slots import Place, Slot


class RMSNorm(nn.Module):
    """`ops.rms_norm` with a weight. With a residual, that becomes the sum which is normalised."""

    def __init__(self, size: int, eps: float, place: Place) -> None:
        super().__init__()
        self.weight, self.eps = nn.Buffer(place.empty(size)), eps

    def slots(self, path: str) -> Iterator[Slot]:
        yield Slot(f"{path}.weight", self.weight)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps, residual)


class LayerNorm(nn.Module):
    """`ops.layer_norm` with weight and bias. With a residual, that becomes the sum which is normalised.

    Not `affine`: the checkpoint has neither weight nor bias, and they are 1 and 0.
    """

    def __init__(self, size: int, eps: float, place: Place, affine: bool = True) -> None:
        super().__init__()
        self.weight, self.bias = nn.Buffer(place.zeros(size) + 1), nn.Buffer(place.zeros(size))
        self.eps, self.affine = eps, affine

    def slots(self, path: str) -> Iterator[Slot]:
        if not self.affine:
            return
        yield Slot(f"{path}.weight", self.weight)
        yield Slot(f"{path}.bias", self.bias)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias, self.eps, residual)
