"""What the attention kernels share: a tile of K or V out of pages, its scores, and the running softmax.

    s = scale · q·k,  softcap · tanh(s / softcap),  + slope · (j - p),  -inf where row p does not see j
    m' = max(m, max s),  l' = l · 2^(m - m') + Σ 2^(s - m'),  acc' = acc · 2^(m - m') + Σ 2^(s - m') v

Scores are in units of log 2, so that every exponential is one `exp2`. A tile's first position is a multiple of its
length, whichever row reads it: together with `shares` this makes a row's sums independent of what else is computed.

Letters: M query rows of a program (G heads of a few tokens), TILE positions, H head size (padded to a power of two).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops import KVLayer
from .int8 import widen

LOG2E = tl.constexpr(1.4426950408889634)

DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def places(
    table,
    start,
    low,
    high,
    page_stride,
    SLOT: tl.constexpr,
    TILE: tl.constexpr,
    PAGE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Where the positions from `start` on lie in the pages of one head: an offset, int64, and from there [TILE].

    A tile that is part of a page has distances that are known at compile time. Else, where MASKED, the table is read
    within [low, high) only.
    """
    lane = tl.arange(0, TILE)
    if PAGE % TILE == 0:
        page = tl.load(table + start // PAGE).to(tl.int64)
        return page * page_stride + start % PAGE * SLOT, lane * SLOT
    else:
        position = start + lane
        if MASKED:
            page = tl.load(table + position // PAGE, mask=(position >= low) & (position < high), other=0)
        else:
            page = tl.load(table + position // PAGE)
        return 0, page.to(tl.int64) * page_stride + position % PAGE * SLOT


@triton.jit
def load_tile(
    pages, base, place, valid, SIZE: tl.constexpr, PADDED: tl.constexpr, DTYPE: tl.constexpr, MASKED: tl.constexpr
):
    """[TILE, PADDED] in DTYPE, 0 outside of `valid` [TILE] (a slot that was not written may hold NaN) and of SIZE."""
    column = tl.arange(0, PADDED)
    pointers = pages + base + (place[:, None] + column[None, :])
    if PADDED != SIZE:
        inside = tl.broadcast_to(column[None, :] < SIZE, [place.shape[0], PADDED])
        if MASKED:
            inside = inside & valid[:, None]
        return widen(tl.load(pointers, mask=inside, other=0), DTYPE)
    elif MASKED:
        return widen(tl.load(pointers, mask=valid[:, None], other=0), DTYPE)
    else:
        return widen(tl.load(pointers), DTYPE)


@triton.jit
def load_scales(scales, base, place, valid, MASKED: tl.constexpr):
    """[TILE] float32, 0 outside of `valid`."""
    if MASKED:
        return tl.load(scales + base + place, mask=valid, other=0).to(tl.float32)
    else:
        return tl.load(scales + base + place).to(tl.float32)


@triton.jit
def tanh(x):
    """By one exponential that cannot become NaN: 1 - 2 / (1 + e^2x)."""
    return 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2E)))


@triton.jit
def attend_tile(
    m,  # [M] float32, running maximum
    mass,  # [M] float32, running sum of weights
    acc,  # [M, PADDED] float32, running sum of weighted v
    q,  # [M, PADDED] in DTYPE
    position,  # [M] of the rows; -1 sees nothing
    slope,  # [M] float32 in units of log 2 and None: no bias
    k,  # pages of this kv head, as v, k_scale and v_scale
    v,
    k_scale,
    v_scale,
    table,  # of this sequence
    start,  # of the tile
    low,  # first position that any row sees
    high,  # behind the last one
    scale,
    softcap,
    window,
    page_stride,
    scale_page_stride,
    SLOT: tl.constexpr,  # strides between positions of a page
    SCALE_SLOT: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    TILE: tl.constexpr,
    PAGE: tl.constexpr,
    DTYPE: tl.constexpr,
    MASKED: tl.constexpr,  # not every row sees every position of the tile
):
    """(m, mass, acc) after a tile of K and V: 2 · TILE · H elements read."""
    j = start + tl.arange(0, TILE)
    valid = (j >= low) & (j < high)
    base, place = places(table, start, low, high, page_stride, SLOT, TILE, PAGE, MASKED)
    keys = load_tile(k, base, place, valid, SIZE, PADDED, DTYPE, MASKED)
    s = tl.dot(q, tl.trans(keys), input_precision="ieee")
    if k_scale is not None:
        scale_base, scale_place = places(table, start, low, high, scale_page_stride, SCALE_SLOT, TILE, PAGE, MASKED)
        s = s * load_scales(k_scale, scale_base, scale_place, valid, MASKED)[None, :]
    factored: tl.constexpr = k_scale is None and softcap is None and slope is None
    if softcap is not None:
        s = softcap * LOG2E * tanh(s * (scale / softcap))
    elif not factored:
        s = s * (scale * LOG2E)
    if slope is not None:
        s = s + slope[:, None] * (j[None, :] - position[:, None]).to(tl.float32)
    if MASKED:
        seen = j[None, :] <= position[:, None]
        if window is not None:
            seen = seen & (j[None, :] > position[:, None] - window)
        s = tl.where(seen, s, float("-inf"))
    if factored:  # product and difference become one instruction
        factor = scale * LOG2E
        top = tl.maximum(m, tl.max(s, 1) * factor)
        finite = tl.where(top == float("-inf"), 0.0, top)  # of a row that has seen nothing yet
        weight = tl.exp2(s * factor - finite[:, None])
    else:
        top = tl.maximum(m, tl.max(s, 1))
        finite = tl.where(top == float("-inf"), 0.0, top)
        weight = tl.exp2(s - finite[:, None])
    kept = tl.exp2(m - finite)
    mass = mass * kept + tl.sum(weight, 1)
    if v_scale is not None:
        weight = weight * load_scales(v_scale, scale_base, scale_place, valid, MASKED)[None, :]
    values = load_tile(v, base, place, valid, SIZE, PADDED, DTYPE, MASKED)
    acc = tl.dot(weight.to(DTYPE), values, acc * kept[:, None], input_precision="ieee")
    return top, mass, acc


@triton.jit
def shares(m, m2):
    """(the greater of two maxima, what the sums of either count by): two partial results become one so. Nothing seen:
    (-inf, 0, 0), which counts nothing.
    """
    top = tl.maximum(m, m2)
    finite = tl.where(top == float("-inf"), 0.0, top)
    return top, tl.exp2(m - finite), tl.exp2(m2 - finite)


class Operands(NamedTuple):
    """What both attention kernels take of q and the pages, checked."""

    heads: int
    kv_heads: int
    group: int  # G
    size: int  # H
    page: int
    strides: tuple[int, ...]  # of q: row, head; of pages: page, head; of scales: page, head
    slots: tuple[int, int]  # strides between positions of a page: of the pages, of the scales
    dtype: torch.dtype  # of the products


def operands(q: Tensor, cache: KVLayer, alibi: Tensor | None, scale: float, window: int | None) -> Operands:
    """q [T, N, H] and pages [P, K, S, H], with any strides but within a head."""
    heads, size = q.shape[1:]
    pages, kv_heads, page, _ = cache.k.shape
    assert cache.k.shape[3] == size and heads % kv_heads == 0, "q [T, N, H], pages [P, K, S, H], K divides N"
    assert q.stride(2) == cache.k.stride(3) == cache.v.stride(3) == 1, "the elements of a head are contiguous"
    assert cache.v.shape == cache.k.shape and cache.v.stride() == cache.k.stride() and cache.v.dtype == cache.k.dtype
    assert q.dtype in DTYPES and scale > 0 and (window is None or window > 0)
    assert alibi is None or (alibi.shape == (heads,) and alibi.dtype == torch.float32 and alibi.is_contiguous())
    quantized = cache.k.dtype == torch.int8
    scale_strides = (0, 0, 0)
    if quantized:
        k_scale, v_scale = cache.k_scale, cache.v_scale
        assert k_scale is not None and v_scale is not None and k_scale.shape == (pages, kv_heads, page)
        assert k_scale.stride() == v_scale.stride() and k_scale.shape == v_scale.shape
        scale_strides = k_scale.stride()
    dtype = q.dtype if quantized or cache.k.dtype == q.dtype else torch.float32
    strides = (*q.stride()[:2], *cache.k.stride()[:2], *scale_strides[:2])
    slots = cache.k.stride(2), scale_strides[2]
    return Operands(heads, kv_heads, heads // kv_heads, size, page, strides, slots, dtype)
