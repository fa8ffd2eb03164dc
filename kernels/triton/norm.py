"""RMS norm and layer norm of rows, with the residual sum in the same pass.

rms_norm    y = round(x / sqrt(mean(x²) + eps)) · weight, unrounded where the weight is float32
layer_norm  y = (x - mean(x)) / sqrt(var(x) + eps) · weight + bias

With a residual r: r = round(x + r), in place, takes x's place. One program per row, which it keeps in registers: x (and
r) are read once, y (and r) written once: 4 D bytes per row in 16 bits, 8 D with a residual; weight and bias stay in L2.

Letters: T rows, D width.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import options, warps

MAX_WIDTH = 65536  # beyond, a row does not fit the registers of 16 warps


@triton.jit
def _rms_norm_kernel(x, residual, weight, out, x_stride, residual_stride, width, eps, BLOCK: tl.constexpr):
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
    tl.store(out + row * width + column, (normal * factor.to(tl.float32)).to(value.dtype), mask=inside)


@triton.jit
def _layer_norm_kernel(x, residual, weight, bias, out, x_stride, residual_stride, width, eps, BLOCK: tl.constexpr):
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
    tl.store(out + row * width + column, (centred * scale * factor + shift).to(value.dtype), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """`ops.rms_norm`. x [..., D] and residual may have any stride between rows, none within."""
    rows, summed, out = _rows(x, residual, weight)
    if len(rows):
        width = x.shape[-1]
        block = triton.next_power_of_2(width)
        strides = rows.stride(0), 0 if summed is None else summed.stride(0)
        _rms_norm_kernel[(len(rows),)](rows, summed, weight, out, *strides, width, eps, block, **options(warps(block)))
    return out


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """`ops.layer_norm`. x [T, D] and residual may have any stride between rows, none within."""
    rows, summed, out = _rows(x, residual, weight)
    assert bias.shape == weight.shape and bias.is_contiguous()
    if len(rows):
        width = x.shape[-1]
        block = triton.next_power_of_2(width)
        strides = rows.stride(0), 0 if summed is None else summed.stride(0)
        _layer_norm_kernel[(len(rows),)](
            rows, summed, weight, bias, out, *strides, width, eps, block, **options(warps(block))
        )
    return out


def _rows(x: Tensor, residual: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """x and residual seen as [T, D], and the output, contiguous, in x's shape."""
    width = x.shape[-1]
    assert weight.shape == (width,) and weight.is_contiguous() and width <= MAX_WIDTH
    assert x.stride(-1) == 1 or width == 1
    if residual is not None:
        assert (residual.shape, residual.dtype) == (x.shape, x.dtype) and (residual.stride(-1) == 1 or width == 1)
        residual = residual.view(-1, width)
    return x.view(-1, width), residual, x.new_empty(x.shape)
