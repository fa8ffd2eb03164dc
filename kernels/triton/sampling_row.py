"""What the sampling kernels share: a slot's columns, a row's values, the noise of a draw.

Letters: R rows, V vocabulary, G groups of LANES tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .. import sampling

LANES = tl.constexpr(sampling.LANES)
COLUMNS = tl.constexpr(sampling.COLUMNS)
SEED, SEED_HIGH = tl.constexpr(sampling.SEED), tl.constexpr(sampling.SEED_HIGH)
CHOICE = tl.constexpr(sampling.CHOICE)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def integer(columns, slot, column: tl.constexpr):
    return tl.load(columns + slot * COLUMNS + column)


@triton.jit
def number(columns, slot, column: tl.constexpr):
    return tl.load(columns + slot * COLUMNS + column).to(tl.float32, bitcast=True)


@triton.jit
def values_of(logits, edited, token, inside, changed):
    """A row's float32 values at `token` where `inside`, else -inf; those in `edited` unless `changed` is 0.

    Only one of the two loads is made: the other's mask is false everywhere.
    """
    if edited is None:
        value = tl.load(logits + token, mask=inside, other=-float("inf")).to(tl.float32)
    else:
        own = (tl.zeros_like(token) + changed) != 0
        plain = tl.load(logits + token, mask=inside & (own == 0), other=-float("inf"))
        other = tl.load(edited + token, mask=inside & own, other=-float("inf"))
        value = tl.where(own, other, plain.to(tl.float32))
    return value


@triton.jit
def exponential(word, columns, slot, position):
    """The values `word` (a vector of int32) of the row's noise, float32: see `draws` in kernels/sampling.py.

    -log(1 - v) = 2 atanh(z) with z = v / (2 - v); the series to z^9 is exact in float32 for v < 1/4, where the
    hardware's logarithm of numbers near 1 is not.
    """
    low = integer(columns, slot, SEED).to(tl.uint32, bitcast=True).to(tl.uint64)
    high = integer(columns, slot, SEED_HIGH).to(tl.uint32, bitcast=True).to(tl.uint64)
    zero = word * 0
    position, choice = zero + position, zero + integer(columns, slot, CHOICE)
    first, second, third, fourth = tl.philox((high << 32) | low, word // 4, position, choice, zero)
    lane = word % 4
    drawn = tl.where(lane < 2, tl.where(lane == 0, first, second), tl.where(lane == 2, third, fourth))
    v = tl.minimum(drawn.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10, 0.999999940395355224609375)
    z = v / (2.0 - v)
    square = z * z
    series = 1.0 + square * (1.0 / 3 + square * (1.0 / 5 + square * (1.0 / 7 + square * (1.0 / 9))))
    return tl.where(v < 0.25, 2.0 * z * series, -tl.log(1.0 - v))
