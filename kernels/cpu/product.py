"""Matrices in panels, and products with them, on CPUs. See product.h."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import PANEL, Activation, Packed
from .native import Linear, Pack, at, native, number

ACTIVATIONS: tuple[Activation | None, ...] = (None, "silu_and_mul", "gelu_tanh", "gelu")  # by number


def pack(weight: Tensor, activation: Activation | None = None) -> Packed | None:
    """`ops.pack`. Gate and up must fill whole panels."""
    found, (outs, ins) = native(), weight.shape
    gated = activation == "silu_and_mul"
    if found is None or number(weight.dtype) is None or (gated and outs % (2 * PANEL)):
        return None
    if weight.dtype == torch.float32 and not (weight.view(torch.int32) & 0xFFFF).any():
        weight = weight.bfloat16()
    weight = F.pad(weight, (0, ins % 2)).contiguous()
    panels, depth = -(-outs // PANEL), weight.shape[1]
    shape = (panels, depth // 2, PANEL, 2) if weight.dtype == torch.bfloat16 else (panels, depth, PANEL)
    data = torch.empty(shape, dtype=weight.dtype)
    found.run("tandem_pack", Pack(at(weight), at(data), outs, depth, number(weight.dtype)))
    return Packed(data, outs, ins)


def packed_linear(
    x: Tensor, weight: Packed, bias: Tensor | None = None, activation: Activation | None = None
) -> Tensor:
    found, kind = native(), number(x.dtype)
    assert found is not None and kind is not None, "what was packed here is computed here"
    x = F.pad(x, (0, 1)) if weight.ins % 2 else x.contiguous()
    rows, outs = x.shape[0], weight.outs // 2 if activation == "silu_and_mul" else weight.outs
    y = torch.empty(rows, outs, dtype=x.dtype)
    wide = torch.empty(x.shape, dtype=torch.float32) if kind and not found.multiplies_bfloat16 else None
    shape = (rows, x.shape[1], outs, ACTIVATIONS.index(activation), kind, number(weight.data.dtype))
    found.run("tandem_linear", Linear(at(x), at(weight.data), at(bias), at(y), at(wide), *shape))
    return y
