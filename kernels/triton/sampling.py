"""The draw of tokens: `sample` of kernels/sampling.py, with nothing read by the host and no size that depends on data.

A token is drawn as the definition does, a group of 128 first and then one of its tokens:

    group = argmax_g (sum over g of exp((x - max) / T)) / noise_g        token = argmax_t exp((x_t - max) / T) / noise_t

1. `edit` (sampling_edits.py), where the step uses bias, masks, bans or penalties
2. `_groups_kernel` over (row, tiles of groups): each group's maximum and, relative to it, sum. The one pass over the
   logits: reads 2 V or 4 V bytes per row, writes V / 16.
3. `_pick_kernel`, one program per row: the group, then the token, of rows that keep all tokens; greedy ones, too
4. `restrict` (sampling_restrict.py), where the step uses top-k, top-p or min-p: the token of rows that do
5. `_show_kernel`, where processed log-probabilities are wanted

Memory in between: see `sampling.workspace`. Letters: R rows, V vocabulary, G = ceil(V / 128) groups.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import sampling
from ..sampling import Drawn, Slots
from .launch import options, warps
from .sampling_edits import edit
from .sampling_restrict import restrict
from .sampling_row import LANES, LOG2E, exponential, integer, number, values_of

USES, TEMPERATURE = tl.constexpr(sampling.USES), tl.constexpr(sampling.TEMPERATURE)
PROMPT = tl.constexpr(sampling.PROMPT)
DRAW, RESTRICT = tl.constexpr(sampling.DRAW), tl.constexpr(sampling.RESTRICT)
EDITS, PROCESSED = tl.constexpr(sampling.EDITS), tl.constexpr(sampling.PROCESSED)

GROUPS_TILE = 32  # groups of a program of `_groups_kernel`; the same at any R, and so are a row's sums
SHOW_BLOCK = 2048


@triton.jit(do_not_specialize=["groups"])
def _groups_kernel(
    logits,
    edited,
    columns,
    slots,
    peaks,
    masses,
    stride,
    edited_stride,
    vocab_size,
    groups,
    MASKED: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    uses = integer(columns, slot, USES)
    logits += row * stride
    if edited is not None:
        edited += row * edited_stride
    group = tl.program_id(1) * TILE + tl.arange(0, TILE)
    token = group[:, None] * LANES + tl.arange(0, LANES)[None, :]
    changed = (uses & EDITS) | MASKED
    value = values_of(logits, edited, token, token < vocab_size, changed)
    value = tl.where(value == value, value, float("inf"))  # NaN, like infinity, fails the row
    peak = tl.max(value, 1)
    tl.store(peaks + row * groups + group, peak, mask=group < groups)
    if uses & DRAW:
        reference = tl.where(tl.abs(peak) == float("inf"), 0.0, peak)
        factor = LOG2E / number(columns, slot, TEMPERATURE)
        mass = tl.sum(tl.exp2((value - reference[:, None]) * factor), 1)
        tl.store(masses + row * groups + group, mass, mask=group < groups)


@triton.jit(do_not_specialize=["groups"])
def _pick_kernel(
    logits,
    edited,
    columns,
    slots,
    lengths,
    peaks,
    masses,
    tokens,
    limits,
    stride,
    edited_stride,
    vocab_size,
    groups,
    MASKED: tl.constexpr,
    GROUPS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    uses = integer(columns, slot, USES)
    logits += row * stride
    if edited is not None:
        edited += row * edited_stride
    if (uses & RESTRICT) == 0:
        group = tl.arange(0, GROUPS)
        lane = tl.arange(0, LANES)
        peak = tl.load(peaks + row * groups + group, mask=group < groups, other=-float("inf"))
        best = tl.max(peak, 0)
        reference = tl.where(tl.abs(best) == float("inf"), 0.0, best)
        changed = (uses & EDITS) | MASKED
        if uses & DRAW:
            position = (tl.load(lengths + row) - integer(columns, slot, PROMPT)).to(tl.int32)
            factor = LOG2E / number(columns, slot, TEMPERATURE)
            mass = tl.load(masses + row * groups + group, mask=group < groups, other=0.0)
            score = mass * tl.exp2((peak - reference) * factor) / exponential(group, columns, slot, position)
            chosen = tl.argmax(score, 0)
            token = chosen * LANES + lane
            value = values_of(logits, edited, token, token < vocab_size, changed)
            score = tl.exp2((value - reference) * factor) / exponential(groups + lane, columns, slot, position)
        else:
            chosen = tl.argmax(peak, 0)
            token = chosen * LANES + lane
            score = values_of(logits, edited, token, token < vocab_size, changed)
        chosen = chosen * LANES + tl.argmax(score, 0)
        tl.store(tokens + row, tl.where(tl.abs(best) == float("inf"), -1, chosen).to(tl.int64))
        if limits is not None:
            tl.store(limits + 2 * row, best)
            tl.store(limits + 2 * row + 1, -float("inf"))


@triton.jit
def _show_kernel(
    logits,
    edited,
    shown,
    columns,
    slots,
    limits,
    stride,
    edited_stride,
    shown_stride,
    vocab_size,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    uses = integer(columns, slot, USES)
    logits += row * stride
    if edited is not None:
        edited += row * edited_stride
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = token < vocab_size
    processed = (uses & PROCESSED) != 0
    changed = tl.where(processed, (uses & EDITS) | MASKED, 0)
    value = values_of(logits, edited, token, inside, changed)
    if processed & ((uses & DRAW) != 0):
        best, lowest = tl.load(limits + 2 * row), tl.load(limits + 2 * row + 1)
        value = tl.div_rn(value - best, tl.zeros_like(value) + number(columns, slot, TEMPERATURE))
        value = tl.where(value >= lowest, value, -float("inf"))
    tl.store(shown + row * shown_stride + token, value, mask=inside)


def sample(
    logits: Tensor, slots: Tensor, lengths: Tensor, state: Slots, uses: int, mask: Tensor | None = None
) -> Drawn:
    """`sampling.sample`. logits [R, V] may have any stride between rows, none within; all else is contiguous."""
    rows, vocab_size = logits.shape
    assert logits.stride(1) == 1 or vocab_size == 1
    assert slots.shape == lengths.shape == (rows,) and slots.dtype == lengths.dtype == torch.int64
    assert state.columns.shape[1] == sampling.COLUMNS and state.history.stride(1) == 1
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows == 0:
        return Drawn(tokens, logits)
    columns, masked, groups = state.columns, int(mask is not None), sampling.groups(vocab_size)

    def scratch(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=logits.device)

    edited, edited_stride = None, 0
    if uses & sampling.EDITS or masked:
        edited, edited_stride = edit(logits, slots, lengths, state, uses, mask)
    peaks, masses = scratch(2, rows, groups)
    limits = scratch(rows, 2) if uses & sampling.PROCESSED else None
    sizes = logits.stride(0), edited_stride, vocab_size
    _groups_kernel[(rows, triton.cdiv(groups, GROUPS_TILE))](
        logits, edited, columns, slots, peaks, masses, *sizes, groups, masked, GROUPS_TILE, **options(8)
    )
    width = triton.next_power_of_2(groups)
    _pick_kernel[(rows,)](
        logits, edited, columns, slots, lengths, peaks, masses, tokens, limits, *sizes, groups, masked, width,
        **options(warps(width, 4)),
    )  # fmt: skip
    if uses & sampling.RESTRICT:
        restrict(logits, edited, columns, slots, lengths, peaks, masses, tokens, limits, edited_stride, masked)
    if limits is None:
        return Drawn(tokens, logits)
    shown = scratch(rows, edited_stride or -(-vocab_size // 16) * 16) if edited is None else edited
    _show_kernel[(rows, triton.cdiv(vocab_size, SHOW_BLOCK))](
        logits, edited, shown, columns, slots, limits, logits.stride(0), edited_stride, shown.stride(0), vocab_size,
        masked, SHOW_BLOCK, **options(4),
    )  # fmt: skip
    return Drawn(tokens, shown[:, :vocab_size])
