"""Sampling parameters by slot on the device, and a draw that the host neither waits for nor looks at.

The parameters of `sampler.py`, laid out as `kernels.sampling.Slots`: a request's are queued when it takes a slot and go
to the device, together with all others since the last step, in one copy. A step that changes none uploads nothing, and
what it draws stays on the device: the tokens can be fed to the next step before the host knows them.

Letters: N slots, R rows of a step, V vocabulary.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# torch types some of the functions used here only in part, and Tensor.tolist not at all.

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...kernels import sampling as ops
from ...kernels.ops import TokenLogprobs, token_logprobs
from .guides import words_of
from .request import Sampling
from .sampler import MOST_PENALTY

Words = NDArray[np.int32]

FIRST_LISTS = 1 << 16  # words of the lists at the start, 256 KiB; they double where slots need more
LEAST_LIST = 64  # words


class Drawn(NamedTuple):
    """Of each row: its token, -1 where none can be drawn; its log-probabilities, if any row of the step wants them.

    Rank and value are 0 in rows whose slots want none.
    """

    tokens: Tensor  # [R] int64
    logprobs: TokenLogprobs | None
    policy: Tensor | None = None  # [R] float32: by logits and temperature alone; None where no row wants that


class DeviceSampler:
    """`history` [N, context] int32 on `device` holds every slot's tokens, prompt first; the runner keeps it up to date.

    Memory on the device: 80 bytes per slot, the lists (the longest: two words per biased token, three per banned one,
    V / 32 for allowed ids, rounded up to a power of two), and while it draws `kernels.sampling.workspace`. The columns
    stay where they are, so a step may be captured in a CUDA graph, unless its `uses` has a bit of `kernels.sampling.
    RULES`: the lists move when they grow.
    """

    def __init__(self, history: Tensor, vocab_size: int, end_ids: tuple[int, ...], device: torch.device | str) -> None:
        slots = len(history)
        self._device = torch.device(device)
        self._vocab_size = vocab_size
        self._end_ids = end_ids
        self._uses = np.zeros(slots, np.int32)
        self._top = np.zeros(slots, np.int64)
        self._state = ops.Slots(
            torch.zeros((slots, ops.COLUMNS), dtype=torch.int32, device=self._device),
            torch.zeros(FIRST_LISTS, dtype=torch.int32, device=self._device),
            history,
        )
        self._columns: dict[int, Words] = {}  # queued, by slot
        self._lists: dict[int, Words] = {}
        self._spans = _Spans(FIRST_LISTS)
        self._masks: dict[int, int] = {}  # by slot with a grammar: where in the lists its allowed ids lie

    def enter(self, slot: int, sampling: Sampling, choice: int, prompt: int) -> None:
        """Slot `slot` now draws for choice `choice` of a request whose prompt has `prompt` tokens; from `flush` on."""
        drawn = sampling.temperature >= ops.GREEDY_BELOW
        filters = 0 < sampling.top_k < self._vocab_size or sampling.top_p < 1 or sampling.min_p > 0
        ends = (*self._end_ids, *sampling.stop_ids) if sampling.min_tokens > 0 else ()
        wanted = sampling.logprobs is not None
        uses = (
            ops.DRAW * drawn
            | ops.RESTRICT * (drawn and filters)
            | ops.PENALTY * sampling.penalises
            | ops.BIAS * bool(sampling.logit_bias)
            | ops.ALLOWED * bool(sampling.allowed_ids or sampling.grammar)
            | ops.BANS * bool(sampling.bad_words)
            | ops.FLOOR * bool(ends)
            | ops.LOGPROBS * wanted
            | ops.PROCESSED * (wanted and sampling.logprobs_mode == "processed")
            | ops.POLICY * (wanted and sampling.policy_logprobs)
        )
        columns = np.zeros(ops.COLUMNS, np.int32)
        floats = columns.view(np.float32)
        floats[ops.TEMPERATURE], floats[ops.FACTOR] = sampling.temperature, ops.factor(sampling.temperature)
        floats[ops.TOP_P] = sampling.top_p
        floats[ops.MIN_P] = sampling.min_p
        floats[ops.LOG_MIN_P] = np.log(np.float32(sampling.min_p)) if sampling.min_p > 0 else -np.inf
        floats[ops.REPETITION] = min(max(sampling.repetition_penalty, 1 / MOST_PENALTY), MOST_PENALTY)
        floats[ops.PRESENCE] = sampling.presence_penalty
        floats[ops.FREQUENCY] = sampling.frequency_penalty
        columns[ops.USES] = uses
        columns[ops.TOP_K] = min(sampling.top_k, self._vocab_size)
        columns[ops.SEED : ops.SEED_HIGH + 1] = np.array([sampling.seed], np.uint64).view(np.int32)
        columns[ops.CHOICE], columns[ops.PROMPT] = choice, prompt
        columns[ops.MIN_TOKENS] = min(sampling.min_tokens, np.iinfo(np.int32).max)
        self._uses[slot], self._top[slot] = uses, sampling.logprobs or 0
        self._spans.free(slot)
        self._lists.pop(slot, None)
        self._masks.pop(slot, None)
        if uses & ops.RULES:
            self._place(slot, columns, sampling, ends)
        self._columns[slot] = columns

    def _place(self, slot: int, columns: Words, sampling: Sampling, ends: tuple[int, ...]) -> None:
        """Queues the slot's lists and writes into its columns where they will lie."""
        some = sampling.allowed_ids or sampling.grammar
        allowed = words_of(sampling.allowed_ids, self._vocab_size) if some else np.zeros(0, np.int32)
        parts = (_biases(sampling), _bans(sampling, ends), allowed)
        at = self._spans.take(slot, sum(map(len, parts)))
        starts = at + np.cumsum([0, *map(len, parts)])
        columns[ops.BIAS_AT], columns[ops.BANS_AT], columns[ops.ALLOWED_AT] = starts[:3]
        columns[ops.BIASES] = len(parts[0]) // 2
        columns[ops.BANNED] = len(ends) + len(sampling.bad_words)
        if sampling.grammar:
            self._masks[slot] = int(starts[2])
        self._lists[slot] = np.concatenate(parts)

    def flush(self) -> None:
        """Hands on what was queued: one copy to the device and one scatter, a second where lists are among it."""
        if not self._columns:
            return
        slots = np.fromiter(self._columns, np.int32)
        words = [slots, *self._columns.values()]
        if self._lists:
            starts = [self._spans.start(slot) for slot in self._lists]
            lists = [*self._lists.values()]
            words += [np.arange(at, at + len(part), dtype=np.int32) for at, part in zip(starts, lists, strict=True)]
            words += lists
            self._grow()
        size = sum(map(len, words))
        staged = torch.empty(size, dtype=torch.int32, pin_memory=self._device.type == "cuda")
        np.concatenate(words, out=staged.numpy())
        # A pinned block is not given to anyone else before the copy out of it is done.
        sent = staged.to(self._device, non_blocking=True)
        rows = len(slots)
        end = rows * (1 + ops.COLUMNS)
        self._state.columns.index_copy_(0, sent[:rows].long(), sent[rows:end].view(rows, ops.COLUMNS))
        if size > end:
            places, values = sent[end:].view(2, -1)
            self._state.lists.index_copy_(0, places.long(), values)
        self._columns.clear()
        self._lists.clear()

    def restrict(self, masks: Mapping[int, Words]) -> None:
        """By slot with a grammar, the ids that its next draw allows: [ceil(V / 32)]. Each draw of such a slot needs it.

        `flush` has been called since the slots were entered. One copy to the device and one scatter.
        """
        rows = [np.array([self._masks[slot] for slot in masks], np.int32), *masks.values()]
        staged = torch.empty(sum(map(len, rows)), dtype=torch.int32, pin_memory=self._device.type == "cuda")
        np.concatenate(rows, out=staged.numpy())
        sent = staged.to(self._device, non_blocking=True)
        words = sent[len(masks) :].view(len(masks), -1)
        places = sent[: len(masks), None] + torch.arange(words.shape[1], device=self._device)
        self._state.lists.index_copy_(0, places.view(-1), words.view(-1))

    def _grow(self) -> None:
        missing = self._spans.size - len(self._state.lists)
        if missing > 0:
            lists = self._state.lists
            self._state = self._state._replace(lists=torch.cat((lists, lists.new_zeros(missing))))

    def uses_of(self, slots: Sequence[int]) -> int:
        """What any of these slots uses: bits of `kernels.sampling`. From the host's copy, `flush`ed or not."""
        return int(np.bitwise_or.reduce(self._uses[slots])) if len(slots) else 0

    def tops_of(self, slots: Sequence[int]) -> list[int | None]:
        """How many of the most likely tokens each slot wants told beside its own; None: no log-probability at all."""
        return [int(self._top[slot]) if self._uses[slot] & ops.LOGPROBS else None for slot in slots]

    def policies_of(self, slots: Iterable[int]) -> list[bool]:
        """Which slots want log-probabilities of the policy told, too."""
        return [bool(self._uses[slot] & ops.POLICY) for slot in slots]

    def sample(
        self, logits: Tensor, slots: Tensor, lengths: Tensor, uses: int, top: int | None, mask: Tensor | None = None
    ) -> Drawn:
        """Draws one token per row: logits [R, V] of any float dtype, unchanged; slots, lengths of history [R] int64.

        `uses` and `top` are at least `uses_of` and the most of `tops_of` the slots: more costs time and changes
        nothing. `mask` [R, ceil(V / 32)] int32: see `kernels.sampling.sample`.
        """
        tokens, shown = ops.sample(logits, slots, lengths, self._state, uses, mask)
        if not uses & ops.LOGPROBS:
            return Drawn(tokens, None)
        own, ids = self._state.columns[slots, ops.USES], tokens.clamp(min=0)
        told = token_logprobs(shown, ids.masked_fill(own & ops.LOGPROBS == 0, -1), top or 0)
        if not uses & ops.POLICY:
            return Drawn(tokens, told)
        factors = self._state.columns.view(torch.float32)[slots, ops.FACTOR]
        policy = token_logprobs(logits, ids.masked_fill(own & ops.POLICY == 0, -1), 0, factors)
        return Drawn(tokens, told, policy.values)


class _Spans:
    """Which words of the lists belong to which slot: spans of 2^n words, of which free ones are taken first."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._end = 0
        self._held: dict[int, tuple[int, int]] = {}  # slot: (start, words)
        self._free: dict[int, list[int]] = {}  # words: starts

    def take(self, slot: int, words: int) -> int:
        words = max(LEAST_LIST, 1 << (words - 1).bit_length())
        free = self._free.get(words)
        if free:
            start = free.pop()
        else:
            start = self._end
            self._end += words
            while self._end > self.size:
                self.size *= 2
        self._held[slot] = start, words
        return start

    def start(self, slot: int) -> int:
        return self._held[slot][0]

    def free(self, slot: int) -> None:
        if slot in self._held:
            start, words = self._held.pop(slot)
            self._free.setdefault(words, []).append(start)


def _biases(sampling: Sampling) -> Words:
    """Ids in ascending order, then the sums of their biases."""
    bias: dict[int, float] = {}
    for token, value in sampling.logit_bias:
        bias[token] = bias.get(token, 0.0) + value
    ids = sorted(bias)
    values = np.array([bias[token] for token in ids], np.float32)
    return np.concatenate((np.array(ids, np.int32), values.view(np.int32)))


def _bans(sampling: Sampling, ends: tuple[int, ...]) -> Words:
    """Tokens, lengths and places of their prefixes, and these; `ends` are banned at the start of the answer only."""
    words = sampling.bad_words
    prefixes = [token for word in words for token in word[:-1]]
    lengths = np.array([len(word) - 1 for word in words] + [-1] * len(ends), np.int32)
    places = 3 * len(lengths) + np.cumsum([0, *np.maximum(lengths, 0)], dtype=np.int32)[:-1]
    tokens = [*(word[-1] for word in words), *ends]
    return np.concatenate((np.array(tokens, np.int32), lengths, places, np.array(prefixes, np.int32))).astype(np.int32)
