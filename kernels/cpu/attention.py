"""Paged attention on CPUs. See attention.h."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..ops import KVLayer, Sequences
from .native import WIDEST_HEAD, Attention, at, native, number, page_step


def paged_attention(
    q: Tensor,
    cache: KVLayer,
    sequences: Sequences,
    scale: float,
    alibi: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """`ops.paged_attention`, in a fixed order always, where K and V are kept in q's dtype."""
    found, kind = native(), number(q.dtype)
    kv_heads, page, size = cache.k.shape[1:]
    if found is None or kind is None or cache.k.dtype != q.dtype or size % 2 or size > WIDEST_HEAD:
        return ops.paged_attention.__wrapped__(q, cache, sequences, scale, alibi, window, softcap)
    q, table = q.contiguous(), sequences.page_table.contiguous()
    out = torch.empty_like(q)
    tensors = (q, cache.k, cache.v, out, sequences.query_starts, sequences.lengths, table, alibi)
    pages = (kv_heads, size, page, page_step(cache.k, cache.v))
    shape = (len(sequences.lengths), table.shape[1], q.shape[1], *pages, window or 0, kind)
    found.run("tandem_attention", Attention(*map(at, tensors), *shape, scale, softcap or 0.0))
    return out
