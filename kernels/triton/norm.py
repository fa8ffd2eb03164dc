"""RMS norm and layer norm of rows, with the residual sum and the rounding to int8 in the same pass.

rms_norm    y = round(x / sqrt(mean(x²) + eps)) · weight, unrounded where the weight is float32
layer_norm  y = (x - mean(x)) / sqrt(var(x) + eps) · weight + bias

With a residual r: r = round(x + r), in place, takes x's place. One program per row, which it keeps in registers: x (and
r) are read once, y (and r) written once: 4 D bytes per row in 16 bits, 8 D with a residual; weight and bias stay in L2.
In int8 y, which is rounded to x's dtype first, and its scale take D + 4 of these bytes instead of 2 D.

Letters: T rows, D width.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..ops import Int8
from .int8 import MAX_WIDTH, empty_rows, row_to_int8
from .launch import options, warps


@triton.jit
def _store(y, place, scales, row, inside):
    """A row of results [D], 0 outside of the row, in their dtype or, where there is room for a scale, in int8."""
    if scales is not None:
        y, scale = row_to_int8(y.to(tl.float32))
        tl.store(scales + row, scale)
    tl.store(place, y, mask=inside)


@triton.jit
def _rms_norm_kernel(x, residual, weight, out, scales, x_stride, residual_stride, width, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(x + row * x_stride + column, mask=inside, other=0.0)
    if residual is not None:
        place = residual + row * residual_stride + column
        value = (value.to(tl.float32) + tl.load(place, mask=inside, other=0.0).to(tl.float32)).to(value.dtype)
        tl.store(place, value, mask=inside)
    wide = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / width + eps)
    factor = tl.load(weight + column, mask=inside, other=0.0)
    normal = (wide * scale).to(factor.dtype).to(tl.float32)
    _store((normal * factor.to(tl.float32)).to(value.dtype), out + row * width + column, scales, row, inside)


@triton.jit
def _layer_norm_kernel(
    x, residual, weight, bias, out, scales, x_stride, residual_stride, width, eps, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(x + row * x_stride + column, mask=inside, other=0.0)
    if residual is not None:
        place = residual + row * residual_stride + column
        value = (value.to(tl.float32) + tl.load(place, mask=inside, other=0.0).to(tl.float32)).to(value.dtype)
        tl.store(place, value, mask=inside)
    wide = value.to(tl.float32)
    centred = tl.where(inside, wide - tl.sum(wide, 0) / width, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 0) / width + eps)
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    _store((centred * scale * factor + shift).to(value.dtype), out + row * width + column, scales, row, inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """`ops.rms_norm`. x [..., D] and residual may have any stride between rows, none within."""
    out = x.new_empty(x.shape)
    _norm(_rms_norm_kernel, x, residual, (weight,), out, None, eps)
    return out


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """`ops.layer_norm`. x [T, D] and residual may have any stride between rows, none within."""
    out = x.new_empty(x.shape)
    _norm(_layer_norm_kernel, x, residual, (weight, bias), out, None, eps)
    return out


def rms_norm_int8(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Int8:
    """`ops.rms_norm_int8`. x [T, D] and residual may have any stride between rows, none within."""
    out = empty_rows(x)
    _norm(_rms_norm_kernel, x, residual, (weight,), *out, eps)
    return out


def layer_norm_int8(x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None = None) -> Int8:
    """`ops.layer_norm_int8`. x [T, D] and residual may have any stride between rows, none within."""
    out = empty_rows(x)
    _norm(_layer_norm_kernel, x, residual, (weight, bias), *out, eps)
    return out


def _norm(
    kernel: triton.JITFunction,
    x: Tensor,
    residual: Tensor | None,
    vectors: tuple[Tensor, ...],
    out: Tensor,
    scales: Tensor | None,
    eps: float,
) -> None:
    """The rows of x [..., D], one after another, into `out`, which is contiguous and has x's shape."""
    width = x.shape[-1]
    assert all(vector.shape == (width,) and vector.is_contiguous() for vector in vectors) and width <= MAX_WIDTH
    assert x.stride(-1) == 1 or width == 1
    if residual is not None:
        assert (residual.shape, residual.dtype) == (x.shape, x.dtype) and (residual.stride(-1) == 1 or width == 1)
        residual = residual.view(-1, width)
    rows = x.view(-1, width)
    if len(rows):
        block = triton.next_power_of_2(width)
        strides = rows.stride(0), 0 if residual is None else residual.stride(0)
        kernel[(len(rows),)](
            rows, residual, *vectors, out, scales, *strides, width, eps, block, **options(warps(block))
        )
