"""From logits to token ids: the definitions, on the rows of a step that use them.

R rows (one per token to be drawn), V vocabulary, L length of a token history, G = ceil(V / LANES) groups, N slots,
W = ceil(V / 32) words of a bit per token.

`sample` is the whole way as one operation that backends may define again (see `ops.py`): its parameters lie in tensors
by slot, so that a step which changes none uploads nothing. The functions above it are the parts.

Every function works on each row by itself, so a row's token does not depend on what else is in the step. Random
numbers come from a counter (Philox), never from a generator's state: the noise of a draw is a function of (seed,
choice, position of the token in the answer, group or lane of the token id) and of nothing else.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# torch types some of the functions used here only in part, and Tensor.tolist not at all.

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from .ops import op

LANES = 128  # consecutive token ids that form a group
GREEDY_BELOW = 1e-5  # temperatures under this are greedy: dividing by them leaves one token anyway
HEAD = 256  # candidates that top-p looks at before it sorts a whole row
DRAW_ELEMENTS = 1 << 18  # logits that `draw` works on at a time, 1 MiB: they stay in the processor's cache

# What a slot uses, one bit each.
DRAW, RESTRICT, PENALTY, BIAS, ALLOWED, BANS, FLOOR, LOGPROBS, PROCESSED, POLICY = (1 << bit for bit in range(10))
RULES = BIAS | ALLOWED | BANS | FLOOR
EDITS = PENALTY | RULES

# The columns of `Slots.columns`. A seed's low word comes before its high one. `*_AT` are places in `Slots.lists`.
USES, TEMPERATURE, TOP_K, TOP_P, MIN_P, LOG_MIN_P, REPETITION, PRESENCE, FREQUENCY = range(9)
SEED, SEED_HIGH, CHOICE, PROMPT, MIN_TOKENS, BIAS_AT, BIASES, BANS_AT, BANNED, ALLOWED_AT, FACTOR = range(9, 20)
COLUMNS = 20

Words = NDArray[np.uint64]  # 32-bit words, wide enough for a product of two

_LOW = np.uint64(0xFFFFFFFF)
_HIGH = np.uint64(32)
_MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], np.uint64)
_KEY_STEPS = np.array([0x9E3779B9, 0xBB67AE85], np.uint64)  # golden ratio, sqrt(3) - 1
_ROUNDS = 10


def philox(counter: Words, seeds: Words) -> Words:
    """Philox-4x32-10: `counter` [4, R, C] 32-bit words, `seeds` [R] 64-bit keys -> [R, C, 4] 32-bit words.

    Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3 (SC 2011). A round multiplies words 0 and 2,
    and crosses over: (c0, c1, c2, c3) -> (hi(M1 c2) ^ c1 ^ k0, lo(M1 c2), hi(M0 c0) ^ c3 ^ k1, lo(M0 c0)).
    """
    key = np.stack((seeds & _LOW, seeds >> _HIGH))  # [2, R]
    keys = (key + np.arange(_ROUNDS, dtype=np.uint64)[:, None, None] * _KEY_STEPS[:, None]) & _LOW
    even, odd = counter[0::2], counter[3::-2]  # words (0, 2) and words (3, 1)
    multipliers = _MULTIPLIERS[:, None, None]
    for round_key in keys[:, ::-1, :, None]:  # k1 meets the product of word 0
        product = even * multipliers
        high = product >> _HIGH
        high ^= odd
        high ^= round_key
        product &= _LOW
        even, odd = high[::-1], product
    return np.stack((even[0], odd[1], even[1], odd[0]), axis=-1)


def draws(seeds: Words, choices: Words, positions: Words, vocab_size: int) -> Tensor:
    """Exponential noise for one draw per row: [R, G + LANES] float32, mean 1, in (1.1e-10, 16.7).

    Word w of the row is word w % 4 of Philox with key `seed` and counter (w // 4, position, choice, 0). Its 32 bits,
    rounded to a float32 x, become v = min(x / 2**32 + 2**-33, 1 - 2**-24), and the noise is -log(1 - v). All 32 count
    where noise is small, which is where draws are won; 24 would never draw a token of probability under 6e-8.
    """
    rows = len(seeds)
    width = groups(vocab_size) + LANES
    counter = np.zeros((4, rows, -(-width // 4)), np.uint64)
    counter[0] = np.arange(counter.shape[2], dtype=np.uint64)
    counter[1] = positions[:, None]
    counter[2] = choices[:, None]
    words = philox(counter, seeds).reshape(rows, -1)[:, :width]
    v = torch.from_numpy(words.astype(np.float32))
    return v.mul_(2.0**-32).add_(2.0**-33).clamp_(max=1 - 2.0**-24).neg_().log1p_().neg_()


def groups(vocab_size: int) -> int:
    return -(-vocab_size // LANES)


def gumbel_max(scaled: Tensor, noise: Tensor, lowest: Tensor | None = None) -> Tensor:
    """One token per row with probability softmax(scaled): [R, V] with row maximum 0, noise [R, G + LANES] -> ids [R].

    `lowest` [R]: tokens whose value is below it are left out.

    argmax(x + Gumbel) = argmax(exp(x) / Exponential). The maximum over a group of tokens is distributed as that of one
    token with the group's summed weight, and which token of the group attains it is independent of the maximum. So a
    group is drawn first, with one noise value per group, then the token inside it, with one per lane: the same
    distribution as with one value per token, for G + LANES values instead of V. Ties: the lowest id.
    """
    rows, vocab_size = scaled.shape
    count = groups(vocab_size)
    weights = scaled.exp()
    if lowest is not None:
        weights = weights.where(scaled >= lowest[:, None], 0)
    if vocab_size % LANES:
        weights = F.pad(weights, (0, count * LANES - vocab_size))
    weights = weights.view(rows, count, LANES)
    group = (weights.sum(-1) / noise[:, :count]).argmax(-1)
    inside = weights[torch.arange(rows, device=scaled.device), group]
    return group * LANES + (inside / noise[:, count:]).argmax(-1)


@op
def greedy(logits: Tensor) -> Tensor:
    """The most likely token of each row [R, V] of any float dtype, the lowest id among equals; -1 where the maximum is
    not finite or a logit is NaN."""
    on_cpu = logits.device.type == "cpu"  # numpy's argmax is vectorised, torch's is not
    ids = torch.from_numpy(logits.float().numpy().argmax(-1)) if on_cpu else logits.argmax(-1)
    return ids.masked_fill_(~logits.gather(1, ids[:, None])[:, 0].isfinite(), -1)


def factor(temperature: float) -> float:
    """What logits are multiplied by for log-probabilities at a temperature: 1 where tokens would be drawn greedily."""
    return 1.0 if temperature < GREEDY_BELOW else float(np.float32(1) / np.float32(temperature))


def scale(logits: Tensor, temperature: Tensor) -> Tensor:
    """logits [R, V] become (logits - row maximum) / temperature, in place; temperatures [R] above 0.

    Returns whether each row's maximum is finite, [R].
    """
    best = logits.amax(-1, keepdim=True)
    logits.sub_(best).div_(temperature[:, None])
    return best[:, 0].isfinite()


def thresholds(scaled: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """The lowest value that top-k, then top-p, then min-p keep, [R]; scaled [R, V] has row maximum 0, the three [R].

    So tokens of equal probability stay or go together. top-k keeps those at least as likely as the k-th (0: off), top-p
    those at least as likely as the one at which the mass, summed from the most likely on, reaches p of what top-k left
    (1: off), min-p those at least min_p times the most likely (0: off).
    """
    vocab_size = scaled.shape[1]
    lowest = min_p.log()  # log 0 = -inf
    limited = (top_k > 0) & (top_k < vocab_size)
    nucleus = (top_p < 1).nonzero()[:, 0]
    width = max(int(top_k.where(limited, 0).max()), HEAD if len(nucleus) else 0)
    if width == 0:
        return lowest
    top = _largest(scaled, min(width, vocab_size))
    kth = top.gather(1, (top_k - 1).clamp(0, top.shape[1] - 1)[:, None])[:, 0].masked_fill_(~limited, -torch.inf)
    lowest = torch.maximum(lowest, kth)
    if len(nucleus) == len(scaled):
        return torch.maximum(lowest, _nucleus(scaled, top, kth, top_p))
    if len(nucleus):
        cut = _nucleus(scaled[nucleus], top[nucleus], kth[nucleus], top_p[nucleus])
        lowest[nucleus] = torch.maximum(lowest[nucleus], cut)
    return lowest


def _nucleus(scaled: Tensor, top: Tensor, kth: Tensor, top_p: Tensor) -> Tensor:
    """The lowest value that top-p keeps of the values from kth [R] on. `top` holds the largest, in descending order;
    whole rows are sorted only where the mass is not in those."""

    def weights(values: Tensor) -> Tensor:
        return values.exp().where(values >= kth[:, None], 0)

    wanted = top_p * weights(scaled).sum(-1, dtype=torch.float64).float()  # how a sum is split must not show
    index = (weights(top).cumsum(-1) < wanted[:, None]).sum(-1)  # of the token at which the mass is reached
    width = top.shape[1]
    cut = top.gather(1, index.clamp(max=width - 1)[:, None])[:, 0]
    spread = (index == width).nonzero()[:, 0]
    if len(spread) and width < scaled.shape[1]:
        kth = kth[spread]
        ordered = _largest(scaled[spread], scaled.shape[1])
        index = (weights(ordered).cumsum(-1) < wanted[spread, None]).sum(-1)
        cut[spread] = ordered.gather(1, index.clamp(max=ordered.shape[1] - 1)[:, None])[:, 0]
    return cut


def _largest(values: Tensor, count: int) -> Tensor:
    """The `count` largest of each row [R, V], in descending order: [R, count]."""
    if values.device.type != "cpu":
        return values.topk(count, dim=-1).values
    rest = values.shape[1] - count  # numpy's sorts are vectorised: 0.15 ms for 32,000 where torch takes 2.4
    found = values.numpy() if rest == 0 else np.partition(values.numpy(), rest, axis=-1)[:, rest:]
    return torch.from_numpy(np.sort(found, axis=-1)).flip(-1)


def penalise(
    logits: Tensor,
    ids: Tensor,
    lengths: Tensor,
    prompts: Tensor,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
) -> None:
    """Changes logits [R, V] in place by the tokens that came before: ids [R, L], of which row r uses `lengths[r]`.

    First Hugging Face's repetition penalty (CTRL, Keskar et al. 2019) on every token of the history: l / penalty where
    l > 0, else l * penalty. Then OpenAI's on the generated ones, those from `prompts[r]` on: l - presence - count *
    frequency. Touches the L tokens of the history only; memory: one int32 [R, V] for the counts.
    """
    place = torch.arange(ids.shape[1], device=ids.device)
    past = place < lengths[:, None]
    ids = torch.where(past, ids, ids[:, :1])
    value = logits.gather(1, ids)
    factor = repetition[:, None]
    value = torch.where(value > 0, value / factor, value * factor)
    if presence.any() or frequency.any():
        generated = (past & (place >= prompts[:, None])).int()
        counts = torch.zeros_like(logits, dtype=torch.int32).scatter_add_(1, ids, generated)
        count = counts.gather(1, ids).float()
        value -= presence[:, None] * (count > 0)
        value -= frequency[:, None] * count
    logits.scatter_(1, ids, value)  # equal ids carry equal values


class Draws(NamedTuple):
    """How each row is drawn, [R] each. Temperatures under GREEDY_BELOW take the most likely token."""

    temperature: Tensor  # float32
    seeds: Tensor  # int64, the bits of 64 without a sign
    choices: Tensor  # int64
    positions: Tensor  # int64, of the token in its answer
    top_k: Tensor  # int64; this and what follows as in `thresholds`
    top_p: Tensor  # float32
    min_p: Tensor  # float32


@op
def draw(logits: Tensor, how: Draws) -> tuple[Tensor, Tensor]:
    """One token per row: logits [R, V] in any float dtype, which stay as they are.

    Gives tokens [R] int64, -1 where a row's maximum is not finite or a logit is NaN, and the lowest `scale`d value [R]
    that the filters keep: -inf where there are none and in rows that are not drawn.
    """
    size = max(1, DRAW_ELEMENTS // logits.shape[1])
    columns = zip(*(column.split(size) for column in how), strict=True)
    parts = [_draw(rows, Draws(*part)) for rows, part in zip(logits.split(size), columns, strict=True)]
    tokens, lowest = zip(*parts, strict=True)
    return torch.cat(tokens), torch.cat(lowest)


def _draw(logits: Tensor, how: Draws) -> tuple[Tensor, Tensor]:
    drawn = how.temperature >= GREEDY_BELOW
    scaled = logits.to(torch.float32, copy=True)
    finite = scale(scaled, how.temperature.where(drawn, 1))
    seeds, choices, positions = (_unsigned(column) for column in (how.seeds, how.choices, how.positions))
    noise = draws(seeds, choices, positions, scaled.shape[1]).to(scaled.device)
    filters = how.top_k, how.top_p, how.min_p
    limited = (how.top_k > 0) & (how.top_k < scaled.shape[1]) | (how.top_p < 1) | (how.min_p > 0)
    rows = (limited & drawn & finite).nonzero()[:, 0]
    lowest = scaled.new_full((len(scaled),), -torch.inf)
    if len(rows):
        lowest[rows] = thresholds(scaled[rows], *(column[rows] for column in filters))
    tokens = gumbel_max(scaled, noise, lowest)
    if not drawn.all():
        tokens = tokens.where(drawn, greedy(scaled))
    return tokens.masked_fill_(~finite, -1), lowest


def _unsigned(column: Tensor) -> Words:
    return column.cpu().numpy().view(np.uint64)


def distribution(logits: Tensor, temperature: Tensor, lowest: Tensor) -> Tensor:
    """float32 logits [R, V] of what `draw` drew from and gave `lowest` [R] for; rows not drawn stay as they are."""
    drawn = (temperature >= GREEDY_BELOW)[:, None]
    scaled = logits.to(torch.float32, copy=True)
    scale(scaled, temperature.where(drawn[:, 0], 1))
    return scaled.masked_fill_(scaled < lowest[:, None], -torch.inf).where(drawn, logits)


class Slots(NamedTuple):
    """By what the rows of a step draw. A slot's `lists` hold, each where a column says and only if `USES` says so:

    * biases: the token ids, ascending and distinct, then as many float32 values
    * bans: the token ids, as many prefix lengths, as many places (from BANS_AT on) of the prefixes, then these. A token
      is banned behind its prefix, so always where that is empty; length -1: in the first MIN_TOKENS of the answer
    * allowed ids: W words
    """

    columns: Tensor  # [N, COLUMNS] int32, float32 as their bits
    lists: Tensor  # int32, any length
    history: Tensor  # [N, context] int32, prompt first


class Drawn(NamedTuple):
    tokens: Tensor  # [R] int64
    shown: Tensor  # [R, V]


def workspace(rows: int, vocab_size: int) -> int:
    """Bytes that `sample` takes on a CUDA device, beside its arguments, for a step in which every feature is used.

    Two float32 and one int32 per group, 8 KiB for a restricted row; V float32 only for EDITS, a mask or PROCESSED.
    """
    return rows * (12 * groups(vocab_size) + (8 << 10) + 4 * (-(-vocab_size // 16) * 16) + 16)


@op
def sample(
    logits: Tensor, slots: Tensor, lengths: Tensor, state: Slots, uses: int, mask: Tensor | None = None
) -> Drawn:
    """Draws one token per row: logits [R, V] in any float dtype, which stay as they are, slots and lengths [R] int64.

    `lengths` counts the tokens of a row's history. `uses` has at least the bits that the rows' slots have. `mask`
    [R, W] int32: token t may be drawn where bit t % 32 of word t // 32 is set.

    Order: bias -> mask, allowed ids, bans -> repetition -> presence and frequency -> temperature -> top-k -> top-p ->
    min-p. A token is -1 where the row has no finite maximum: the model gave NaN or infinity, or nothing is left.
    `shown` are the logits whose log-softmax belongs to the tokens: `logits` itself or, where `uses` has PROCESSED, a
    float32 copy of them whose rows of that bit are replaced by those of the distributions that were drawn from.
    """
    columns = state.columns[slots]
    numbers, own = columns.view(torch.float32), columns[:, USES]
    values, shown = logits.float(), logits
    if uses & EDITS or mask is not None:
        values = values.clone() if values is logits else values
        _edit(values, columns, numbers, slots, lengths, state, mask)
    if uses & PROCESSED:
        shown = logits.to(torch.float32, copy=True)
    tokens, lowest = draw(values, _how(columns, numbers, lengths))
    processed = (own & PROCESSED).nonzero()[:, 0]
    if len(processed):
        shown[processed] = distribution(values[processed], numbers[processed, TEMPERATURE], lowest[processed])
    return Drawn(tokens, shown)


def _how(columns: Tensor, numbers: Tensor, lengths: Tensor) -> Draws:
    own = columns[:, USES]
    low, high = (columns[:, column].long() for column in (SEED, SEED_HIGH))
    limited = own & RESTRICT != 0
    return Draws(
        numbers[:, TEMPERATURE].where(own & DRAW != 0, 0),
        (low & 0xFFFFFFFF) | high << 32,
        columns[:, CHOICE].long(),
        lengths - columns[:, PROMPT],
        columns[:, TOP_K].long().where(limited, 0),
        numbers[:, TOP_P].where(limited, 1),
        numbers[:, MIN_P].where(limited, 0),
    )


def _edit(
    values: Tensor,
    columns: Tensor,
    numbers: Tensor,
    slots: Tensor,
    lengths: Tensor,
    state: Slots,
    mask: Tensor | None,
) -> None:
    """Everything before the temperature, on values [R, V] in place."""
    vocab_size = values.shape[1]
    for row in (columns[:, USES] & RULES).nonzero()[:, 0].tolist():
        column, length = columns[row].tolist(), int(lengths[row])
        if column[USES] & BIAS:
            at, count = column[BIAS_AT], column[BIASES]
            ids, bias = state.lists[at : at + 2 * count].view(2, count)
            values[row, ids.long()] += bias.view(torch.float32)
        if column[USES] & ALLOWED:
            at = column[ALLOWED_AT]
            values[row].masked_fill_(~bits(state.lists[at : at + -(-vocab_size // 32)], vocab_size), -torch.inf)
        if column[USES] & (BANS | FLOOR):
            early = length - column[PROMPT] < column[MIN_TOKENS]
            bans = state.lists[column[BANS_AT] :]
            values[row, _banned(bans, column[BANNED], state.history[slots[row], :length], early)] = -torch.inf
    if mask is not None:
        values.masked_fill_(~bits(mask, vocab_size), -torch.inf)
    rows = (columns[:, USES] & PENALTY).nonzero()[:, 0]
    if len(rows):
        length = lengths[rows]
        ids = state.history[slots[rows], : int(length.max())].long()
        part = values[rows]
        penalties = (numbers[rows, column] for column in (REPETITION, PRESENCE, FREQUENCY))
        penalise(part, ids, length, columns[rows, PROMPT], *penalties)
        values[rows] = part


def _banned(bans: Tensor, count: int, history: Tensor, early: bool) -> list[int]:
    """The tokens that one slot's bans forbid behind its history [L]."""
    found: list[int] = []
    past = history.tolist()
    for token, prefix, at in bans[: 3 * count].view(3, count).T.tolist():
        if (
            early
            if prefix < 0
            else prefix <= len(past) and past[len(past) - prefix :] == bans[at : at + prefix].tolist()
        ):
            found.append(token)
    return found


def bits(words: Tensor, vocab_size: int) -> Tensor:
    """[..., W] int32 -> [..., V] bool, the lowest bit of a word first."""
    place = torch.arange(32, dtype=torch.int32, device=words.device)
    return (words.unsqueeze(-1) >> place & 1).flatten(-2)[..., :vocab_size].bool()
