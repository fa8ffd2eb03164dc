"""Attention of many rows per sequence: tiles of queries against all K and V that they see.

A program takes one kv head and up to ROWS / G tokens of one sequence, with all G query heads of each: they share
the tiles of K and V. It walks tiles that a window cuts, then tiles that every row sees in full and that need no mask,
then those on the diagonal. A program reads 2 H elements per position it sees: with ROWS = 128, 128 / G tokens share
each, and the K and V of a sequence stay in L2 between programs. Work is 4 H flop per row, head and visible position.

The grid is as long as any split of the rows into sequences can need (rows / tokens + sequences); a program finds its
sequence by a sum over the lengths. The last tokens of a sequence, which see most, are started first.

Letters: T rows, N query heads, K kv heads, G = N / K, H head size, B sequences.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops import KVLayer
from .attention_tile import DTYPES, LOG2E, attend_tile, operands
from .launch import architecture, options

LANES = 128  # sequences that are looked at together


class Tile(NamedTuple):
    rows: int
    positions: int
    warps: int
    stages: int
    registers: int | None  # at most; None: as many as the compiler likes


@triton.jit
def _find(query_starts, decodes, sequences, place, TOKENS: tl.constexpr, LANES: tl.constexpr):
    """(sequence, block) of the `place`-th block of TOKENS rows, last block of a sequence first; (-1, 0) behind all."""
    behind, found, block = 0, -1, 0
    for base in range(decodes, sequences, LANES):
        sequence = base + tl.arange(0, LANES)
        there = sequence < sequences
        first = tl.load(query_starts + sequence, mask=there, other=0)
        last = tl.load(query_starts + sequence + 1, mask=there, other=0)
        blocks = tl.cdiv(last - first, TOKENS)
        upto = behind + tl.cumsum(blocks, 0)
        hit = (place < upto) & (place >= upto - blocks)
        found += tl.sum(tl.where(hit, sequence + 1, 0))
        block += tl.sum(tl.where(hit, upto - 1 - place, 0))
        behind += tl.sum(blocks)
    return found, block


@triton.jit(do_not_specialize=["decodes", "sequences", "window"])
def _tiles_kernel(
    q,
    k,
    v,
    k_scale,
    v_scale,
    out,  # [T, N, SIZE]
    table,
    query_starts,
    lengths,
    alibi,
    decodes,
    sequences,
    scale,
    softcap,
    window,
    table_stride,
    row_stride,
    head_stride,
    page_stride,
    kv_head_stride,
    scale_page_stride,
    scale_head_stride,
    SLOT: tl.constexpr,  # strides between positions of a page
    SCALE_SLOT: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    TILE: tl.constexpr,
    PAGE: tl.constexpr,
    DTYPE: tl.constexpr,
    LANES: tl.constexpr,
):
    tokens: tl.constexpr = ROWS // HEADS
    sequence, block = _find(query_starts, decodes, sequences, tl.program_id(0), tokens, LANES)
    if sequence >= 0:
        lane = tl.arange(0, ROWS)
        column = tl.arange(0, PADDED)
        kv_head = tl.program_id(1)
        behind = tl.load(query_starts + sequence + 1)
        first = tl.load(query_starts + sequence) + block * tokens
        shift = tl.load(lengths + sequence) - behind  # from row to position
        row = first + lane // HEADS
        live = (row < behind) & (lane % HEADS < GROUP)
        position = tl.where(live, row + shift, -1)
        nearest = first + shift
        high = tl.minimum(first + tokens, behind) + shift

        head = kv_head * GROUP + lane % HEADS
        inside = live[:, None] & (column[None, :] < SIZE)
        wide_row = row.to(tl.int64)
        pointers = q + (wide_row * row_stride + head * head_stride)[:, None] + column[None, :]
        query = tl.load(pointers, mask=inside, other=0).to(DTYPE)
        slope = None
        if alibi is not None:
            slope = tl.load(alibi + head, mask=live, other=0) * LOG2E
        wide_head = kv_head.to(tl.int64)
        keys, values = k + wide_head * kv_head_stride, v + wide_head * kv_head_stride
        key_scales, value_scales = k_scale, v_scale
        if k_scale is not None:
            key_scales, value_scales = k_scale + wide_head * scale_head_stride, v_scale + wide_head * scale_head_stride
        pages = table + sequence.to(tl.int64) * table_stride

        m = tl.full([ROWS], float("-inf"), tl.float32)
        mass = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, PADDED], tl.float32)
        full_high = (nearest + 1) // TILE * TILE
        low = 0
        full_low = 0
        if window is not None:
            low = tl.maximum(nearest + 1 - window, 0)
            full_low = tl.minimum(tl.cdiv(tl.maximum(high - window, 0), TILE) * TILE, full_high)
            full_low = tl.maximum(full_low, low // TILE * TILE)
            for start in range(low // TILE * TILE, full_low, TILE):
                m, mass, acc = attend_tile(
                    m, mass, acc, query, position, slope, keys, values, key_scales, value_scales, pages, start,
                    low, high, scale, softcap, window, page_stride, scale_page_stride,
                    SLOT, SCALE_SLOT, SIZE, PADDED, TILE, PAGE, DTYPE, True,
                )  # fmt: skip
            full_high = tl.maximum(full_high, full_low)
        for start in range(full_low, full_high, TILE):
            m, mass, acc = attend_tile(
                m, mass, acc, query, position, slope, keys, values, key_scales, value_scales, pages, start,
                low, high, scale, softcap, window, page_stride, scale_page_stride,
                SLOT, SCALE_SLOT, SIZE, PADDED, TILE, PAGE, DTYPE, False,
            )  # fmt: skip
        for start in range(full_high, high, TILE):
            m, mass, acc = attend_tile(
                m, mass, acc, query, position, slope, keys, values, key_scales, value_scales, pages, start,
                low, high, scale, softcap, window, page_stride, scale_page_stride,
                SLOT, SCALE_SLOT, SIZE, PADDED, TILE, PAGE, DTYPE, True,
            )  # fmt: skip
        place = (wide_row * (KV_HEADS * GROUP) + head) * SIZE
        result = (acc / tl.where(mass == 0.0, 1.0, mass)[:, None]).to(out.dtype.element_ty)
        tl.store(out + place[:, None] + column[None, :], result, mask=inside)


def tile(arch: int, dtype: torch.dtype, pages: torch.dtype, padded: int, plain: bool) -> Tile:
    """Sizes for products in `dtype` with heads of `padded` elements; `plain`: no window, bias or cap of scores.

    With 128 registers two programs of 8 warps share a processor of sm_90, and one's exponentials run beside the other's
    products. It spills six registers then, none of them within the loop of full tiles.
    """
    if dtype == torch.float32:
        return Tile(16, 32 if padded <= 128 else 16, 4, 1, None)
    if padded > 128:
        return Tile(64, 32, 8, 2, None)
    if padded > 64 and pages == torch.int8 and arch < 90:
        return Tile(128, 32, 8, 2, None)
    tight = arch == 90 and plain and pages != torch.int8
    return Tile(128, 64, 8, 2, 128 if tight else None)


def attend_tiles(
    q: Tensor,
    out: Tensor,
    cache: KVLayer,
    table: Tensor,
    query_starts: Tensor,
    lengths: Tensor,
    decodes: int,
    scale: float,
    alibi: Tensor | None,
    window: int | None,
    softcap: float | None,
) -> None:
    """Attention of the rows behind the first `decodes` of q [T, N, H], into out [T, N, H]."""
    given = operands(q, cache, alibi, scale, window)
    assert out.shape == q.shape and out.is_contiguous() and table.stride(1) == 1
    assert table.dtype == query_starts.dtype == lengths.dtype == torch.int32
    assert query_starts.is_contiguous() and lengths.is_contiguous() and len(query_starts) == len(lengths) + 1
    heads = triton.next_power_of_2(given.group)
    padded = max(16, triton.next_power_of_2(given.size))
    plain = alibi is None and window is None and softcap is None
    sizes = tile(architecture(q.device), given.dtype, cache.k.dtype, padded, plain)
    rows = max(sizes.rows, heads)
    blocks = (len(q) - decodes) // (rows // heads) + len(lengths) - decodes
    _tiles_kernel[(blocks, given.kv_heads)](
        q,
        *cache,
        out,
        table,
        query_starts,
        lengths,
        alibi,
        decodes,
        len(lengths),
        scale,
        softcap,
        window,
        table.stride(0),
        *given.strides,
        *given.slots,
        given.kv_heads,
        given.group,
        heads,
        rows,
        given.size,
        padded,
        sizes.positions,
        given.page,
        DTYPES[given.dtype],
        LANES,
        **options(sizes.warps, sizes.stages) | {"maxnreg": sizes.registers},
    )
