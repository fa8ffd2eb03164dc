"""Attention over `paged.Paged` sequences in float64, by one dense product per sequence.

Letters: T rows, N query heads, K kv heads, H head size, n rows and L length of a sequence.
"""

from __future__ import annotations

import torch
from closeness import DEVICE, assert_close
from paged import Paged
from torch import Tensor

# Slopes of different size and no order, for 8 heads.
SLOPES = torch.tensor([0.5, 0.25, 0.03, 0.7, 0.01, 0.1, 0.002, 0.06])


def exact(
    q: Tensor,
    paged: Paged,
    scale: float,
    alibi: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """q [T, N, H] -> [T, N, H] float64."""
    starts = paged.sequences.query_starts.tolist()
    rows: list[Tensor] = []
    for first, last, k, v in zip(starts, starts[1:], paged.k, paged.v, strict=False):
        heads = q.shape[1] // k.shape[1]
        j = torch.arange(len(k), device=q.device)
        distance = j - (j[len(k) - (last - first) :]).unsqueeze(-1)  # [n, L]
        scores = torch.einsum("nhd,lhd->hnl", q[first:last].double(), k.repeat_interleave(heads, 1)) * scale
        if softcap is not None:
            scores = softcap * (scores / softcap).tanh()
        if alibi is not None:
            scores = scores + alibi.double().view(-1, 1, 1) * distance
        hidden = distance > 0
        if window is not None:
            hidden |= distance <= -window
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        rows.append(torch.einsum("hnl,lhd->nhd", weights, v.repeat_interleave(heads, 1)))
    return torch.cat(rows)


# Units in the last place of values of size 1. Weights are rounded to the dtype before they meet v.
ULPS = {torch.float32: 40, torch.float16: 4, torch.bfloat16: 4}


def check(found: Tensor, q: Tensor, paged: Paged, scale: float, **options: object) -> None:
    """`found` is what `exact` says, in q's dtype."""
    wanted = exact(q, paged, scale, **options)  # type: ignore[arg-type]
    assert_close(found, wanted, q.dtype, ULPS[q.dtype], magnitude=1)


def on_device(options: dict[str, object]) -> dict[str, object]:
    return {name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in options.items()}
