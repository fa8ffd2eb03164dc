"""Attention over pages, and the list of its work: what `ops.paged_attention` and `ops.attention_work` compute.

Letters: T tokens of a step, B sequences, N query heads, K kv heads, G = N / K query heads that share a kv head, H head
size, P pages, S page size, M page-table width, C entries that a list of work has room for.
"""

# torch leaves the types of some functions and methods partly open.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from .ops import KVLayer, Sequences

# K (and as much V) that one round of decode attention gathers, in elements: 1 MiB in float32. From 4 MiB on every round
# runs on fresh, unmapped memory from the allocator; below 0.5 MiB the rounds' own cost shows.
GATHER_ELEMENTS = 1 << 18
# Elements of one attention mask with a plane per head (32 MiB in float32).
MASK_ELEMENTS = 1 << 23

CHUNK = 256  # positions that one partial result covers, the first of them a multiple of this
ROWS = 16  # positions of a block of queries in the fixed order, the first of them a multiple of this
MEMBERS = 16  # decode rows of one group that read a shared chunk together
FIELDS = 5  # of an entry of the list of work


def attend(
    q: Tensor,
    cache: KVLayer,
    sequences: Sequences,
    scale: float,
    alibi: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The body of `ops.paged_attention`, on any device. q [T, N, H] -> [T, N, H]."""
    out = torch.empty_like(q)
    starts, lengths = sequences.query_starts.tolist(), sequences.lengths.tolist()
    options = (scale, alibi, window, softcap)
    if 0 in lengths:
        out.zero_()
    decodes = 0 if sequences.deterministic else sequences.decodes
    if decodes and all(lengths[:decodes]):
        _attend_decodes(q[:decodes], out[:decodes], cache, sequences, lengths[:decodes], *options)
    elif decodes:
        live = [row for row in range(decodes) if lengths[row]]
        if live:
            kept, found = torch.tensor(live, device=q.device), torch.empty_like(q[: len(live)])
            part = sequences._replace(lengths=sequences.lengths[kept], page_table=sequences.page_table[kept], memo=None)
            _attend_decodes(q[kept], found, cache, part, [lengths[row] for row in live], *options)
            out[kept] = found
    attend_rows = _attend_in_fixed_order if sequences.deterministic else _attend_prefill
    for index in range(decodes, len(lengths)):
        first, last = starts[index], starts[index + 1]
        if first < last and lengths[index]:
            table = sequences.page_table[index : index + 1]
            attend_rows(q[first:last], out[first:last], cache, table, lengths[index], *options)
    return out


def decode_chunks(length: int) -> int:
    """Partial results, and slots of the list of work, that a decode row of this many K and V takes."""
    return max(1, -(-length // CHUNK))


class _Rows(NamedTuple):
    """Where the pages of some page tables [b, m] stand, head by head: rows of `_by_heads` of K and V, and of scales."""

    values: Tensor  # [b K m]
    scales: Tensor | None


def _rows(cache: KVLayer, table: Tensor) -> _Rows:
    heads = torch.arange(cache.k.shape[1], device=table.device, dtype=table.dtype).unsqueeze(-1)

    def of(pages: Tensor) -> Tensor:
        return torch.add(heads, table.unsqueeze(1), alpha=_apart(pages)).flatten()

    return _Rows(of(cache.k), None if cache.k_scale is None else of(cache.k_scale))


def _apart(pages: Tensor) -> int:
    """Heads' parts of a page [K, S, ...] from one page to the next: K, or more where something lies between."""
    apart, rest = divmod(pages.stride(0), prod(pages.shape[2:]))
    assert rest == 0, f"pages are {pages.stride(0)} elements apart: no multiple of a head's part {pages.shape[2:]}"
    return apart


def _by_heads(pages: Tensor) -> Tensor:
    """The memory of pages [P, K, S, ...] from the first to the last, head by head: [n, S, ...], nothing is copied."""
    count, kv_heads, *part = pages.shape
    assert kv_heads == 1 or pages.stride(1) == prod(part), "the heads of a page lie one behind another"
    return pages.as_strided(((count - 1) * _apart(pages) + kv_heads, *part), (prod(part), *pages.stride()[2:]))


def _gather(pages: Tensor, scales: Tensor | None, rows: _Rows, count: int) -> Tensor:
    """The tokens of `count` page tables, whose `_rows` these are, one behind another: [b, K, m S, H] float32."""
    kv_heads, size, width = pages.shape[1:]
    found = _by_heads(pages).index_select(0, rows.values).float()
    if scales is not None and rows.scales is not None:
        found *= _by_heads(scales).index_select(0, rows.scales).unsqueeze(-1)
    return found.view(count, kv_heads, len(found) // (count * kv_heads) * size, width)


class _Round(NamedTuple):
    """Decode rows that are computed together, and what of it is the same in every layer. Letters: b rows, m pages."""

    part: slice  # of the step's rows
    pages: _Rows
    distance: Tensor  # [b, 1, 1, m S], j - p
    hidden: Tensor  # [b, 1, 1, m S]
    seen: int  # leading positions that every row has
    behind: Tensor  # [b, 1, m S - seen, 1], of the others: hidden


def _rounds(sequences: Sequences, lengths: list[int], window: int | None, cache: KVLayer) -> list[_Round]:
    """As many rows at once as keep their gathered K and V in the processor's cache."""
    kv_heads, size, width = cache.k.shape[1:]
    firsts = [max(0, length - window) // size if window else 0 for length in lengths]  # first page that is seen
    counts = [-(-length // size) - first for length, first in zip(lengths, firsts, strict=True)]
    group = max(1, GATHER_ELEMENTS // (max(counts) * size * kv_heads * width))
    device, rounds = sequences.lengths.device, list[_Round]()
    for begin in range(0, len(lengths), group):
        part = slice(begin, min(begin + group, len(lengths)))
        m = max(counts[part])
        ends = sequences.lengths[part].unsqueeze(-1)  # [b, 1]
        offset = torch.tensor(firsts[part], device=device).unsqueeze(-1)
        column = torch.arange(m, device=device) + offset
        table = sequences.page_table[part].gather(1, column.where(column * size < ends, offset))
        position = torch.arange(m * size, device=device) + offset * size  # [b, m S]
        hidden = position >= ends
        if window:
            hidden |= position < ends - window
        shortest = min(n - f * size for n, f in zip(lengths[part], firsts[part], strict=True))
        distance = (position - (ends - 1)).view(-1, 1, 1, m * size)
        behind = hidden[:, None, shortest:, None]
        rounds.append(_Round(part, _rows(cache, table), distance, hidden.view(-1, 1, 1, m * size), shortest, behind))
    return rounds


def _attend_decodes(
    q: Tensor,
    out: Tensor,
    cache: KVLayer,
    sequences: Sequences,
    lengths: list[int],
    scale: float,
    alibi: Tensor | None,
    window: int | None,
    softcap: float | None,
) -> None:
    """One row per sequence. What every layer of the step would find out again is kept in `sequences.memo`."""
    kv_heads, width = cache.k.shape[1], cache.k.shape[3]
    heads = q.shape[1]
    memo: dict[object, list[_Round]] = {} if sequences.memo is None else sequences.memo
    rounds = memo.get(window)
    if rounds is None:
        rounds = memo[window] = _rounds(sequences, lengths, window, cache)
    queries = q.float().mul(scale).view(-1, kv_heads, heads // kv_heads, width)  # [b, K, G, H]
    for part, pages, distance, hidden, seen, behind in rounds:
        count = part.stop - part.start
        k, v = _gather(cache.k, cache.k_scale, pages, count), _gather(cache.v, cache.v_scale, pages, count)
        scores = queries[part] @ k.transpose(-1, -2)  # [b, K, G, m S]
        if softcap:
            scores = scores.div_(softcap).tanh_().mul_(softcap)
        if alibi is not None:
            scores += alibi.view(kv_heads, -1, 1) * distance
        scores.masked_fill_(hidden, -torch.inf)
        # What lies behind a sequence's end was never written: 0 · NaN would be NaN.
        v[:, :, seen:].masked_fill_(behind, 0)
        out[part] = (scores.softmax(-1) @ v).view(-1, heads, width)


def _attend_prefill(
    q: Tensor,
    out: Tensor,
    cache: KVLayer,
    table: Tensor,
    length: int,
    scale: float,
    alibi: Tensor | None,
    window: int | None,
    softcap: float | None,
) -> None:
    """The rows [n, N, H] of one sequence, its last n positions; masks are made for a block of rows at a time."""
    kv_heads, size = cache.k.shape[1:3]
    rows, heads = q.shape[:2]
    start = length - rows
    first = max(0, start + 1 - window) if window else 0  # first position that is seen
    table = table[:, first // size : -(-length // size)]
    seen = slice(first % size, first % size + length - first)
    pages = _rows(cache, table)
    k = _gather(cache.k, cache.k_scale, pages, 1)[:, :, seen]
    v = _gather(cache.v, cache.v_scale, pages, 1)[:, :, seen]
    queries = q.float().transpose(0, 1).unsqueeze(0)  # [1, N, n, H]
    if start == 0 and alibi is None and softcap is None and (not window or window >= length):
        result = F.scaled_dot_product_attention(queries, k, v, is_causal=True, scale=scale, enable_gqa=True)
        out.copy_(result[0].transpose(0, 1))
        return
    block = max(1, MASK_ELEMENTS // (heads * (length - first)))
    position = torch.arange(first, length, device=q.device)
    for begin in range(0, rows, block):
        row = torch.arange(start + begin, start + min(begin + block, rows), device=q.device).unsqueeze(-1)
        hidden = position > row
        if window:
            hidden |= position <= row - window
        bias = torch.zeros(hidden.shape, device=q.device).masked_fill_(hidden, -torch.inf)  # [n, L]
        if alibi is not None:
            bias = alibi.view(-1, 1, 1) * (position - row) + bias  # [N, n, L]
        part = queries[:, :, begin : begin + block]
        if softcap is None:
            result = F.scaled_dot_product_attention(part, k, v, attn_mask=bias, scale=scale, enable_gqa=True)
        else:
            grouped = part.unflatten(1, (kv_heads, -1))  # [1, K, G, n, H]
            scores = (grouped @ k.unsqueeze(2).transpose(-1, -2)).mul_(scale / softcap).tanh_().mul_(softcap)
            scores = scores.flatten(1, 2) + bias
            result = (scores.softmax(-1).unflatten(1, (kv_heads, -1)) @ v.unsqueeze(2)).flatten(1, 2)
        out[begin : begin + block] = result[0].transpose(0, 1)


def _attend_in_fixed_order(
    q: Tensor,
    out: Tensor,
    cache: KVLayer,
    table: Tensor,
    length: int,
    scale: float,
    alibi: Tensor | None,
    window: int | None,
    softcap: float | None,
) -> None:
    """`_attend_prefill` in an order of operations that depends on a row's own position and on nothing else.

    A row is computed at place p % ROWS of a block of queries, against CHUNK positions of K and V at a time. Every
    operation thus has one shape, whatever the step holds, and what a row does not see leaves its sums as they are.
    """
    heads, kv_heads = q.shape[1], cache.k.shape[1]
    start = length - q.shape[0]
    lanes, tokens = torch.arange(ROWS, device=q.device), torch.arange(CHUNK, device=q.device)
    for begin in range(start // ROWS * ROWS, length, ROWS):
        low, high = max(begin, start), min(begin + ROWS, length)
        block = torch.zeros(ROWS, *q.shape[1:], device=q.device)
        block[low - begin : high - begin] = q[low - start : high - start]
        # [K, G ROWS, H]
        queries = block.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3).flatten(1, 2).mul(scale)
        row = (lanes + begin).repeat(heads // kv_heads).unsqueeze(-1)  # [G ROWS, 1]
        slopes = None if alibi is None else alibi.view(kv_heads, -1).repeat_interleave(ROWS, 1).unsqueeze(-1)
        top = torch.full((*queries.shape[:2], 1), -torch.inf, device=q.device)
        total, sums = torch.zeros_like(top), torch.zeros_like(queries)
        first = max(0, low + 1 - window) if window else 0
        for chunk in range(first // CHUNK, -(-high // CHUNK)):
            position = tokens + chunk * CHUNK
            seen = (position >= first) & (position < high)
            k = _pick(cache.k, cache.k_scale, table[0], position, seen)
            v = _pick(cache.v, cache.v_scale, table[0], position, seen)
            scores = queries @ k.transpose(-1, -2)  # [K, G ROWS, CHUNK]
            if softcap:
                scores = scores.div_(softcap).tanh_().mul_(softcap)
            if slopes is not None:
                scores += slopes * (position - row)
            hidden = (position > row) | ~seen
            if window:
                hidden |= position <= row - window
            scores.masked_fill_(hidden, -torch.inf)
            before, top = top, torch.maximum(top, scores.amax(-1, keepdim=True))
            finite = top.masked_fill(top == -torch.inf, 0)  # of a row that has seen nothing yet
            weights, kept = scores.sub_(finite).exp_(), (before - finite).exp_()
            total = total * kept + weights.sum(-1, keepdim=True)
            sums = sums * kept + weights @ v
        found = (sums / total).unflatten(1, (-1, ROWS)).permute(2, 0, 1, 3).flatten(1, 2)  # [ROWS, N, H]
        out[low - start : high - start] = found[low - begin : high - begin]


def _pick(pages: Tensor, scales: Tensor | None, table: Tensor, position: Tensor, seen: Tensor) -> Tensor:
    """The tokens at positions [n] of one sequence with page table [m], 0 where not seen: [K, n, H] float32."""
    size = pages.shape[2]
    page, offset = table[torch.where(seen, position // size, position[:1] * 0)], position % size
    page = torch.where(seen, page, 0)
    found = pages[page, :, offset].float()  # [n, K, H]
    if scales is not None:
        found *= scales[page, :, offset].unsqueeze(-1)
    return found.masked_fill_(~seen.view(-1, 1, 1), 0).transpose(0, 1).contiguous()


def attention_work(lengths: Tensor, decodes: int, capacity: int, prefixes: Tensor | None = None) -> Tensor:
    """The body of `ops.attention_work`."""
    work = torch.full((2 + FIELDS * (1 if prefixes is None else 2), capacity), -1, dtype=torch.int32)
    entries: list[tuple[int, ...]] = []
    shared: list[tuple[int, ...]] = []
    slot = 0
    leaders, tokens = (list(range(decodes)), [0] * decodes) if prefixes is None else prefixes[:, :decodes].tolist()
    for row, length in enumerate(lengths[:decodes].tolist()):
        chunks = decode_chunks(length)
        assert 0 <= tokens[row] < max(1, length), "a row shares less than all it has"
        common = tokens[row] // CHUNK
        if slot + chunks <= capacity:
            work[1, row] = slot
            entries += [(row, row, 1, chunk, chunk + 1) for chunk in range(common, chunks)]
        if (row - leaders[row]) % MEMBERS == 0:
            members = sum(leader == leaders[row] for leader in leaders[row : row + MEMBERS])
            shared += [(row, row, members, chunk, chunk + 1) for chunk in range(common)]
        slot += chunks
    shared = shared[:capacity]
    work[0, 0], work[0, 1] = len(entries), len(shared)
    for first, part in ((2, entries), (2 + FIELDS, shared)):
        if part:
            work[first : first + FIELDS, : len(part)] = torch.tensor(part, dtype=torch.int32).T
    return work.to(lengths.device)
