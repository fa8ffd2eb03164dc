"""Whole texts through a model at once, in pages of their own: as the engine computes prompts, without an engine.

Letters: T tokens of all texts together, B texts, S page size, M page-table width, D model size.
"""

# torch leaves the types of split open.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.ops import Sequences
from .batch import Batch
from .kv_cache import KVCache
from .model import Model

PAGE = 64  # tokens


def read_texts(model: Model, texts: Sequence[Sequence[int]], kv_dtype: torch.dtype | None = None) -> list[Tensor]:
    """Hidden states [length, D] of each text after the last norm. `kv_dtype`: of K and V; None: the model's.

    No text may be empty or longer than the model's context.
    """
    device, dtype = model.place.device, kv_dtype or model.dtype
    lengths = torch.tensor([len(text) for text in texts])
    pages = -(-lengths // PAGE)  # of each text
    cache = KVCache(model.config, int(pages.sum()), PAGE, dtype, device)
    hidden = model.forward(_batch(texts, lengths, pages, model), cache)
    return list(hidden.split([len(text) for text in texts]))


def _batch(texts: Sequence[Sequence[int]], lengths: Tensor, pages: Tensor, model: Model) -> Batch:
    """Each text's pages lie one behind another."""
    device, longest = model.place.device, int(lengths.max())
    positions = torch.cat([torch.arange(len(text)) for text in texts])  # [T]
    first_pages = pages.cumsum(0) - pages  # [B]
    table = first_pages.unsqueeze(1) + torch.arange(int(pages.max()))  # [B, M], beyond a text's own: other texts'
    return Batch(
        torch.tensor([token for text in texts for token in text], device=device),
        positions.to(device),
        (positions + (first_pages * PAGE).repeat_interleave(lengths)).to(device),
        Sequences(
            torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0))).int().to(device),
            lengths.int().to(device),
            table.int().to(device),
            0,
            longest,
            longest,
            deterministic=model.deterministic,
            memo={},
        ),
    )
