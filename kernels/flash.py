"""Attention by flash-attn 2, for CUDA devices where it is installed and asked for (`Sequences.backend = "flash"`).

Its paged functions take pages [P, S, K, H] of any strides but the last: our [P, K, S, H] seen transposed, nothing is
copied. `check` says at start what they cannot do; nothing here is imported before somebody asks for it.

Letters: T rows, B sequences, N query heads, K kv heads, H head size, P pages, S page size.
"""

# flash-attn is not installed where the types are checked.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .ops import KVLayer, Sequences

PAGE = 256  # page sizes are multiples of it
MAX_HEAD = 256
DTYPES = (torch.float16, torch.bfloat16)


class FlashUnavailable(RuntimeError):
    """What was asked of flash-attn it cannot do here; the message says what can be done instead."""


def check(head_size: int, page_size: int, dtype: torch.dtype, cache_dtype: torch.dtype, deterministic: bool) -> None:
    """Raise FlashUnavailable unless flash-attn is installed and serves a model of `dtype` with such pages.

    ALiBi, windows and soft caps it has, grouped heads too. It refuses int8 pages, float32, and the deterministic mode:
    its splits depend on the batch.
    """
    if find_spec("flash_attn") is None:
        raise FlashUnavailable(
            "the package flash-attn is not installed: pip install tandem[flash], or use triton attention"
        )
    if cache_dtype == torch.int8:
        raise FlashUnavailable("flash-attn does not read int8 KV pages: use triton attention, or pages in 16 bits")
    if dtype not in DTYPES or cache_dtype != dtype:
        raise FlashUnavailable(
            f"flash-attn needs float16 or bfloat16, the same in model and KV pages, not {dtype} and {cache_dtype}"
        )
    if page_size % PAGE:
        raise FlashUnavailable(f"flash-attn needs pages of a multiple of {PAGE} tokens, not {page_size}")
    if head_size % 8 or head_size > MAX_HEAD:
        raise FlashUnavailable(
            f"flash-attn needs a head size that is a multiple of 8 up to {MAX_HEAD}, not {head_size}"
        )
    if deterministic:
        raise FlashUnavailable("flash-attn is not deterministic across batches: use triton or torch attention")


def attend(
    q: Tensor,
    cache: KVLayer,
    sequences: Sequences,
    scale: float,
    alibi: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """`ops.paged_attention` of what `check` let pass. q [T, N, H] -> [T, N, H].

    Decode rows go to the split-KV kernel, prefill rows to the one for sequences of different lengths.
    """
    flash: Any = import_module("flash_attn")
    k, v = cache.k.transpose(1, 2), cache.v.transpose(1, 2)  # [P, S, K, H]
    # flash-attn's window counts the positions beside the row's own, its bias is -slope · |j - p|.
    options = {
        "softmax_scale": scale,
        "causal": True,
        "window_size": (-1, -1) if window is None else (window - 1, 0),
        "softcap": softcap or 0.0,
        "alibi_slopes": alibi,
    }
    decodes, rows = sequences.decodes, len(sequences.lengths)
    parts: list[Tensor] = []
    if decodes:
        found = flash.flash_attn_with_kvcache(
            q[:decodes].unsqueeze(1),
            k,
            v,
            cache_seqlens=sequences.lengths[:decodes],
            block_table=sequences.page_table[:decodes],
            **options,
        )  # [B, 1, N, H]
        parts.append(found.squeeze(1))
    if decodes < rows:
        lengths = sequences.lengths[decodes:]
        key_starts = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        found = flash.flash_attn_varlen_func(
            q[decodes:],
            k,
            v,
            cu_seqlens_q=sequences.query_starts[decodes:] - decodes,
            cu_seqlens_k=key_starts,
            max_seqlen_q=sequences.max_query,
            max_seqlen_k=sequences.max_length,
            block_table=sequences.page_table[decodes:],
            **options,
        )  # [T, N, H]
        parts.append(found)
    return parts[0] if len(parts) == 1 else torch.cat(parts)
