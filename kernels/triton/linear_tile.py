"""Matrix products on tensor cores: blocks of rows × blocks of outputs, columns in ascending order.

    y = round(x Wᵀ · x's scale · W's scale + b),  then the activation of y, rounded again; without scales, 1

Blocks at the edges are padded. Values of W in int8 are converted in registers, exactly, to the dtype of x in floats;
with x in int8 the products are summed in int32, which is exact. W's columns may be divided into parts, whose sums
`_merge_kernel` adds in their order: 8 bytes per part, row and output.

Bits of a row depend on the tile, the parts, the row, W and b, not on T or on the rows beside it. W is read once per
GROUP blocks of rows, x once per block of outputs, mostly from L2.

Letters: T rows, D = ins, O = outs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops import Activation
from .activation import activated
from .int8 import widen
from .launch import options, warps

GROUP = 8
MERGED = 512  # outputs of a program of `_merge_kernel`


class Tile(NamedTuple):
    """Rows, outputs, columns at a time, and how many such columns are on their way."""

    rows: int
    out: int
    columns: int
    warps: int
    stages: int


@triton.jit
def finished(total, x_scale, scale, bias, output, live, DTYPE: tl.constexpr):
    """Sums times their row's scale and their output's, with its bias: float32 of what DTYPE can hold."""
    y = total.to(tl.float32)
    if x_scale is not None:
        y *= x_scale
    if scale is not None:
        y *= tl.load(scale + output, mask=live, other=0.0)
    if bias is not None:
        y += tl.load(bias + output, mask=live, other=0.0).to(tl.float32)
    return y.to(DTYPE).to(tl.float32)


@triton.jit
def _plus_product(total, x, w):
    """total + x [rows, columns] · w [columns, outs]."""
    if x.dtype == tl.int8:
        return tl.dot(x, w, total, out_dtype=tl.int32)
    else:
        return tl.dot(x, widen(w, x.dtype), total, input_precision="ieee")


@triton.jit(do_not_specialize=["rows"])
def _tile_kernel(
    x,
    x_scale,
    weight,
    scale,
    bias,
    out,
    sums,  # [parts, rows, outs], float32 or int32; None without parts
    rows,
    outs,
    ins,
    share,  # columns of a part, a multiple of BLOCK
    x_stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """`outs` counts the results: with silu_and_mul W has twice as many rows.

    Programs one behind another share the outputs' block of W, in groups of GROUP blocks of rows.
    """
    index = tl.program_id(0)
    down, across = tl.cdiv(rows, BLOCK_ROWS), tl.cdiv(outs, BLOCK_OUT)
    above = index // (GROUP * across) * GROUP
    height = tl.minimum(down - above, GROUP)
    inside = index % (GROUP * across)
    row = (above + inside % height).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    output = (inside // height).to(tl.int64) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    column = tl.arange(0, BLOCK)
    part = tl.program_id(1)
    first = part * share
    gated: tl.constexpr = ACTIVATION == "silu_and_mul"
    x_place = x + row[:, None] * x_stride + column[None, :]
    place = weight + output[None, :] * ins + column[:, None]
    up_place = weight + (outs + output)[None, :] * ins + column[:, None]
    sum_dtype: tl.constexpr = tl.int32 if x.dtype.element_ty == tl.int8 else tl.float32
    total = tl.zeros([BLOCK_ROWS, BLOCK_OUT], sum_dtype)
    up = tl.zeros([BLOCK_ROWS, BLOCK_OUT], sum_dtype)
    for start in range(first, tl.minimum(first + share, ins), BLOCK):
        left = ins - start
        value = tl.load(x_place + start, mask=(row[:, None] < rows) & (column[None, :] < left), other=0)
        live = (output[None, :] < outs) & (column[:, None] < left)
        total = _plus_product(total, value, tl.load(place + start, mask=live, other=0))
        if gated:
            up = _plus_product(up, value, tl.load(up_place + start, mask=live, other=0))
    live = output[None, :] < outs
    kept = (row[:, None] < rows) & live
    if sums is not None:
        target = sums + part.to(tl.int64) * rows * outs + row[:, None] * outs + output[None, :]
        tl.store(target, total, mask=kept)
    else:
        factor = None
        if x_scale is not None:
            factor = tl.load(x_scale + row, mask=row < rows, other=0.0)[:, None]
        y = finished(total, factor, scale, bias, output[None, :], live, out.dtype.element_ty)
        if ACTIVATION is not None:
            y = activated(y, ACTIVATION)
        if gated:
            y *= finished(up, factor, scale, bias, (outs + output)[None, :], live, out.dtype.element_ty)
        tl.store(out + row[:, None] * outs + output[None, :], y.to(out.dtype.element_ty), mask=kept)


@triton.jit
def _summed(place, live, step, PARTS: tl.constexpr):
    total = tl.load(place, mask=live, other=0)
    for part in tl.static_range(1, PARTS):
        total += tl.load(place + part * step, mask=live, other=0)
    return total


@triton.jit(do_not_specialize=["rows"])
def _merge_kernel(
    sums,  # [PARTS, rows, width]
    x_scale,
    scale,
    bias,
    out,
    rows,
    outs,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """`outs` counts the results: with silu_and_mul the sums of a row are twice as many."""
    row = tl.program_id(0).to(tl.int64)
    output = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = output < outs
    gated: tl.constexpr = ACTIVATION == "silu_and_mul"
    width = outs * 2 if gated else outs
    factor = None
    if x_scale is not None:
        factor = tl.load(x_scale + row)
    place, step = sums + row * width + output, rows.to(tl.int64) * width
    y = finished(_summed(place, live, step, PARTS), factor, scale, bias, output, live, out.dtype.element_ty)
    if ACTIVATION is not None:
        y = activated(y, ACTIVATION)
    if gated:
        up = _summed(place + outs, live, step, PARTS)
        y *= finished(up, factor, scale, bias, outs + output, live, out.dtype.element_ty)
    tl.store(out + row * outs + output, y.to(out.dtype.element_ty), mask=live)


def in_tiles(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tile: Tile,
    *,
    parts: int = 1,
    activation: Activation | None = None,
    x_scale: Tensor | None = None,
    scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The product in `dtype` (x's) of x [T, D], any stride between rows, with weight [O, D]; scales [T] and [O].

    `parts`: into how many W's columns are divided, at most. Only what `dtype` rounds is the same for all parts.
    """
    (rows, ins), outs = x.shape, weight.shape[0]
    gated = activation == "silu_and_mul"
    results = outs // 2 if gated else outs
    out = x.new_empty((rows, results), dtype=dtype or x.dtype)
    if not out.numel():
        return out
    exact = x.dtype == torch.int8
    sizes = options(tile.warps, tile.stages) | {"enable_fp_fusion": not exact}
    share = triton.cdiv(triton.cdiv(ins, tile.columns), parts) * tile.columns
    parts = triton.cdiv(ins, share)
    whole = parts == 1
    sums = None if whole else x.new_empty((parts, rows, outs), dtype=torch.int32 if exact else torch.float32)
    width, block_out = (results, tile.out // 2) if gated and whole else (outs, tile.out)
    _tile_kernel[(triton.cdiv(rows, tile.rows) * triton.cdiv(width, block_out), parts)](
        x,
        x_scale,
        weight,
        scale,
        bias,
        out,
        sums,
        rows,
        width,
        ins,
        share,
        x.stride(0),
        tile.rows,
        block_out,
        tile.columns,
        GROUP,
        activation if whole else None,
        **sizes,
    )
    if not whole:
        block = min(MERGED, triton.next_power_of_2(results))
        _merge_kernel[(rows, triton.cdiv(results, block))](
            sums,
            x_scale,
            scale,
            bias,
            out,
            rows,
            results,
            parts,
            block,
            activation,
            **options(warps(block, per_thread=4)) | {"enable_fp_fusion": not exact},
        )
    return out
