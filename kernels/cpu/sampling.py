"""The draw of tokens and their log-probabilities on CPUs, from logits in float32 and bfloat16; others are the
definitions'. See draw.h and logprobs.h.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops, sampling
from ..ops import TokenLogprobs
from ..sampling import Draws
from .native import Draw, Greedy, Logprobs, Native, at, native, number


def greedy(logits: Tensor) -> Tensor:
    found, kind = _taken(logits)
    if found is None:
        return sampling.greedy.__wrapped__(logits)
    logits = logits.contiguous()
    tokens = torch.empty(len(logits), dtype=torch.int64)
    found.run("tandem_greedy", Greedy(at(logits), at(tokens), *logits.shape, kind))
    return tokens


def draw(logits: Tensor, how: Draws) -> tuple[Tensor, Tensor]:
    found, kind = _taken(logits)
    if found is None:
        return sampling.draw.__wrapped__(logits, how)
    logits, rows = logits.contiguous(), len(logits)
    tokens, lowest = torch.empty(rows, dtype=torch.int64), torch.empty(rows)
    given = [column.contiguous() for column in how._replace(min_p=how.min_p.log())]
    kinds = [torch.float32, *[torch.int64] * 4, torch.float32, torch.float32]
    assert all(column.shape == (rows,) for column in given) and [column.dtype for column in given] == kinds
    found.run("tandem_draw", Draw(at(logits), *map(at, given), at(tokens), at(lowest), *logits.shape, kind))
    return tokens, lowest


def token_logprobs(logits: Tensor, targets: Tensor, top: int, factors: Tensor | None = None) -> TokenLogprobs:
    found, kind = _taken(logits)
    if found is None:
        return ops.token_logprobs.__wrapped__(logits, targets, top, factors)
    logits, (rows, size) = logits.contiguous(), logits.shape
    top = min(top, size)
    assert targets.shape == (rows,) and targets.dtype == torch.int64 and targets.is_contiguous()
    assert factors is None or (factors.shape == (rows,) and factors.dtype == torch.float32 and factors.is_contiguous())
    values, top_values = torch.empty(rows), torch.empty(rows, top)
    ranks, top_ids = torch.empty(rows, dtype=torch.int64), torch.empty((rows, top), dtype=torch.int64)
    result = TokenLogprobs(values, ranks, top_values, top_ids)
    call = Logprobs(at(logits), at(targets), at(factors), *map(at, result), rows, size, top, kind)
    found.run("tandem_logprobs", call)
    return result


def _taken(logits: Tensor) -> tuple[Native | None, int | None]:
    """What computes, and the number of the dtype; None where it is the definition's work."""
    found, kind = native(), number(logits.dtype)
    return (None, None) if kind is None else (found, kind)
