"""Attention of few rows per sequence: chunks of K and V from a list of work, then one merge per row.

An entry of the list is a run of query rows and a run of chunks of one page table. A program takes one kv head of one
entry with all G query heads that share it, so K and V are read once: 2 · CHUNK · H elements per entry and kv head. The
grid is static and strides over the list: a step of any lengths has equal shares, and a captured graph stays valid. A
row that sees one chunk only is written at once; others leave (m, mass, acc) in float32 at a slot per chunk, and
`_merge_kernel` puts them together in the order of the chunks: 4 (H + 2) bytes written and read per chunk and query head
beside the chunk's 4 · CHUNK · H / G, which is 1.6 % of them for G = 4.

What a row's sums are made of depends on its position alone: chunks and tiles start at absolute positions, products and
sums are rounded one by one (no fused multiply-add, so that both kernels round alike), and positions that a row does not
see change nothing. Entries that cover all chunks (`WALK`) give the same bits as entries of one chunk.

Letters: T rows, N query heads, K kv heads, G = N / K, H head size, C capacity of the list, M rows of a tile: TOKENS
tokens of HEADS >= G heads each.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..attention import CHUNK, FIELDS, MEMBERS
from ..ops import KVLayer
from .attention_tile import DTYPES, LOG2E, attend_tile, operands, shares
from .launch import architecture, options, processors

UNROLLED = 16  # partial results whose loads are under way together
NOWHERE = tl.constexpr(2**31 - 1)
LEAST_ROWS = 16  # of a product on tensor cores
MOST_ROWS = 64  # whose sums fit the registers of 4 warps beside K and V


class Tile(NamedTuple):
    """Positions of a tile, and how many programs a processor keeps resident by registers and shared memory."""

    positions: int
    warps: int
    stages: int
    registers: int | None  # at most; None: as many as the compiler likes
    resident: int


def tile(arch: int, dtype: torch.dtype, pages: torch.dtype, padded: int, page: int, rows: int, lean: bool) -> Tile:
    """Sizes for products in `dtype` of `rows` rows with heads of `padded` elements and pages of `page` tokens; `lean`:
    no window, and one chunk per entry.

    Two stages go to the page number, so that five keep two tiles of K and V under way; sm_89 has no room for them.
    """
    if dtype == torch.float32:
        return Tile(32 if padded <= 64 else 16, 4, 1, None, 2)
    if rows > LEAST_ROWS and arch == 90 and padded <= 128:
        return Tile(32, 4, 3, None, 2)
    if rows > LEAST_ROWS or padded > 128:
        return Tile(32, 8, 3, None, 1)
    positions = 64
    stages = 3 if arch == 89 else 5
    if padded <= 64:
        return Tile(positions, 4, stages, None, 3 if arch == 80 else 4)
    if pages != torch.int8 and page % positions == 0 and arch != 89 and lean:
        return Tile(positions, 4, stages, 168, 2 if arch == 80 else 3)
    return Tile(positions, 4, stages, None, 2)


@triton.jit(do_not_specialize=["capacity", "window"])
def _chunks_kernel(
    q,
    k,
    v,
    k_scale,
    v_scale,
    out,  # [T, N, SIZE]
    sums,  # [C, N, SIZE] float32
    extremes,  # [C, N, 2] float32: m, l
    table,
    ends,  # [T] int32: behind the last position that a row sees
    alibi,
    work,  # as of `ops.attention_work`, C = capacity
    capacity,
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
    PARTS: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    TILE: tl.constexpr,
    PAGE: tl.constexpr,
    CHUNK: tl.constexpr,
    FIELDS: tl.constexpr,
    DTYPE: tl.constexpr,
    SHARED: tl.constexpr,  # the shared entries of the list
    WALK: tl.constexpr,  # an entry may have several chunks
):
    lane = tl.arange(0, ROWS)
    column = tl.arange(0, PADDED)
    tokens: tl.constexpr = ROWS // HEADS
    head_in_group = lane % HEADS
    count = tl.load(work + SHARED)
    entries = work + (2 + SHARED * FIELDS) * capacity
    for index in range(tl.program_id(0), count * (KV_HEADS * PARTS), tl.num_programs(0)):
        kv_head = index % KV_HEADS
        entry = entries + index // (KV_HEADS * PARTS)
        part = index // KV_HEADS % PARTS * tokens
        source = tl.load(entry)
        first = tl.load(entry + capacity)
        rows = tl.load(entry + 2 * capacity)
        begin = tl.load(entry + 3 * capacity)
        finish = tl.load(entry + 4 * capacity)

        token = part + lane // HEADS
        row = first + token
        live = (token < rows) & (head_in_group < GROUP)
        end = tl.load(ends + row, mask=live, other=0)
        high = tl.minimum(tl.max(end, 0), finish * CHUNK)
        seen_from = tl.zeros([ROWS], tl.int32)
        if window is not None:
            seen_from = tl.where(live, tl.maximum(end - window, 0), NOWHERE)
        low = tl.maximum(tl.min(seen_from, 0), begin * CHUNK)
        head = kv_head * GROUP + head_in_group
        wide_row = row.to(tl.int64)
        query_mask = live[:, None] & (column[None, :] < SIZE)
        pointers = q + (wide_row * row_stride + head * head_stride)[:, None] + column[None, :]
        query = tl.load(pointers, mask=query_mask, other=0).to(DTYPE)
        slope = None
        if alibi is not None:
            slope = tl.load(alibi + head, mask=live, other=0) * LOG2E
        wide_head = kv_head.to(tl.int64)
        keys, values = k + wide_head * kv_head_stride, v + wide_head * kv_head_stride
        key_scales, value_scales = k_scale, v_scale
        if k_scale is not None:
            key_scales, value_scales = k_scale + wide_head * scale_head_stride, v_scale + wide_head * scale_head_stride
        pages = table + source.to(tl.int64) * table_stride

        m = tl.full([ROWS], float("-inf"), tl.float32)
        mass = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, PADDED], tl.float32)
        if WALK:
            for chunk in range(low // CHUNK, tl.cdiv(high, CHUNK)):
                m2 = tl.full([ROWS], float("-inf"), tl.float32)
                mass2 = tl.zeros([ROWS], tl.float32)
                acc2 = tl.zeros([ROWS, PADDED], tl.float32)
                stop = tl.minimum(high, (chunk + 1) * CHUNK)
                for start in range(tl.maximum(chunk * CHUNK, low // TILE * TILE), stop, TILE):
                    m2, mass2, acc2 = attend_tile(
                        m2, mass2, acc2, query, end - 1, slope, keys, values, key_scales, value_scales, pages, start,
                        low, high, scale, softcap, window, page_stride, scale_page_stride,
                        SLOT, SCALE_SLOT, SIZE, PADDED, TILE, PAGE, DTYPE, True,
                    )  # fmt: skip
                m, a, b = shares(m, m2)
                mass = mass * a + mass2 * b
                acc = acc * a[:, None] + acc2 * b[:, None]
        else:
            for start in range(low // TILE * TILE, high, TILE):
                m, mass, acc = attend_tile(
                    m, mass, acc, query, end - 1, slope, keys, values, key_scales, value_scales, pages, start,
                    low, high, scale, softcap, window, page_stride, scale_page_stride,
                    SLOT, SCALE_SLOT, SIZE, PADDED, TILE, PAGE, DTYPE, True,
                )  # fmt: skip

        whole = live & (end <= finish * CHUNK) & (seen_from >= begin * CHUNK)
        partial = live & (end > begin * CHUNK) & (seen_from < finish * CHUNK)
        inside = column[None, :] < SIZE
        place = (wide_row * (KV_HEADS * GROUP) + head) * SIZE
        result = (acc / tl.where(mass == 0.0, 1.0, mass)[:, None]).to(out.dtype.element_ty)
        tl.store(out + place[:, None] + column[None, :], result, mask=whole[:, None] & inside)
        slot = tl.load(work + capacity + row, mask=partial & ~whole, other=-1)
        partial = partial & (slot >= 0)
        place = (slot + begin).to(tl.int64) * (KV_HEADS * GROUP) + head
        tl.store(sums + (place * SIZE)[:, None] + column[None, :], acc, mask=partial[:, None] & inside)
        tl.store(extremes + place * 2, m, mask=partial)
        tl.store(extremes + place * 2 + 1, mass, mask=partial)


@triton.jit(do_not_specialize=["capacity", "window"])
def _merge_kernel(
    sums,  # [C, N, SIZE] float32
    extremes,  # [C, N, 2] float32
    out,  # [T, N, SIZE]
    ends,
    work,
    capacity,
    window,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    CHUNK: tl.constexpr,
    UNROLLED: tl.constexpr,
):
    row, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    column = tl.arange(0, PADDED)
    inside = column < SIZE
    place = out + (row.to(tl.int64) * heads + head) * SIZE + column
    slot = tl.load(work + capacity + row)
    end = tl.load(ends + row)
    last = tl.cdiv(end, CHUNK)
    first = 0
    if window is not None:
        first = tl.maximum(end - window, 0) // CHUNK
    if slot < 0:
        tl.store(place, tl.full([PADDED], float("nan"), tl.float32).to(out.dtype.element_ty), mask=inside)
    elif last - first > 1:
        m, mass = float("-inf"), 0.0
        acc = tl.zeros([PADDED], tl.float32)
        for base in range(first, last, UNROLLED):
            for offset in tl.static_range(UNROLLED):
                chunk = base + offset
                partial = (slot + chunk).to(tl.int64) * heads + head
                m2 = tl.load(extremes + partial * 2, mask=chunk < last, other=float("-inf"))
                mass2 = tl.load(extremes + partial * 2 + 1, mask=chunk < last, other=0.0)
                size = tl.where(chunk < last, SIZE, 0)
                acc2 = tl.load(sums + partial * SIZE + column, mask=column < size, other=0.0)
                m, a, b = shares(m, m2)
                mass = mass * a + mass2 * b
                acc = acc * a + acc2 * b
        tl.store(place, (acc / mass).to(out.dtype.element_ty), mask=inside)


def rows_of_a_tile(heads: int, shared: bool) -> int:
    """M for `heads` rows per token: those of one token, or of as many members of a group as fit."""
    return max(LEAST_ROWS, heads, min(MOST_ROWS, heads * MEMBERS) if shared else 0)


def tokens_of_a_tile(group: int) -> int:
    """Tokens whose `group` query heads each a tile of one sequence's rows holds."""
    heads = triton.next_power_of_2(group)
    return rows_of_a_tile(heads, False) // heads


def attend_chunks(
    q: Tensor,
    out: Tensor,
    cache: KVLayer,
    table: Tensor,
    work: Tensor,
    ends: Tensor,
    merged: int,
    scale: float,
    alibi: Tensor | None,
    window: int | None,
    softcap: float | None,
    walk: bool,
) -> None:
    """Attention of the rows of q [T, N, H] that the list [7 or 12, C] names, into out [T, N, H]. Row t sees
    the positions before ends[t].

    The first `merged` rows have slots for partial results; 0 where every entry covers all that its rows see. `walk`:
    entries may have several chunks, and rows have the same bits however their chunks are spread over entries.
    """
    given = operands(q, cache, alibi, scale, window)
    capacity = work.shape[1]
    assert out.shape == q.shape and out.is_contiguous() and work.is_contiguous() and ends.is_contiguous()
    assert work.dtype == ends.dtype == table.dtype == torch.int32 and table.stride(1) == 1
    assert capacity >= max(merged, 2), f"a list of {capacity} entries for {merged} rows"
    heads = triton.next_power_of_2(given.group)
    padded = max(16, triton.next_power_of_2(given.size))
    sums = torch.empty(capacity if merged else 0, given.heads, given.size, dtype=torch.float32, device=q.device)
    extremes = torch.empty(capacity if merged else 0, given.heads, 2, dtype=torch.float32, device=q.device)
    exact = {"enable_fp_fusion": False}
    assert not (walk and len(work) > 2 + FIELDS), "rows of a group have other sums than a row alone"
    for shared in range(len(work) // FIELDS):
        rows = rows_of_a_tile(heads, bool(shared))
        lean = window is None and not walk
        sizes = tile(architecture(q.device), given.dtype, cache.k.dtype, padded, given.page, rows, lean)
        parts = MEMBERS * heads // rows if shared else 1
        grid = min(capacity * given.kv_heads * parts, processors(q.device) * sizes.resident)
        _chunks_kernel[(grid,)](
            q,
            *cache,
            out,
            sums,
            extremes,
            table,
            ends,
            alibi,
            work,
            capacity,
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
            parts,
            given.size,
            padded,
            sizes.positions,
            given.page,
            CHUNK,
            FIELDS,
            DTYPES[given.dtype],
            shared,
            walk,
            **options(sizes.warps, sizes.stages) | exact | {"maxnreg": sizes.registers},
        )
    if merged:
        _merge_kernel[(merged, given.heads)](
            sums,
            extremes,
            out,
            ends,
            work,
            capacity,
            window,
            given.size,
            padded,
            CHUNK,
            UNROLLED,
            **options(1) | exact,
        )
