"""Rows in int8, int8 matrices in panels, and products with them, on CPUs. See quantize.h and product.h."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..ops import PANEL, Activation, Int8, PackedInt8
from .native import LinearInt8, Quantize, at, native, number
from .product import ACTIVATIONS

ROWS = 128  # of a matrix that are brought into panels at once: whole panels


def quantize_rows(x: Tensor) -> Int8:
    found, kind = native(), number(x.dtype)
    if found is None or kind is None:
        return ops.quantize_rows.__wrapped__(x)
    x = x.contiguous()
    rows = Int8(torch.empty(x.shape, dtype=torch.int8), torch.empty(len(x)))
    found.run("tandem_quantize", Quantize(at(x), at(rows.values), at(rows.scale), *x.shape, kind))
    return rows


def pack_int8(values: Tensor, scale: Tensor, depth: int, activation: Activation | None = None) -> PackedInt8 | None:
    """`ops.pack_int8`. Gate and up must fill whole panels."""
    outs, ins = values.shape
    if native() is None or (activation == "silu_and_mul" and outs % (2 * PANEL)):
        return None
    panels, beyond = -(-outs // PANEL), -outs % PANEL
    side_by_side = {2: torch.int16, 4: torch.int32}[depth]
    data = torch.empty(panels, (ins + -ins % 4) // depth, PANEL, depth, dtype=torch.int8)
    totals = torch.zeros(panels * PANEL, dtype=torch.int32)
    for first in range(0, outs, ROWS):
        rows = values[first : first + ROWS]
        whole = F.pad(rows, (0, -ins % 4, 0, -len(rows) % PANEL)).view(side_by_side)  # [rows, ins / depth]
        into = data[first // PANEL :][: len(whole) // PANEL].view(side_by_side).squeeze(-1)
        into.copy_(whole.unflatten(0, (-1, PANEL)).mT)
        if depth == 4:
            totals[first : first + len(rows)] = torch.from_numpy(rows.numpy().sum(1, dtype=np.int32))
    return PackedInt8(data, F.pad(scale, (0, beyond)), totals if depth == 4 else None, outs, ins)


def packed_linear_int8(
    x: Tensor, weight: PackedInt8, bias: Tensor | None = None, activation: Activation | None = None
) -> Tensor:
    """`ops.packed_linear_int8`, in a fixed order where x is float32 or bfloat16."""
    found, kind, depth = native(), number(x.dtype), weight.depth
    if found is None or kind is None:
        return ops.packed_linear_int8.__wrapped__(x, weight, bias, activation)
    x = F.pad(x, (0, -weight.ins % 4)) if depth == 2 and weight.ins % 4 else x.contiguous()
    (rows, ins), outs = x.shape, weight.outs // 2 if activation == "silu_and_mul" else weight.outs
    y = torch.empty(rows, outs, dtype=x.dtype)
    room = torch.empty(rows, ins + 4)
    tensors = (x, weight.data, weight.scale, weight.totals, bias, y, room)
    shape = (rows, ins, outs, ACTIVATIONS.index(activation), kind, depth)
    found.run("tandem_linear_int8", LinearInt8(*map(at, tensors), *shape))
    return y
