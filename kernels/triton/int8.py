"""Rows in int8: rounding to them, and their values as floats again.

quantize_rows   scale = max(max|x| / 127, 2⁻¹²⁶),   y = round(x / scale), halves to even, within ±127

2⁻¹²⁶ is the smallest normal float32. One program per row, which it keeps in registers: x is read once, y and the scale
are written once: 3 D + 4 bytes per row in 16 bits. The quantizing norms (norm.py) do the same to their results.

Letters: T rows, D width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops import Int8
from .launch import options, warps

MAX_WIDTH = 65536  # beyond, a row does not fit the registers of 16 warps

SMALLEST: tl.constexpr = tl.constexpr(2.0**-126)
HALFWAY: tl.constexpr = tl.constexpr(1.5 * 2.0**23)  # a float32 near it has no fraction: added, it rounds as IEEE does
HALFWAY_BITS: tl.constexpr = tl.constexpr(0x4B400000)


@triton.jit
def to_int8(x, scale):
    """x / scale [...], both float32, halves to even, within ±127."""
    whole = tl.minimum(tl.maximum(tl.div_rn(x, scale), -127.0), 127.0)
    return ((whole + HALFWAY) - HALFWAY).to(tl.int8)


@triton.jit
def row_to_int8(x):
    """(x [D] float32 in int8, its scale)."""
    scale = tl.maximum(tl.div_rn(tl.max(tl.abs(x), 0), 127.0), SMALLEST)
    return to_int8(x, scale), scale


@triton.jit
def widen(x, DTYPE: tl.constexpr):
    """x in DTYPE. int8 to float16 and float32 without the slow integer conversion, exactly: the bits of 1024 + 128 + x,
    less 1152, and those of 1.5 · 2²³ + x, less the same.
    """
    if x.dtype == tl.int8 and tl.float16 == DTYPE:
        biased = (x.to(tl.uint8, bitcast=True) ^ 0x80).to(tl.uint16) | 0x6400
        return biased.to(tl.float16, bitcast=True) - tl.full(x.shape, 1152.0, tl.float16)
    elif x.dtype == tl.int8 and tl.float32 == DTYPE:
        return (x.to(tl.int32) + HALFWAY_BITS).to(tl.float32, bitcast=True) - HALFWAY
    else:
        return x.to(DTYPE)


@triton.jit
def _quantize_kernel(x, values, scales, stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    value, scale = row_to_int8(tl.load(x + row * stride + column, mask=inside, other=0.0).to(tl.float32))
    tl.store(values + row * width + column, value, mask=inside)
    tl.store(scales + row, scale)


def quantize_rows(x: Tensor) -> Int8:
    """`ops.quantize_rows`. x [T, D] may have any stride between rows, none within."""
    rows, width = x.shape
    assert width <= MAX_WIDTH and (x.stride(1) == 1 or width == 1)
    found = empty_rows(x)
    if rows:
        block = triton.next_power_of_2(width)
        _quantize_kernel[(rows,)](x, *found, x.stride(0), width, block, **options(warps(block)))
    return found


def empty_rows(x: Tensor) -> Int8:
    """Room for x [T, D] in int8."""
    return Int8(torch.empty(x.shape, dtype=torch.int8, device=x.device), x.new_empty(len(x), dtype=torch.float32))
