"""Paged attention on CPUs. See attention.h."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..ops import KVLayer, Sequences
from .native import Attention, at, native, number, pages_of


def paged_attention(
    q: Tensor,
    cache: KVLayer,
    sequences: Sequences,
    scale: float,
    alibi: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """`ops.paged_attention`, in a fixed order always, where K and V are kept in q's dtype or in int8."""
    found, kind, pages = native(), number(q.dtype), pages_of(cache, q.dtype)
    if found is None or kind is None or pages is None or cache.k.shape[3] % 2:
        return ops.paged_attention.__wrapped__(q, cache, sequences, scale, alibi, window, softcap)
    q, table = q.contiguous(), sequences.page_table.contiguous()
    out = torch.empty_like(q)
    tensors = (q, out, sequences.query_starts, sequences.lengths, table, alibi)
    shape = (len(sequences.lengths), table.shape[1], q.shape[1], window or 0, kind)
    found.run("tandem_attention", Attention(*map(at, tensors), pages, *shape, scale, softcap or 0.0))
    return out
