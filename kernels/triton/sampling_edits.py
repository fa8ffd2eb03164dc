"""Logits as bias, masks, bans and penalties leave them, in float32: the rows of slots that use any.

Up to three launches, each over all rows; the programs of rows that do not use it end after one load.

1. `_count_kernel` (penalties): into the row of the result, as int32, goes how often each token was generated, and a bit
   for those of the prompt. The history is read, 4 L bytes; the row was set to zero, 4 V.
2. `_edit_kernel`: x = logit + bias, -inf where a mask forbids it, penalties by the count in its place. Reads 2 V or 4 V
   bytes, V / 8 per mask and 4 V of counts; writes 4 V. A token's bias is looked up by bisection in the slot's list.
3. `_ban_kernel`: -inf for banned tokens, one lane per ban; the prefixes of bad words are compared with the history.

Letters: R rows, V vocabulary, W = ceil(V / 32), L length of a row's history.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import sampling
from ..sampling import Slots
from .launch import options
from .sampling_row import integer, number

USES = tl.constexpr(sampling.USES)
REPETITION = tl.constexpr(sampling.REPETITION)
PRESENCE, FREQUENCY = tl.constexpr(sampling.PRESENCE), tl.constexpr(sampling.FREQUENCY)
PROMPT, MIN_TOKENS = tl.constexpr(sampling.PROMPT), tl.constexpr(sampling.MIN_TOKENS)
BIAS_AT, BIASES = tl.constexpr(sampling.BIAS_AT), tl.constexpr(sampling.BIASES)
BANS_AT, BANNED = tl.constexpr(sampling.BANS_AT), tl.constexpr(sampling.BANNED)
ALLOWED_AT = tl.constexpr(sampling.ALLOWED_AT)
PENALTY, BIAS, ALLOWED = tl.constexpr(sampling.PENALTY), tl.constexpr(sampling.BIAS), tl.constexpr(sampling.ALLOWED)
BANNING, EDITS = tl.constexpr(sampling.BANS | sampling.FLOOR), tl.constexpr(sampling.EDITS)
IN_PROMPT = tl.constexpr(1 << 30)  # beside the count of a token that was in the prompt

BLOCK = 2048  # tokens of a program of `_edit_kernel`
HISTORY_BLOCK, HISTORY_PROGRAMS = 1024, 8
BAN_BLOCK = 128


@triton.jit
def _count_kernel(
    counts, columns, slots, lengths, history, counts_stride, history_stride, BLOCK: tl.constexpr, PROGRAMS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    if integer(columns, slot, USES) & PENALTY:
        length, prompt = tl.load(lengths + row), integer(columns, slot, PROMPT)
        start = tl.program_id(1).to(tl.int64) * BLOCK
        while start < length:
            place = start + tl.arange(0, BLOCK)
            inside = place < length
            token = tl.load(history + slot * history_stride + place, mask=inside, other=0)
            count = counts + row * counts_stride + token
            tl.atomic_add(count, 1, mask=inside & (place >= prompt), sem="relaxed")
            tl.atomic_or(count, IN_PROMPT, mask=inside & (place < prompt), sem="relaxed")
            start += PROGRAMS * BLOCK


@triton.jit
def _zero_kernel(counts, columns, slots, counts_stride, vocab_size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    if integer(columns, tl.load(slots + row), USES) & PENALTY:
        token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        tl.store(counts + row * counts_stride + token, tl.zeros((BLOCK,), tl.int32), mask=token < vocab_size)


@triton.jit
def _allowed(words, token, inside):
    word = tl.load(words + token // 32, mask=inside, other=0)
    return ((word >> (token % 32)) & 1) != 0


@triton.jit
def _edit_kernel(
    logits, edited, counts, columns, lists, slots, mask, stride, edited_stride, vocab_size, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    uses = integer(columns, slot, USES)
    if (uses & EDITS) != 0 or mask is not None:
        token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = token < vocab_size
        value = tl.load(logits + row * stride + token, mask=inside, other=0.0).to(tl.float32)
        place = row * edited_stride + token
        if uses & BIAS:
            count = integer(columns, slot, BIASES)
            ids = lists + integer(columns, slot, BIAS_AT)
            low = tl.zeros((BLOCK,), tl.int32)  # the first of the ids that is not below the token is in [low, high]
            high = low + count
            left = count
            while left > 0:
                middle = (low + high) // 2
                searching = low < high
                below = tl.load(ids + middle, mask=searching, other=0) < token
                low = tl.where(searching & below, middle + 1, low)
                high = tl.where(searching & (below == 0), middle, high)
                left = left // 2
            found = (low < count) & inside
            found = found & (tl.load(ids + low, mask=found, other=-1) == token)
            value += tl.load(ids + count + low, mask=found, other=0).to(tl.float32, bitcast=True)
        if uses & ALLOWED:
            allowed = _allowed(lists + integer(columns, slot, ALLOWED_AT), token, inside)
            value = tl.where(allowed, value, -float("inf"))
        if mask is not None:
            words = (vocab_size + 31) // 32
            value = tl.where(_allowed(mask + row * words, token, inside), value, -float("inf"))
        if uses & PENALTY:
            seen = tl.load(counts + place, mask=inside, other=0)
            factor = number(columns, slot, REPETITION)
            repeated = tl.where(value > 0, tl.div_rn(value, tl.zeros_like(value) + factor), value * factor)
            value = tl.where(seen != 0, repeated, value)
            count = (seen & (IN_PROMPT - 1)).to(tl.float32)
            value -= number(columns, slot, PRESENCE) * (count > 0).to(tl.float32)
            value -= number(columns, slot, FREQUENCY) * count
        tl.store(edited + place, value, mask=inside)


@triton.jit
def _ban_kernel(edited, columns, lists, slots, lengths, history, edited_stride, history_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    if integer(columns, slot, USES) & BANNING:
        length, count = tl.load(lengths + row), integer(columns, slot, BANNED)
        early = (length - integer(columns, slot, PROMPT) < integer(columns, slot, MIN_TOKENS)).to(tl.int32)
        bans = lists + integer(columns, slot, BANS_AT)
        start = count * 0
        while start < count:
            ban = start + tl.arange(0, BLOCK)
            inside = ban < count
            token = tl.load(bans + ban, mask=inside, other=0)
            prefix = tl.load(bans + count + ban, mask=inside, other=0)
            at = tl.load(bans + 2 * count + ban, mask=inside, other=0)
            banned = inside & (tl.where(prefix < 0, early, (prefix <= length).to(tl.int32)) != 0)
            longest = tl.max(tl.where(banned, prefix, 0), 0)
            step = longest * 0
            while step < longest:
                compared = banned & (step < prefix)
                wanted = tl.load(bans + at + step, mask=compared, other=0)
                place = history + slot * history_stride + length - prefix + step
                banned = banned & (wanted == tl.load(place, mask=compared, other=0))
                step += 1
            tl.store(edited + row * edited_stride + token, tl.full((BLOCK,), -float("inf"), tl.float32), mask=banned)
            start += BLOCK


def edit(
    logits: Tensor, slots: Tensor, lengths: Tensor, state: Slots, uses: int, mask: Tensor | None
) -> tuple[Tensor, int]:
    """(the edited rows of logits [R, V] in a new tensor, in which the other rows hold anything; its stride)."""
    rows, vocab_size = logits.shape
    columns, lists, history = state
    stride = -(-vocab_size // 16) * 16  # so that rows begin at 64-byte boundaries
    edited = torch.empty((rows, stride), dtype=torch.float32, device=logits.device)
    counts = edited.view(torch.int32)
    grid = rows, triton.cdiv(vocab_size, BLOCK)
    if uses & sampling.PENALTY:
        _zero_kernel[grid](counts, columns, slots, stride, vocab_size, BLOCK, **options(4))
        _count_kernel[(rows, HISTORY_PROGRAMS)](
            counts,
            columns,
            slots,
            lengths,
            history,
            stride,
            history.stride(0),
            HISTORY_BLOCK,
            HISTORY_PROGRAMS,
            **options(4),
        )
    if mask is not None:
        assert mask.shape == (rows, -(-vocab_size // 32)) and mask.dtype == torch.int32 and mask.is_contiguous()
    _edit_kernel[grid](
        logits, edited, counts, columns, lists, slots, mask, logits.stride(0), stride, vocab_size, BLOCK, **options(8)
    )
    if uses & (sampling.BANS | sampling.FLOOR):
        _ban_kernel[(rows,)](
            edited, columns, lists, slots, lengths, history, stride, history.stride(0), BAN_BLOCK, **options(4)
        )
    return edited, stride
