"""top-k, top-p and min-p without sorting: the lowest value that a row keeps, and the draw from what it keeps.

A value is s = (x - max) / T <= 0 in float32; the bits of -s are its key, an integer that ascends as s descends. A limit
is the least key K for which F(K), the number (top-k) or the mass (top-p) of the tokens with key <= K, reaches a target:
an exact value, so equals stay or go together, and no order among the tokens is needed to find it.

1. A bound that the limit certainly does not pass, from the groups' maxima and sums: top-k cannot pass the k-th largest
   maximum, top-p not a value at which even the least mass that the groups can have above it suffices. Only groups whose
   maximum reaches the bound are looked at from here on; they are listed in ascending order.
2. `_limit`: sweeps over the listed groups count tokens and mass at PIVOTS values between which the limit lies, until at
   most GATHERED tokens are left; these are gathered, in order, and the limit is found among them by bisection.
3. One more sweep draws: a group by the sum of what it keeps, then a token of it.

One program per row; those of rows that restrict nothing end at once. Reads V / 16 bytes of groups per row and, in each
sweep, 128 values of every listed group: at top-k = 50 about 50 of them, in four sweeps of 13 KB. Sums go over groups in
ascending order, tile by tile: they do not depend on the step's other rows.

Letters: R rows, V vocabulary, G groups of LANES = 128.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import sampling
from .launch import options
from .sampling_row import LANES, exponential, integer, number, values_of

USES, TEMPERATURE = tl.constexpr(sampling.USES), tl.constexpr(sampling.TEMPERATURE)
PROMPT = tl.constexpr(sampling.PROMPT)
TOP_K, TOP_P = tl.constexpr(sampling.TOP_K), tl.constexpr(sampling.TOP_P)
LOG_MIN_P = tl.constexpr(sampling.LOG_MIN_P)
RESTRICT, EDITS = tl.constexpr(sampling.RESTRICT), tl.constexpr(sampling.EDITS)

IMPOSSIBLE = tl.constexpr(0x7F800000)  # the key of a token that cannot be drawn, s = -inf
NO_TOKEN = tl.constexpr(0x7FFFFFFF)
BOUND_STEPS, BOUND_DEPTH = tl.constexpr(12), tl.constexpr(64.0)  # a bound of top-p is sought in [-64, 0], to 1/64
BOUND_MARGIN = tl.constexpr(1.0001)  # on the mass, for sums in another order

TILE = 8  # groups of a sweep's step
PIVOTS = 4
GATHERED = 2048


@triton.jit
def _key(scaled):
    """Keys of values <= 0; NO_TOKEN for -inf."""
    return tl.where(scaled == -float("inf"), NO_TOKEN, tl.abs(scaled).to(tl.int32, bitcast=True))


@triton.jit
def _depth(key):
    return key.to(tl.float32, bitcast=True)


@triton.jit
def _least(keys, weights, target, low, high, below):
    """The least key in (low, high] for which `below` and the weights of the keys up to it reach `target`; else high."""
    while high - low > 1:
        middle = low + (high - low) // 2
        reached = below + tl.sum(tl.where(keys <= middle, weights, 0.0), 0) >= target
        low, high = tl.where(reached, low, middle), tl.where(reached, middle, high)
    return high


@triton.jit
def _certain_depth(depths, tops, weights, wanted):
    """How deep, in steps of 1/64, the tokens of all groups hold the mass `wanted` wherever they lie in their groups.

    Of a group with `weights` in all and `tops` in its best token, at most LANES - 1 tokens lie deeper than d, each with
    less than exp(-d). Infinite where 64 do not suffice.
    """
    low = wanted * 0
    high = low + BOUND_DEPTH
    for _ in range(BOUND_STEPS):
        middle = (low + high) / 2
        certain = tl.maximum(tops, weights - (LANES - 1) * tl.exp(-middle))
        enough = tl.sum(tl.where(depths <= middle, certain, 0.0), 0) >= wanted
        low, high = tl.where(enough, low, middle), tl.where(enough, middle, high)
    return tl.where(high == BOUND_DEPTH, float("inf"), high)


@triton.jit
def _listed_values(row, start, TILE: tl.constexpr):
    """Groups start .. start + TILE of those listed: their numbers [TILE], their tokens' s [TILE, LANES]."""
    logits, edited, changed, vocab_size, best, temperature, listed, many = row
    place = start + tl.arange(0, TILE)
    group = tl.load(listed + place, mask=place < many, other=0)
    token = group[:, None] * LANES + tl.arange(0, LANES)[None, :]
    inside = (place < many)[:, None] & (token < vocab_size)
    value = values_of(logits, edited, token, inside, changed)
    return group, tl.div_rn(value - best, tl.zeros_like(value) + temperature)


@triton.jit
def _weights(keys, by_mass):
    return tl.where(by_mass, tl.exp(-_depth(keys)), 1.0)


@triton.jit
def _kept(row, limit, TILE: tl.constexpr):
    """The mass and the number of the tokens up to the key `limit`."""
    many = row[7]
    mass, number, start = row[4] * 0, many * 0, many * 0
    while start < many:
        _, scaled = _listed_values(row, start, TILE)
        kept = _key(scaled) <= limit
        mass += tl.sum(tl.sum(tl.where(kept, tl.exp(scaled), 0.0), 1), 0)
        number += tl.sum(tl.sum(kept.to(tl.int32), 1), 0)
        start += TILE
    return mass, number


@triton.jit
def _limit(
    row, target, by_mass, high, tokens, gathered, TILE: tl.constexpr, PIVOTS: tl.constexpr, GATHERED: tl.constexpr
):
    """The least key up to `high` at which the number or the mass reaches `target`; `tokens`: how many there may be."""
    many = row[7]
    low = high * 0 - 1
    below = target * 0
    while high - low > 1:
        start = many * 0
        if tokens > GATHERED:
            first = _depth(tl.maximum(low, 0))
            last = tl.where(high == IMPOSSIBLE, tl.maximum(32.0, 16 * first), _depth(high))
            index = tl.arange(0, PIVOTS)
            pivot = (first + (last - first) * ((index + 1) / PIVOTS)).to(tl.int32, bitcast=True)
            pivot = tl.minimum(tl.maximum(pivot, low + 1), high - 1)
            pivot = tl.where(index == PIVOTS - 1, high, pivot)
            sums = tl.zeros((PIVOTS,), tl.float32)
            counts = tl.zeros((PIVOTS,), tl.int32)
            while start < many:
                _, scaled = _listed_values(row, start, TILE)
                keys = tl.reshape(_key(scaled), (1, TILE * LANES))
                counted = (keys > low) & (keys <= pivot[:, None])
                sums += tl.sum(tl.where(counted, _weights(keys, by_mass), 0.0), 1)
                counts += tl.sum(counted.to(tl.int32), 1)
                start += TILE
            reached = below + sums >= target
            tokens = tl.min(tl.where(reached, counts, NO_TOKEN), 0) - tl.max(tl.where(reached, 0, counts), 0)
            below = below + tl.max(tl.where(reached, 0.0, sums), 0)
            low = tl.max(tl.where(reached, low, pivot), 0)
            high = tl.min(tl.where(reached, pivot, high), 0)
        else:
            tl.debug_barrier()  # the keys gathered for an earlier limit have been read by all
            tokens = many * 0
            while start < many:
                _, scaled = _listed_values(row, start, TILE)
                keys = tl.reshape(_key(scaled), (TILE * LANES,))
                counted = ((keys > low) & (keys <= high)).to(tl.int32)
                place = tokens + tl.cumsum(counted, 0) - 1
                tl.store(gathered + place, keys, mask=(counted != 0) & (place < GATHERED))
                tokens += tl.sum(counted, 0)
                start += TILE
            tl.debug_barrier()
            if tokens <= GATHERED:
                place = tl.arange(0, GATHERED)
                keys = tl.load(gathered + place, mask=place < tokens, other=NO_TOKEN)
                high = _least(keys, _weights(keys, by_mass), target, low, high, below)
                low = high - 1
    return high


@triton.jit
def _pick(row, lowest, columns, slot, position, groups, TILE: tl.constexpr):
    """A token of those with s >= lowest: its group, by the sum of what the group keeps, then the token of it."""
    logits, edited, changed, vocab_size, best, temperature, _, many = row
    score, chosen, start = best * 0 - 1, many * 0, many * 0
    while start < many:
        group, scaled = _listed_values(row, start, TILE)
        mass = tl.sum(tl.where(scaled >= lowest, tl.exp(scaled), 0.0), 1)
        scores = mass / exponential(group, columns, slot, position)
        scores = tl.where(start + tl.arange(0, TILE) < many, scores, -1.0)
        highest = tl.max(scores, 0)
        first = tl.min(tl.where(scores == highest, group, groups), 0)
        chosen = tl.where(highest > score, first, chosen)
        score = tl.maximum(score, highest)
        start += TILE
    lane = tl.arange(0, LANES)
    token = chosen * LANES + lane
    value = values_of(logits, edited, token, token < vocab_size, changed)
    depth = tl.div_rn(value - best, tl.zeros_like(value) + temperature)
    mass = tl.where(depth >= lowest, tl.exp(depth), 0.0)
    return chosen * LANES + tl.argmax(mass / exponential(groups + lane, columns, slot, position), 0)


@triton.jit(do_not_specialize=["groups"])
def _restrict_kernel(
    logits,
    edited,
    columns,
    slots,
    lengths,
    peaks,
    masses,
    tokens,
    limits,
    listed,
    gathered,
    stride,
    edited_stride,
    vocab_size,
    groups,
    MASKED: tl.constexpr,
    GROUPS: tl.constexpr,
    TILE: tl.constexpr,
    PIVOTS: tl.constexpr,
    GATHERED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    uses = integer(columns, slot, USES)
    if uses & RESTRICT:
        temperature = number(columns, slot, TEMPERATURE)
        top_k, top_p = integer(columns, slot, TOP_K), number(columns, slot, TOP_P)
        log_min_p = number(columns, slot, LOG_MIN_P)
        limited = (top_k > 0) & (top_k < vocab_size)
        logits += row * stride
        if edited is not None:
            edited += row * edited_stride
        listed += row * groups
        gathered += row * GATHERED

        group = tl.arange(0, GROUPS)
        place, existing = row * groups + group, group < groups
        peak = tl.load(peaks + place, mask=existing, other=-float("inf"))
        best = tl.max(peak, 0)  # if that is infinite, all s are NaN, no group is listed and no loop is entered
        scaled = tl.div_rn(peak - best, tl.zeros_like(peak) + temperature)
        key, tops = _key(scaled), tl.exp(scaled)
        weights = tl.load(masses + place, mask=existing, other=0.0) * tops
        total = tl.sum(weights, 0)
        nothing = top_k * 0
        if limited:
            bound = _least(key, 1.0, top_k.to(tl.float32), nothing - 1, nothing + IMPOSSIBLE, best * 0)
        elif top_p < 1:
            bound = _certain_depth(-scaled, tops, weights, top_p * total * BOUND_MARGIN).to(tl.int32, bitcast=True)
        else:
            bound = tl.abs(log_min_p).to(tl.int32, bitcast=True)
        wanted = (key <= bound).to(tl.int32)
        many = tl.sum(wanted, 0)
        tl.store(listed + tl.cumsum(wanted, 0) - 1, group, mask=wanted != 0)
        tl.debug_barrier()

        shared = logits, edited, (uses & EDITS) | MASKED, vocab_size, best, temperature, listed, many
        limit = nothing + IMPOSSIBLE
        target, tokens_left = top_k.to(tl.float32), top_k
        for by_mass in range(2):  # top-k by number, then top-p by mass; a loop, so that `_limit` is compiled once
            if by_mass == 1:
                few = many * LANES
                if limited:
                    total, few = _kept(shared, limit, TILE)
                target, tokens_left = top_p * total, few
            if tl.where(by_mass == 1, top_p < 1, limited):
                high = tl.minimum(limit, bound)
                limit = _limit(shared, target, by_mass == 1, high, tokens_left, gathered, TILE, PIVOTS, GATHERED)
        lowest = tl.maximum(-_depth(limit), log_min_p)
        position = (tl.load(lengths + row) - integer(columns, slot, PROMPT)).to(tl.int32)
        token = _pick(shared, lowest, columns, slot, position, groups, TILE)
        tl.store(tokens + row, tl.where(tl.abs(best) == float("inf"), -1, token).to(tl.int64))
        if limits is not None:
            tl.store(limits + 2 * row, best)
            tl.store(limits + 2 * row + 1, lowest)


def restrict(
    logits: Tensor,
    edited: Tensor | None,
    columns: Tensor,
    slots: Tensor,
    lengths: Tensor,
    peaks: Tensor,
    masses: Tensor,
    tokens: Tensor,
    limits: Tensor | None,
    edited_stride: int,
    masked: int,
) -> None:
    """Fills in `tokens` and `limits` (maximum, lowest value kept) of the rows that restrict; peaks, masses [R, G]."""
    rows, vocab_size = logits.shape
    groups = peaks.shape[1]
    listed, gathered = (
        torch.empty((rows, width), dtype=torch.int32, device=logits.device) for width in (groups, GATHERED)
    )
    _restrict_kernel[(rows,)](
        logits, edited, columns, slots, lengths, peaks, masses, tokens, limits, listed, gathered,
        logits.stride(0), edited_stride, vocab_size, groups,
        masked, triton.next_power_of_2(groups), TILE, PIVOTS, GATHERED, **options(8),
    )  # fmt: skip
