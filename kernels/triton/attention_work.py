"""Lists of work for the attention kernels, made on the device from lengths that the host need not know.

    chunks(r) = max(1, ceil(length(r) / CHUNK)),  slot(r) = Σ chunks(r') over r' < r

One program per row: it sums over the rows before it (4 bytes each, from L2) and writes its own entries, so programs
need not wait for each other.

Letters: B sequences, R rows, C capacity of a list.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..attention import CHUNK, FIELDS, MEMBERS
from .launch import options

LANES = 128  # rows that are summed, and entries that are written, at a time


@triton.jit
def _write_entries(entries, capacity, first, row, rows, begin, end, LANES: tl.constexpr):
    """Entries first, first + 1, … of `rows` rows from `row` on, each with one of the chunks [begin, end)."""
    for base in range(begin, end, LANES):
        chunk = base + tl.arange(0, LANES)
        index = first + (chunk - begin)
        there = (chunk < end) & (index < capacity)
        tl.store(entries + index, row, mask=there)
        tl.store(entries + capacity + index, row, mask=there)
        tl.store(entries + 2 * capacity + index, rows, mask=there)
        tl.store(entries + 3 * capacity + index, chunk, mask=there)
        tl.store(entries + 4 * capacity + index, chunk + 1, mask=there)


@triton.jit(do_not_specialize=["decodes", "capacity", "prefix_stride"])
def _decode_work_kernel(
    lengths,
    prefixes,  # [2, B]: first row of the group, shared tokens
    work,
    decodes,
    capacity,
    prefix_stride,
    CHUNK: tl.constexpr,
    MEMBERS: tl.constexpr,
    FIELDS: tl.constexpr,
    LANES: tl.constexpr,
):
    here = tl.program_id(0)
    slot, entry, shared_entry = 0, 0, 0
    for base in range(0, here, LANES):
        row = base + tl.arange(0, LANES)
        before = row < here
        chunks = tl.maximum(tl.cdiv(tl.load(lengths + row, mask=before, other=0), CHUNK), 1)
        # Once a row does not fit, no row behind it does: entries count the rows that fit.
        chunks = tl.where(before, chunks, 0)
        behind = slot + tl.cumsum(chunks, 0)
        if prefixes is not None:
            leader = tl.load(prefixes + row, mask=before, other=0)
            common = tl.load(prefixes + prefix_stride + row, mask=before, other=0) // CHUNK
            shared_entry += tl.sum(tl.where(before & ((row - leader) % MEMBERS == 0), common, 0))
            own = chunks - common
        else:
            own = chunks
        entry += tl.sum(tl.where(before & (behind <= capacity), own, 0))
        slot += tl.sum(chunks)
    chunks = tl.maximum(tl.cdiv(tl.load(lengths + here), CHUNK), 1)
    fits = slot + chunks <= capacity
    tl.store(work + capacity + here, tl.where(fits, slot, -1))
    common = 0
    if prefixes is not None:
        leader = tl.load(prefixes + here)
        common = tl.load(prefixes + prefix_stride + here) // CHUNK
        if (here - leader) % MEMBERS == 0:
            near = here + tl.arange(0, MEMBERS)
            members = tl.sum((tl.load(prefixes + near, mask=near < decodes, other=-1) == leader).to(tl.int32))
            shared = work + (2 + FIELDS) * capacity
            _write_entries(shared, capacity, shared_entry, here, members, 0, common, LANES)
            shared_entry += common
        if here == decodes - 1:
            tl.store(work + 1, tl.minimum(shared_entry, capacity))
    else:
        if here == decodes - 1:
            tl.store(work + 1, 0)
    if fits:
        _write_entries(work + 2 * capacity, capacity, entry, here, 1, common, chunks, LANES)
        entry += chunks - common
    if here == decodes - 1:
        tl.store(work, entry)


@triton.jit(do_not_specialize=["decodes", "sequences", "capacity"])
def _row_work_kernel(
    query_starts,
    lengths,
    work,
    ends,
    decodes,
    sequences,
    capacity,
    TOKENS: tl.constexpr,
    CHUNK: tl.constexpr,
    LANES: tl.constexpr,
):
    here = decodes + tl.program_id(0)
    entry = 0
    for base in range(decodes, here, LANES):
        sequence = base + tl.arange(0, LANES)
        before = sequence < here
        first = tl.load(query_starts + sequence, mask=before, other=0)
        last = tl.load(query_starts + sequence + 1, mask=before, other=0)
        entry += tl.sum(tl.cdiv(last - first, TOKENS))
    first, last = tl.load(query_starts + here), tl.load(query_starts + here + 1)
    length = tl.load(lengths + here)
    entries = work + 2 * capacity
    for base in range(first, last, LANES):
        row = base + tl.arange(0, LANES)
        tl.store(ends + row, length - (last - 1 - row), mask=row < last)
    for base in range(first, last, LANES * TOKENS):
        row = base + tl.arange(0, LANES) * TOKENS
        index = entry + (row - first) // TOKENS
        behind = tl.minimum(row + TOKENS, last)
        there = row < last
        tl.store(entries + index, here, mask=there)
        tl.store(entries + capacity + index, row, mask=there)
        tl.store(entries + 2 * capacity + index, behind - row, mask=there)
        tl.store(entries + 3 * capacity + index, 0, mask=there)
        tl.store(entries + 4 * capacity + index, tl.cdiv(length - (last - behind), CHUNK), mask=there)
    if here == sequences - 1:
        tl.store(work, entry + tl.cdiv(last - first, TOKENS))


def attention_work(lengths: Tensor, decodes: int, capacity: int, prefixes: Tensor | None = None) -> Tensor:
    """`ops.attention_work`: [7 or 12, C] int32."""
    assert lengths.dtype == torch.int32 and lengths.is_contiguous() and len(lengths) >= decodes > 0
    assert capacity >= max(decodes, 2), f"a list of {capacity} entries for {decodes} rows"
    lists, stride = 1, 0
    if prefixes is not None:
        assert prefixes.dtype == torch.int32 and prefixes.stride(1) == 1 and prefixes.shape[1] >= decodes
        lists, stride = 2, prefixes.stride(0)
    work = torch.empty(2 + FIELDS * lists, capacity, dtype=torch.int32, device=lengths.device)
    _decode_work_kernel[(decodes,)](
        lengths, prefixes, work, decodes, capacity, stride, CHUNK, MEMBERS, FIELDS, LANES, **options(1)
    )
    return work


def row_work(query_starts: Tensor, lengths: Tensor, decodes: int, rows: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Entries of up to `tokens` rows and all they see, for the sequences that do not decode: (list, ends of rows [T]).

    `rows` is T, that of the decodes included, whose ends are left unwritten.
    """
    sequences = len(lengths) - decodes
    capacity = max(2, (rows - decodes) // tokens + sequences)
    work = torch.empty(2 + FIELDS, capacity, dtype=torch.int32, device=lengths.device)
    ends = torch.empty(rows, dtype=torch.int32, device=lengths.device)
    _row_work_kernel[(sequences,)](
        query_starts, lengths, work, ends, decodes, len(lengths), capacity, tokens, CHUNK, LANES, **options(1)
    )
    return work, ends
