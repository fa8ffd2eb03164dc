"""Matrix products: few rows by reading the weights once, any number of rows in one fixed order, the rest by cuBLAS.

    y = round(x Wᵀ + b),  then the activation of y, rounded again

`_rows_kernel` (1 to 4 rows, all in one program): a program takes BLOCK_OUT rows of W, multiplies them with every row of
x in float32 and adds up the columns once, at the end. W is read once and not kept, 2 D O bytes in 16 bits; x comes from
L2, once per BLOCK_OUT outputs. The activation of y costs no further launch. With 8 rows the sums alone would fill the
registers.

Deterministic mode takes tiles (linear_tile.py). Blocks and instructions are those of the matrix and its dtype, whatever
T is, and columns are never divided among programs.

Letters: T rows, D = ins, O = outs.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .. import ops
from ..ops import Activation
from .activation import activated
from .launch import options, pick
from .linear_tile import Tile, finished, in_tiles


class Strip(NamedTuple):
    """Of `_rows_kernel`: outputs and columns at a time. Sums take rows · out · columns / (32 · warps) registers.

    With 8 columns or a multiple per thread no value changes threads before the end.
    """

    out: int
    columns: int
    warps: int


# Rows up to which `_rows_kernel` is taken, by architecture, for matrices below LARGE elements, which are bound by their
# launch, and for larger ones.
MOST_ROWS: Mapping[int, tuple[int, int]] = MappingProxyType({80: (4, 4)})
LARGE = 1 << 22
# By rows, filled up to a power of two: about 64 KiB of W on the way to a processor for 1 row, half as much for 2 and 4.
STRIPS: Mapping[int, Strip] = MappingProxyType({1: Strip(4, 1024, 4), 2: Strip(4, 1024, 4), 4: Strip(2, 1024, 4)})
# By bytes of an element, for a matrix of up to WIDE outputs and for one of more. 96 KiB of shared memory at most, as
# compute capability 8.9 has no more for one program.
TILES: Mapping[int, tuple[Tile, Tile]] = MappingProxyType(
    {2: (Tile(64, 64, 128, 8, 3), Tile(64, 128, 64, 8, 4)), 4: (Tile(32, 64, 32, 8, 3), Tile(32, 64, 32, 8, 3))}
)
WIDE = 16384


@triton.jit
def _rows_kernel(
    x,
    weight,
    bias,
    out,
    rows,
    outs,
    ins,
    x_stride,
    ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """`outs` counts the results: with silu_and_mul W has twice as many rows."""
    first = tl.program_id(0).to(tl.int64) * BLOCK_OUT
    row = tl.arange(0, ROWS)[:, None, None]
    output = tl.arange(0, BLOCK_OUT)[None, :, None]
    column = tl.arange(0, BLOCK)[None, None, :]
    live = first + output < outs
    x_place = x + row * x_stride + column
    place = weight + (first + output) * ins + column
    gated: tl.constexpr = ACTIVATION == "silu_and_mul"
    up_place = weight + (first + outs + output) * ins + column
    total = tl.zeros([ROWS, BLOCK_OUT, BLOCK], tl.float32)
    up = tl.zeros([ROWS, BLOCK_OUT, BLOCK], tl.float32)
    for start in range(0, ins, BLOCK):
        inside = start + column < ins
        given = (row < rows) & inside
        value = tl.load(x_place + start, mask=given, other=0.0, eviction_policy="evict_last").to(tl.float32)
        w = tl.load(place + start, mask=live & inside, other=0.0, eviction_policy="evict_first")
        total += value * w.to(tl.float32)
        if gated:
            w = tl.load(up_place + start, mask=live & inside, other=0.0, eviction_policy="evict_first")
            up += value * w.to(tl.float32)
    row = tl.arange(0, ROWS)[:, None].to(tl.int64)
    output = first + tl.arange(0, BLOCK_OUT)[None, :]
    live = output < outs
    y = finished(tl.sum(total, 2), None, None, bias, output, live, out.dtype.element_ty)
    if ACTIVATION is not None:
        y = activated(y, ACTIVATION)
    if gated:
        y *= finished(tl.sum(up, 2), None, None, bias, outs + output, live, out.dtype.element_ty)
    tl.store(out + row * outs + output, y.to(out.dtype.element_ty), mask=(row < rows) & live)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: Activation | None = None,
    deterministic: bool = False,
) -> Tensor:
    """`ops.linear`. x [T, D] may have any stride between rows, none within; weight [O, D] and bias are contiguous."""
    (rows, ins), outs = x.shape, weight.shape[0]
    assert weight.shape == (outs, ins) and weight.is_contiguous() and weight.dtype == x.dtype
    assert bias is None or (bias.shape == (outs,) and bias.is_contiguous() and bias.dtype == x.dtype)
    assert x.stride(1) == 1 or ins == 1
    if deterministic:
        tile = TILES[x.element_size()][outs > WIDE]
        return ops.activate(in_tiles(x, weight, bias, tile), activation)
    most = pick(MOST_ROWS, x.device)[outs * ins >= LARGE]
    if 0 < rows <= most:
        return _few_rows(x, weight, bias, activation)
    return ops.activate(F.linear(x, weight, bias), activation)


def _few_rows(x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation | None) -> Tensor:
    (rows, ins), outs = x.shape, weight.shape[0]
    gated = activation == "silu_and_mul"
    assert outs % 2 == 0 or not gated
    results = outs // 2 if gated else outs
    padded = triton.next_power_of_2(rows)
    strip = STRIPS[padded]
    block_out = strip.out // 2 if gated else strip.out
    out = x.new_empty((rows, results))
    _rows_kernel[(triton.cdiv(results, block_out),)](
        x,
        weight,
        bias,
        out,
        rows,
        results,
        ins,
        x.stride(0),
        padded,
        block_out,
        min(strip.columns, triton.next_power_of_2(ins)),
        activation,
        **options(strip.warps),
    )
    return out
