"""Paged attention of a step: decode rows by chunks of K and V, prefill rows by tiles of queries, one launch each.

Letters: T rows, N query heads, H head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..attention import CHUNK, attend, decode_chunks
from ..ops import KVLayer, Sequences
from .attention_decode import attend_chunks, tokens_of_a_tile
from .attention_prefill import attend_tiles
from .attention_work import attention_work, row_work


def paged_attention(
    q: Tensor,
    cache: KVLayer,
    sequences: Sequences,
    scale: float,
    alibi: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """`ops.paged_attention`. Without `sequences.work` it makes that list itself, for sequences of `max_length`."""
    if sequences.backend == "torch":
        return attend(q, cache, sequences, scale, alibi, window, softcap)
    if sequences.backend == "flash":
        from .. import flash  # a package that most installations lack

        return flash.attend(q, cache, sequences, scale, alibi, window, softcap)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    options = (scale, alibi, window, softcap)
    decodes, lengths, table = sequences.decodes, sequences.lengths, sequences.page_table
    deterministic = sequences.deterministic
    if decodes:
        work = sequences.work
        if work is None:
            work = attention_work(lengths, decodes, max(2, decodes * decode_chunks(sequences.max_length)))
        merged = decodes if sequences.max_length > CHUNK else 0
        attend_chunks(q, out, cache, table, work, lengths, merged, *options, deterministic)
    if decodes < len(lengths):
        if deterministic:
            tokens = tokens_of_a_tile(q.shape[1] // cache.k.shape[1])
            work, ends = row_work(sequences.query_starts, lengths, decodes, len(q), tokens)
            attend_chunks(q, out, cache, table, work, ends, 0, *options, deterministic)
        else:
            attend_tiles(q, out, cache, table, sequences.query_starts, lengths, decodes, *options)
    return out
