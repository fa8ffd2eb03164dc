"""The storage of one matrix [outs, ins], written by its slots and then brought into its device's order.

`PlainMatrix` keeps it in the model's dtype, `Int8Matrix` quantized. `Linear` makes one of them and asks nothing else.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..kernels import ops
from ..kernels.ops import Activation, Int8, Packed, PackedInt8
from .quantization import SCHEMES, SchemeName, dequantized, quantize_into
from .slots import Place


class PlainMatrix(nn.Module):
    """In the model's dtype. `shared`: storage to use instead of an own one (tied embeddings)."""

    plain: Tensor | None  # [outs, ins]
    packed: Packed | None = None  # the same in the device's own order

    def __init__(self, outs: int, ins: int, place: Place, shared: Tensor | None = None) -> None:
        super().__init__()
        self._dtype, self._deterministic = place.dtype, place.deterministic
        self.plain = nn.Buffer(place.empty(outs, ins) if shared is None else shared)

    @property
    def weight(self) -> Tensor:
        """[outs, ins]: the matrix itself, or a copy of it where only the packed form is kept."""
        if self.plain is not None:
            return self.plain
        assert self.packed is not None
        return self.packed.unpack().to(self._dtype)

    @property
    def packed_bytes(self) -> int:
        """Of what is no buffer of this module."""
        return 0 if self.packed is None else self.packed.data.nbytes

    def parts(self, outs: tuple[int, ...]) -> list[tuple[Tensor, Tensor | None]]:
        """What each of the checkpoint's matrices is written to, and its scales."""
        return [(part, None) for part in self.weight.split_with_sizes(outs)]

    def finish(self, pack: bool, activation: Activation | None) -> None:
        """All parts are written. `pack`: change to the device's own order, if it has one."""
        assert self.plain is not None
        if pack and (packed := ops.pack(self.plain, activation)) is not None:
            self.plain, self.packed = None, packed

    def exchange(self, other: PlainMatrix | Int8Matrix) -> None:
        """Takes over what is no buffer."""
        assert isinstance(other, PlainMatrix)
        self.packed = other.packed

    def product(self, x: Tensor, bias: Tensor | None, activation: Activation | None) -> Tensor:
        """x [T, ins] -> [T, outs], with silu_and_mul half as many."""
        if self.packed is not None:
            return ops.packed_linear(x, self.packed, bias, activation)
        return ops.linear(x, self.weight, bias, activation, self._deterministic)


class Int8Matrix(nn.Module):
    """In int8 with a scale per output. `tied`: a matrix in the model's dtype from which this one is made when that is
    filled; its slots are this one's."""

    values: Tensor | None  # [outs, ins] int8
    scale: Tensor | None  # [outs] float32
    packed: PackedInt8 | None = None  # the same in the device's own order

    def __init__(self, scheme: SchemeName, outs: int, ins: int, place: Place, tied: Tensor | None = None) -> None:
        super().__init__()
        self._scheme, self._dtype, self._deterministic = SCHEMES[scheme], place.dtype, place.deterministic
        self.values = nn.Buffer(place._replace(dtype=torch.int8).empty(outs, ins))
        self.scale = nn.Buffer(place._replace(dtype=torch.float32).empty(outs))
        self._tied = tied

    @property
    def int8(self) -> Int8:
        """The matrix itself, or a copy of it where only the packed form is kept."""
        if self.packed is not None:
            return self.packed.unpack()
        assert self.values is not None and self.scale is not None
        return Int8(self.values, self.scale)

    @property
    def weight(self) -> Tensor:
        """[outs, ins]: a copy, as the model's dtype can hold it."""
        return dequantized(self.int8).to(self._dtype)

    @property
    def packed_bytes(self) -> int:
        """Of what is no buffer of this module."""
        if self.packed is None:
            return 0
        return sum(
            part.nbytes for part in (self.packed.data, self.packed.scale, self.packed.totals) if part is not None
        )

    def parts(self, outs: tuple[int, ...]) -> list[tuple[Tensor, Tensor | None]]:
        """What each of the checkpoint's matrices is written to, and its scales."""
        if self._tied is not None:
            return [(part, None) for part in self._tied.split_with_sizes(outs)]
        values, scale = self.int8
        return list(zip(values.split_with_sizes(outs), scale.split_with_sizes(outs), strict=True))

    def finish(self, pack: bool, activation: Activation | None) -> None:
        """All parts are written. `pack`: change to the device's own order, if it has one."""
        assert self.values is not None and self.scale is not None
        if self._tied is not None:
            quantize_into(self._tied, Int8(self.values, self.scale))
        packed = ops.pack_int8(self.values, self.scale, self._scheme.depth, activation) if pack else None
        if packed is not None:
            self.values, self.scale, self.packed = None, None, packed

    def exchange(self, other: PlainMatrix | Int8Matrix) -> None:
        """Takes over what is no buffer."""
        assert isinstance(other, Int8Matrix)
        self.packed = other.packed

    def product(self, x: Tensor, bias: Tensor | None, activation: Activation | None) -> Tensor:
        """x [T, ins] -> [T, outs], with silu_and_mul half as many."""
        if self.packed is not None:
            return ops.packed_linear_int8(x, self.packed, bias, activation)
        return self._scheme.product(x, self.int8, bias, activation, self._deterministic)
