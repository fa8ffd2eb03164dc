"""Between the q, k, v product and attention: norm and rotate q and k, put k and v into the pages.

norm      x = x / sqrt(mean(x²) + eps) · weight, over a head
rotation  (a, b) -> (a cos - b sin, b cos + a sin), a and b elements i and i + R / 2, or 2 i and 2 i + 1
stored    rounded to q's dtype, then as write.py says

A program takes a group of heads of one token, of q, k and v alike: what kind a head is only decides which of its
results are stored. Each value is read once and written once: 2 (N + 2 K) H values per token; cos and sin stay in L2.

Letters: T rows, N query heads, K kv heads, H head size, R rotated part of a head, P pages, S page size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops import KVLayer
from .int8 import to_int8
from .launch import options, warps
from .write import check_index, check_pages, int8_scale

ELEMENTS = 1024  # of a program's group of heads: with 8 of a and 8 of b per thread 2 warps


@triton.jit
def _square_sum(a, b, rest):
    total = tl.sum(a * a, 1) + tl.sum(b * b, 1)
    if rest is not None:
        total += tl.sum(rest * rest, 1)
    return total


@triton.jit
def _largest(a, b, rest):
    largest = tl.maximum(tl.max(tl.abs(a), 1), tl.max(tl.abs(b), 1))
    if rest is not None:
        largest = tl.maximum(largest, tl.max(tl.abs(rest), 1))
    return largest


@triton.jit
def _weighted(x, scale, q_norm, k_norm, column, inside, query, turned):
    """x [heads, n] times scale [heads] and its head's norm weight; v's heads as they are."""
    q_weight = tl.load(q_norm + column, mask=inside, other=0.0).to(tl.float32)
    k_weight = tl.load(k_norm + column, mask=inside, other=0.0).to(tl.float32)
    weight = tl.where(query[:, None], q_weight[None, :], k_weight[None, :])
    return tl.where(turned[:, None], x * scale[:, None] * weight, x)


@triton.jit
def _store(x, column, query, key, value, out, out_place, k_pages, v_pages, page_place, scale, inside):
    """x [heads, n], rounded, where its head belongs: q's in `out`, k's and v's in the pages."""
    across = column[None, :]
    tl.store(out + out_place[:, None] + across, x.to(out.dtype.element_ty), mask=inside & query[:, None])
    place = page_place[:, None] + across
    stored = to_int8(x, scale[:, None]) if scale is not None else x.to(k_pages.dtype.element_ty)
    tl.store(k_pages + place, stored, mask=inside & key[:, None])
    tl.store(v_pages + place, stored, mask=inside & value[:, None])


@triton.jit(do_not_specialize_on_alignment=["positions", "slots"])
def _rotary_kernel(
    qkv,
    q_norm,
    k_norm,
    positions,
    cos,
    sin,
    slots,
    out,
    k_pages,
    v_pages,
    k_scales,
    v_scales,
    eps,
    stride,
    page_stride,
    scale_stride,
    QUERIES: tl.constexpr,
    KV_HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    query, turned, real = head < QUERIES, head < QUERIES + KV_HEADS, head < QUERIES + 2 * KV_HEADS
    key, value = turned & (head >= QUERIES), real & (head >= QUERIES + KV_HEADS)
    source = qkv + row * stride + head[:, None] * WIDTH
    dtype = qkv.dtype.element_ty

    pair = tl.arange(0, BLOCK_HALF)
    paired = pair < HALF
    if INTERLEAVED:
        first, second = 2 * pair, 2 * pair + 1
    else:
        first, second = pair, pair + HALF
    inside = real[:, None] & paired[None, :]
    a = tl.load(source + first[None, :], mask=inside, other=0.0).to(tl.float32)
    b = tl.load(source + second[None, :], mask=inside, other=0.0).to(tl.float32)
    rest = None
    if BLOCK_REST:
        last = 2 * HALF + tl.arange(0, BLOCK_REST)
        inside_rest = real[:, None] & (last < WIDTH)[None, :]
        rest = tl.load(source + last[None, :], mask=inside_rest, other=0.0).to(tl.float32)

    if q_norm is not None:
        scale = tl.rsqrt(_square_sum(a, b, rest) / WIDTH + eps)
        a = _weighted(a, scale, q_norm, k_norm, first, paired, query, turned)
        b = _weighted(b, scale, q_norm, k_norm, second, paired, query, turned)
        if BLOCK_REST:
            rest = _weighted(rest, scale, q_norm, k_norm, last, last < WIDTH, query, turned)

    angle = tl.maximum(tl.load(positions + row), 0) * HALF + pair
    c = tl.load(cos + angle, mask=paired, other=0.0)[None, :]
    s = tl.load(sin + angle, mask=paired, other=0.0)[None, :]
    a, b = tl.where(turned[:, None], a * c - b * s, a), tl.where(turned[:, None], b * c + a * s, b)
    a, b = a.to(dtype).to(tl.float32), b.to(dtype).to(tl.float32)
    if BLOCK_REST:
        rest = rest.to(dtype).to(tl.float32)

    slot = tl.load(slots + row)
    page, offset = slot // SIZE, slot % SIZE
    kv_head = tl.where(key, head - QUERIES, head - QUERIES - KV_HEADS)
    out_place = (row * QUERIES + head) * WIDTH
    page_place = page * page_stride + (kv_head * SIZE + offset) * WIDTH
    scale = None
    if k_scales is not None:
        scale = int8_scale(_largest(a, b, rest))
        scale_place = page * scale_stride + kv_head * SIZE + offset
        tl.store(k_scales + scale_place, scale.to(tl.float16), mask=key)
        tl.store(v_scales + scale_place, scale.to(tl.float16), mask=value)
    _store(a, first, query, key, value, out, out_place, k_pages, v_pages, page_place, scale, inside)
    _store(b, second, query, key, value, out, out_place, k_pages, v_pages, page_place, scale, inside)
    if BLOCK_REST:
        _store(rest, last, query, key, value, out, out_place, k_pages, v_pages, page_place, scale, inside_rest)


def qk_norm_rotary_and_write_kv(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    slots: Tensor,
    cache: KVLayer,
) -> Tensor:
    """`ops.qk_norm_rotary_and_write_kv`. qkv may have any stride between rows.

    A slot occurs once, or nobody reads it. Position -1, a padding row's, is rotated as 0.
    """
    rows = qkv.shape[0]
    kv_heads, size, width = cache.k.shape[1:]
    queries, half = qkv.shape[1] // width - 2 * kv_heads, cos.shape[1]
    assert qkv.dim() == 2 and qkv.shape[1] == (queries + 2 * kv_heads) * width and qkv.stride(1) == 1
    assert cos.dtype == sin.dtype == torch.float32 and cos.shape == sin.shape and 0 < 2 * half <= width
    assert cos.is_contiguous() and sin.is_contiguous()
    assert (q_norm is None) == (k_norm is None), "both norms or none"
    if q_norm is not None and k_norm is not None:
        assert q_norm.shape == k_norm.shape == (width,) and q_norm.is_contiguous() and k_norm.is_contiguous()
    page_stride, scale_stride = check_pages(cache)
    check_index(slots, rows)
    check_index(positions, rows)
    out = qkv.new_empty(rows, queries, width)
    if rows:
        block_half = triton.next_power_of_2(half)
        block_rest = triton.next_power_of_2(width - 2 * half) if width > 2 * half else 0
        total = queries + 2 * kv_heads
        heads = max(1, min(ELEMENTS // triton.next_power_of_2(width), triton.next_power_of_2(total)))
        _rotary_kernel[(rows, triton.cdiv(total, heads))](
            *(qkv, q_norm, k_norm, positions, cos, sin, slots, out, *cache, eps),
            *(qkv.stride(0), page_stride, scale_stride),
            *(queries, kv_heads, size, width, half, interleaved, heads, block_half, block_rest),
            **options(warps(heads * 2 * block_half)),
        )
    return out
