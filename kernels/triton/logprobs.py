"""Log-probabilities of given tokens, their ranks and the most likely beside them.

    value = f x_target - log sum_v exp(f x_v)        rank = 1 + #{v: x_v > x_target}        f: the row's factor, or 1

`_part_kernel` over (row, tiles of the vocabulary): the maximum, the sum of exponentials relative to it, the number of
tokens above the target's; `_join_kernel` puts a row's parts together. The tiles depend on V alone: a token has the same
bits when it is drawn and when it is scored later, from the same logits, whatever dtype holds them and whatever rows lie
beside them. A row is read once, 2 V or 4 V bytes; one with target -1 only if the most likely tokens are wanted, which
`torch.topk` finds. Scoring brings the logits as the head gives them, in rounds of `ops.DEVICE_LOGIT_ELEMENTS`.

Letters: T rows, V vocabulary, S = ceil(V / BLOCK) parts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops import TokenLogprobs
from .launch import options, warps

BLOCK = 4096


@triton.jit(do_not_specialize=["parts"])
def _part_kernel(
    logits, targets, factors, peaks, sums, above, stride, vocab_size, parts, ALL: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    target = tl.load(targets + row)
    if ALL | (target >= 0):
        token = part * BLOCK + tl.arange(0, BLOCK)
        chosen = tl.load(logits + row * stride + tl.maximum(target, 0)).to(tl.float32)
        value = tl.load(logits + row * stride + token, mask=token < vocab_size, other=-float("inf")).to(tl.float32)
        higher = tl.sum((value > chosen).to(tl.int32), 0)
        if factors is not None:
            value *= tl.load(factors + row)
        peak = tl.max(value, 0)
        reference = tl.where(tl.abs(peak) == float("inf"), 0.0, peak)
        place = row * parts + part
        tl.store(peaks + place, peak)
        tl.store(sums + place, tl.sum(tl.exp(value - reference), 0))
        tl.store(above + place, higher)


@triton.jit(do_not_specialize=["parts"])
def _join_kernel(
    logits,
    targets,
    factors,
    peaks,
    sums,
    above,
    values,
    ranks,
    norms,
    stride,
    parts,
    ALL: tl.constexpr,
    PARTS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    value = 0.0
    rank = 0
    if ALL | (target >= 0):
        part = tl.arange(0, PARTS)
        place, inside = row * parts + part, part < parts
        peak = tl.load(peaks + place, mask=inside, other=-float("inf"))
        best = tl.max(peak, 0)
        reference = tl.where(tl.abs(peak) == float("inf"), 0.0, peak)
        weight = tl.where(peak == -float("inf"), 0.0, tl.exp(reference - best))
        norm = best + tl.log(tl.sum(tl.load(sums + place, mask=inside, other=0.0) * weight, 0))
        tl.store(norms + row, norm)
        chosen = tl.load(logits + row * stride + tl.maximum(target, 0)).to(tl.float32)
        if factors is not None:
            chosen *= tl.load(factors + row)
        higher = tl.sum(tl.load(above + place, mask=inside, other=0), 0)
        value = tl.where(target >= 0, chosen - norm, 0.0)
        rank = tl.where(target >= 0, higher + 1, 0)
    tl.store(values + row, value)
    tl.store(ranks + row, rank.to(tl.int64))


def token_logprobs(logits: Tensor, targets: Tensor, top: int, factors: Tensor | None = None) -> TokenLogprobs:
    """`ops.token_logprobs`. logits [T, V] may have any stride between rows, none within; targets and factors are
    contiguous."""
    rows, vocab_size = logits.shape
    assert logits.stride(1) == 1 or vocab_size == 1
    assert targets.shape == (rows,) and targets.dtype == torch.int64 and targets.is_contiguous()
    if factors is not None:
        assert factors.shape == (rows,) and factors.dtype == torch.float32 and factors.is_contiguous()
    device, parts, listed = logits.device, triton.cdiv(vocab_size, BLOCK), top > 0
    values, norms = torch.empty((2, rows), dtype=torch.float32, device=device)
    ranks = torch.empty(rows, dtype=torch.int64, device=device)
    if rows:
        peaks, sums = torch.empty((2, rows, parts), dtype=torch.float32, device=device)
        above = torch.empty((rows, parts), dtype=torch.int32, device=device)
        found = peaks, sums, above
        _part_kernel[(rows, parts)](
            *(logits, targets, factors, *found, logits.stride(0), vocab_size, parts, listed, BLOCK),
            **options(warps(BLOCK, 32)),
        )
        width = triton.next_power_of_2(parts)
        _join_kernel[(rows,)](
            *(logits, targets, factors, *found, values, ranks, norms, logits.stride(0), parts, listed, width),
            **options(1),
        )
    best = logits.topk(min(top, vocab_size))
    likely = best.values.float() if factors is None else best.values.float() * factors.unsqueeze(1)
    return TokenLogprobs(values, ranks, likely - norms.unsqueeze(1), best.indices)
