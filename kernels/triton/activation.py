"""The activations between the two matrices of an MLP.

silu_and_mul   gate · up / (1 + exp(-gate)), gate and up the halves of a row
gelu_tanh      x / 2 · (1 + tanh u) = x / (1 + exp(-2 u)) with u = √(2/π) (x + 0.044715 x³)
gelu           x / 2 · (1 + erf(x / √2))

A value is read once and written once: 6 I bytes per row of silu_and_mul in 16 bits, 4 I of the others.

Letters: T rows, I inner size.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from .launch import options, warps

BLOCK = 1024  # elements of a program: 8 per thread, one 16-byte load of 16-bit values

TWICE_ROOT: tl.constexpr = tl.constexpr(2 * math.sqrt(2 / math.pi))
HALF_ROOT: tl.constexpr = tl.constexpr(math.sqrt(0.5))


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """Of x float32; of silu_and_mul the first half."""
    if ACTIVATION == "gelu_tanh":
        return x / (1 + tl.exp((x + 0.044715 * x * x * x) * -TWICE_ROOT))
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1 + tl.erf(x * HALF_ROOT))
    else:
        return x / (1 + tl.exp(-x))


@triton.jit
def _silu_and_mul_kernel(x, out, stride, inner, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < inner
    gate = tl.load(x + row * stride + column, mask=inside, other=0.0)
    up = tl.load(x + row * stride + inner + column, mask=inside, other=0.0).to(tl.float32)
    wide = gate.to(tl.float32)
    tl.store(out + row * inner + column, (wide / (1 + tl.exp(-wide)) * up).to(gate.dtype), mask=inside)


@triton.jit
def _gelu_kernel(x, out, count, TANH: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    value = tl.load(x + place, mask=inside, other=0.0)
    wide = value.to(tl.float32)
    if TANH:
        twice = (wide + 0.044715 * wide * wide * wide) * TWICE_ROOT
        result = wide / (1 + tl.exp(-twice))
    else:
        result = 0.5 * wide * (1 + tl.erf(wide * HALF_ROOT))
    tl.store(out + place, result.to(value.dtype), mask=inside)


def silu_and_mul(x: Tensor) -> Tensor:
    """`ops.silu_and_mul`. x [T, 2 I] may have any stride between rows."""
    rows, inner = x.shape[0], x.shape[1] // 2
    assert x.dim() == 2 and x.shape[1] == 2 * inner and x.stride(1) == 1
    out = x.new_empty(rows, inner)
    if rows:
        grid = (rows, triton.cdiv(inner, BLOCK))
        _silu_and_mul_kernel[grid](x, out, x.stride(0), inner, BLOCK, **options(warps(BLOCK, per_thread=8)))
    return out


def gelu_tanh(x: Tensor) -> Tensor:
    """`ops.gelu_tanh`. x contiguous."""
    return _gelu(x, tanh=True)


def gelu(x: Tensor) -> Tensor:
    """`ops.gelu`. x contiguous."""
    return _gelu(x, tanh=False)


def _gelu(x: Tensor, tanh: bool) -> Tensor:
    assert x.is_contiguous()
    out, count = x.new_empty(x.shape), x.numel()
    if count:
        _gelu_kernel[(triton.cdiv(count, BLOCK),)](x, out, count, tanh, BLOCK, **options(warps(BLOCK, per_thread=8)))
    return out
