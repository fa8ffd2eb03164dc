"""K and V into pages, and the int8 form of both.

int8    scale = round16(max(max|x| / 127, 2⁻¹⁴)),   stored = round(x / scale), halves to even, within ±127

One scale per token and kv head, in float16; 2⁻¹⁴ is the smallest normal one. `write_kv`: one program per token and
group of heads. K and V are read once and written once: 4 K H values per token, and 4 K bytes of scales.

Letters: T rows, K kv heads, H head size, P pages, S page size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops import KVLayer
from .int8 import to_int8
from .launch import options, warps

ELEMENTS = 1024  # of a program's group of heads: with 8 per thread 4 warps

SMALLEST: tl.constexpr = tl.constexpr(2.0**-14)


@triton.jit
def int8_scale(largest):
    """The scale of values up to `largest` [...], as float16 holds it, in float32."""
    return tl.maximum(tl.div_rn(largest, 127.0), SMALLEST).to(tl.float16).to(tl.float32)


@triton.jit(do_not_specialize_on_alignment=["slots"])
def _write_kv_kernel(
    k,
    v,
    slots,
    k_pages,
    v_pages,
    k_scales,
    v_scales,
    k_stride,
    v_stride,
    k_head_stride,
    v_head_stride,
    page_stride,
    scale_stride,
    KV_HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, BLOCK)
    real = head < KV_HEADS
    inside = real[:, None] & (column < WIDTH)[None, :]
    slot = tl.load(slots + row)
    page, offset = slot // SIZE, slot % SIZE
    place = page * page_stride + (head[:, None] * SIZE + offset) * WIDTH + column[None, :]
    keys = tl.load(k + row * k_stride + head[:, None] * k_head_stride + column[None, :], mask=inside, other=0.0)
    values = tl.load(v + row * v_stride + head[:, None] * v_head_stride + column[None, :], mask=inside, other=0.0)
    if k_scales is not None:
        wide_keys, wide_values = keys.to(tl.float32), values.to(tl.float32)
        k_scale, v_scale = int8_scale(tl.max(tl.abs(wide_keys), 1)), int8_scale(tl.max(tl.abs(wide_values), 1))
        scale_place = page * scale_stride + head * SIZE + offset
        tl.store(k_scales + scale_place, k_scale.to(tl.float16), mask=real)
        tl.store(v_scales + scale_place, v_scale.to(tl.float16), mask=real)
        tl.store(k_pages + place, to_int8(wide_keys, k_scale[:, None]), mask=inside)
        tl.store(v_pages + place, to_int8(wide_values, v_scale[:, None]), mask=inside)
    else:
        tl.store(k_pages + place, keys.to(k_pages.dtype.element_ty), mask=inside)
        tl.store(v_pages + place, values.to(v_pages.dtype.element_ty), mask=inside)


def write_kv(k: Tensor, v: Tensor, slots: Tensor, cache: KVLayer) -> None:
    """`ops.write_kv`. k, v [T, K, H]: any strides between rows and heads. A slot occurs once, or nobody reads it."""
    rows, kv_heads, width = k.shape
    assert v.shape == k.shape and k.dtype == v.dtype and k.stride(2) == v.stride(2) == 1
    assert cache.k.shape[1] == kv_heads and cache.k.shape[3] == width
    page_stride, scale_stride = check_pages(cache)
    check_index(slots, rows)
    if rows:
        block = triton.next_power_of_2(width)
        heads = max(1, min(ELEMENTS // block, triton.next_power_of_2(kv_heads)))
        _write_kv_kernel[(rows, triton.cdiv(kv_heads, heads))](
            k,
            v,
            slots,
            *cache,
            *(k.stride(0), v.stride(0), k.stride(1), v.stride(1), page_stride, scale_stride),
            *(kv_heads, cache.k.shape[2], width, heads, block),
            **options(warps(heads * block, per_thread=8)),
        )


def check_pages(cache: KVLayer) -> tuple[int, int]:
    """The strides between pages of K and V [P, K, S, H], and of their scales (0 without). A page is contiguous."""
    k, v, k_scale, v_scale = cache
    inner = k.shape[2] * k.shape[3], k.shape[3], 1
    assert (k.shape, k.dtype, k.stride()) == (v.shape, v.dtype, v.stride()) and k.stride()[1:] == inner
    assert (k.dtype == torch.int8) == (k_scale is not None) == (v_scale is not None)
    if k_scale is None or v_scale is None:
        return k.stride(0), 0
    assert k_scale.dtype == v_scale.dtype == torch.float16 and k_scale.shape == v_scale.shape == k.shape[:3]
    assert k_scale.stride() == v_scale.stride() and k_scale.stride()[1:] == (k.shape[2], 1)
    return k.stride(0), k_scale.stride(0)


def check_index(index: Tensor, rows: int) -> None:
    assert index.shape == (rows,) and index.dtype == torch.int64 and index.is_contiguous()
