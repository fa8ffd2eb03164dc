"""Sampling parameters by slot, and the draw of one step's tokens from its logits.

A request's parameters are written into columns once, when it takes a slot. A step reads the columns of its rows and
pays only for what those rows use: rows that are all greedy and plain cost one argmax. The rest is `kernels.sampling`.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# torch types some of the functions used here only in part, and Tensor.tolist not at all.

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...kernels import sampling as ops
from ...kernels.ops import token_logprobs
from .guides import Words, flags_of
from .request import Logprobs, Sampling

Integers = NDArray[np.int64]
Flags = NDArray[np.uint8]
Columns = list[Logprobs | None]

# What a slot uses, one bit each.
DRAW, RESTRICT, PENALTY, BIAS, ALLOWED, BANS, FLOOR, LOGPROBS = (1 << bit for bit in range(8))
DRAW_ELEMENTS = 1 << 18  # logits that are worked on at a time, 1 MiB
MOST_PENALTY = 1e30  # of repetition, and its inverse the least: beyond them logits would leave float32
EDITS = PENALTY | BIAS | ALLOWED | BANS | FLOOR


@dataclass(slots=True)
class _Lists:
    """Parameters that are lists; only slots that use some have one."""

    bias_ids: Tensor
    bias: Tensor
    allowed: Tensor
    ends: Tensor  # not drawn before min_tokens
    banned: Tensor  # bad words of one token
    phrases: tuple[tuple[int, ...], ...]  # bad words of several


class Sampler:
    """`history` [max_seqs, context] holds every slot's tokens, prompt first; the runner keeps it up to date."""

    def __init__(self, history: NDArray[np.int32], vocab_size: int, end_ids: tuple[int, ...]) -> None:
        slots = len(history)
        self._history = history
        self._vocab_size = vocab_size
        self._end_ids = end_ids
        self._uses = np.zeros(slots, np.uint8)
        self._processed, self._policy = np.zeros((2, slots), np.bool_)
        self._floats = np.zeros((7, slots), np.float32)
        self._temperature, self._top_p, self._min_p, *penalties, self._factor = self._floats
        self._repetition, self._presence, self._frequency = penalties
        self._seed = np.zeros(slots, np.uint64)
        self._choice = np.zeros(slots, np.uint64)
        self._top_k = np.zeros(slots, np.int64)
        self._min_tokens = np.zeros(slots, np.int64)
        self._prompt = np.zeros(slots, np.int64)
        self._top_logprobs = np.zeros(slots, np.int64)
        self._lists: dict[int, _Lists] = {}

    def enter(self, slot: int, sampling: Sampling, choice: int, prompt: int) -> None:
        """Slot `slot` now draws for choice `choice` of a request whose prompt has `prompt` tokens."""
        self._floats[:, slot] = (
            sampling.temperature,
            sampling.top_p,
            sampling.min_p,
            min(max(sampling.repetition_penalty, 1 / MOST_PENALTY), MOST_PENALTY),
            sampling.presence_penalty,
            sampling.frequency_penalty,
            ops.factor(sampling.temperature),
        )
        self._seed[slot], self._choice[slot] = sampling.seed, choice
        self._top_k[slot], self._min_tokens[slot], self._prompt[slot] = sampling.top_k, sampling.min_tokens, prompt
        self._top_logprobs[slot] = sampling.logprobs or 0
        self._processed[slot] = sampling.logprobs_mode == "processed"
        self._policy[slot] = sampling.policy_logprobs
        drawn = sampling.temperature >= ops.GREEDY_BELOW
        filters = 0 < sampling.top_k < self._vocab_size or sampling.top_p < 1 or sampling.min_p > 0
        ends = (*self._end_ids, *sampling.stop_ids) if sampling.min_tokens > 0 else ()
        self._uses[slot] = (
            DRAW * drawn
            | RESTRICT * (drawn and filters)
            | PENALTY * sampling.penalises
            | BIAS * bool(sampling.logit_bias)
            | ALLOWED * bool(sampling.allowed_ids or sampling.grammar)
            | BANS * bool(sampling.bad_words)
            | FLOOR * bool(ends)
            | LOGPROBS * (sampling.logprobs is not None)
        )
        self._lists.pop(slot, None)
        if self._uses[slot] & (BIAS | ALLOWED | BANS | FLOOR):
            bias: dict[int, float] = {}
            for token, value in sampling.logit_bias:
                bias[token] = bias.get(token, 0.0) + value
            self._lists[slot] = _Lists(
                torch.tensor(list(bias), dtype=torch.int64),
                torch.tensor(list(bias.values()), dtype=torch.float32),
                torch.tensor(sampling.allowed_ids, dtype=torch.int64),
                torch.tensor(ends, dtype=torch.int64),
                torch.tensor([word[0] for word in sampling.bad_words if len(word) == 1], dtype=torch.int64),
                tuple(word for word in sampling.bad_words if len(word) > 1),
            )

    def sample(
        self, logits: Tensor, slots: Integers, lengths: Integers, masks: Mapping[int, Words] | None = None
    ) -> tuple[Tensor, list[Logprobs | None] | None]:
        """Draws one token per row: logits [R, V] float32 (overwritten), slots and history lengths [R] -> tokens [R].

        `masks`: by row, what its grammar allows; a row whose slot has a grammar has one.
        The log-probabilities are None where no row wants any. A token is -1 where the row has no finite maximum: the
        model gave NaN or infinity, or the parameters leave no token.
        """
        uses = self._uses[slots]
        any_use = int(np.bitwise_or.reduce(uses)) if len(uses) else 0
        if not any_use:
            return ops.greedy(logits), None
        wanted, processed = (uses & LOGPROBS) != 0, self._processed[slots]
        shown = asked = _EMPTY
        raw = unscaled = logits
        if any_use & LOGPROBS:
            shown, asked = np.flatnonzero(wanted & ~processed), np.flatnonzero(wanted & self._policy[slots])
            raw = logits[torch.from_numpy(shown)]  # a copy: what follows changes logits
            unscaled = logits[torch.from_numpy(asked)]
        if any_use & EDITS:
            self._edit(logits, slots, lengths, uses, any_use, masks or {})
        drawn = np.flatnonzero(uses & DRAW)
        if not len(drawn):
            tokens = ops.greedy(logits)
        elif len(drawn) == len(slots):
            tokens = self._draw(logits, None, slots, lengths, uses)
        else:
            tokens = ops.greedy(logits)
            rows = torch.from_numpy(drawn)
            tokens[rows] = self._draw(logits, rows, slots[drawn], lengths[drawn], uses[drawn])
        columns: Columns | None = None
        if any_use & LOGPROBS:
            columns = [None for _ in range(len(slots))]
            self._logprobs(columns, raw, tokens, slots, shown)
            others = np.flatnonzero(wanted & processed)
            self._logprobs(columns, logits[torch.from_numpy(others)], tokens, slots, others)
            self._policy_logprobs(columns, unscaled, tokens, slots, asked)
        return tokens, columns

    def _draw(self, logits: Tensor, rows: Tensor | None, slots: Integers, lengths: Integers, uses: Flags) -> Tensor:
        """Tokens of `rows` of logits (None: of all). Where processed log-probabilities are wanted, the rows become the
        logits of the distributions that were drawn from.

        A few rows at a time, so that what they need in between stays in the processor's cache.
        """
        positions = (lengths - self._prompt[slots]).astype(np.uint64)
        noise = ops.draws(self._seed[slots], self._choice[slots], positions, self._vocab_size).to(logits.device)
        temperature = torch.from_numpy(self._temperature[slots]).to(logits.device)
        restricted = np.flatnonzero(uses & RESTRICT)
        shows = bool((self._processed[slots] & ((uses & LOGPROBS) != 0)).any())  # the distributions drawn from
        parts: list[Tensor] = []
        size = max(1, DRAW_ELEMENTS // self._vocab_size)
        for begin in range(0, len(slots), size):
            part = slice(begin, begin + size)
            scaled = logits[part] if rows is None else logits[rows[part]]
            finite = ops.scale(scaled, temperature[part])
            lowest = None
            if len(restricted):
                some = restricted[(restricted >= begin) & (restricted < begin + size)]
                lowest = self._thresholds(scaled, torch.from_numpy(some - begin), slots[some])
            parts.append(ops.gumbel_max(scaled, noise[part], lowest).masked_fill_(~finite, -1))
            if shows and lowest is not None:
                scaled.masked_fill_(scaled < lowest[:, None], -torch.inf)
            if shows and rows is not None:
                logits[rows[part]] = scaled
        return torch.cat(parts)

    def _thresholds(self, scaled: Tensor, rows: Tensor, slots: Integers) -> Tensor:
        """The lowest value that each row keeps; `rows`, which hold `slots`, are those that leave out any."""
        parameters = [torch.from_numpy(column[slots]) for column in (self._top_k, self._top_p, self._min_p)]
        parameters = [parameter.to(scaled.device) for parameter in parameters]
        if len(rows) == len(scaled):
            return ops.thresholds(scaled, *parameters)
        lowest = scaled.new_full((len(scaled),), -torch.inf)
        if len(rows):
            lowest[rows] = ops.thresholds(scaled[rows], *parameters)
        return lowest

    def _edit(
        self,
        logits: Tensor,
        slots: Integers,
        lengths: Integers,
        uses: Flags,
        any_use: int,
        masks: Mapping[int, Words],
    ) -> None:
        if any_use & (BIAS | ALLOWED | BANS | FLOOR):
            for row in np.flatnonzero(uses & (BIAS | ALLOWED | BANS | FLOOR)).tolist():
                slot, length = int(slots[row]), int(lengths[row])
                self._mask(logits[row], slot, length)
            for row, words in masks.items():
                forbidden = ~flags_of(words, self._vocab_size)
                logits[row].masked_fill_(torch.from_numpy(forbidden).to(logits.device), -torch.inf)
        if any_use & PENALTY:
            rows = np.flatnonzero(uses & PENALTY)
            some, length = slots[rows], lengths[rows]
            ids = self._history[some, : int(length.max())].astype(np.int64)
            columns = (length, self._prompt[some], self._repetition[some], self._presence[some], self._frequency[some])
            every = len(rows) == len(slots)
            index = torch.from_numpy(rows)
            part = logits if every else logits[index]
            ops.penalise(part, *(torch.from_numpy(column).to(logits.device) for column in (ids, *columns)))
            if not every:
                logits[index] = part

    def _mask(self, row: Tensor, slot: int, length: int) -> None:
        """Bias, allowed ids, bad words and the floor of min_tokens on one row [V], in place."""
        lists, history = self._lists[slot], self._history[slot, :length]
        if len(lists.bias):
            row[lists.bias_ids] += lists.bias.to(row.device)
        if len(lists.allowed):
            kept = row[lists.allowed]
            row.fill_(-torch.inf)
            row[lists.allowed] = kept
        if len(lists.banned):
            row[lists.banned] = -torch.inf
        for phrase in lists.phrases:
            start = len(phrase) - 1
            if len(history) >= start and tuple(history[-start:].tolist()) == phrase[:-1]:
                row[phrase[-1]] = -torch.inf
        if length - self._prompt[slot] < self._min_tokens[slot]:
            row[lists.ends] = -torch.inf

    def _logprobs(self, columns: Columns, logits: Tensor, tokens: Tensor, slots: Integers, rows: Integers) -> None:
        """Fills `columns` at `rows` from the rows' logits [len(rows), V]."""
        if not len(rows):
            return
        k = self._top_logprobs[slots[rows]].tolist()
        ids = tokens[torch.from_numpy(rows)].clamp_(min=0)
        found = token_logprobs(logits, ids, max(k))
        values, ranks, top_values, top_ids = (column.tolist() for column in found)
        for place, row in enumerate(rows.tolist()):
            likely: Any = top_values[place][: k[place]]
            width = len(likely) - likely.count(-torch.inf)  # a token that cannot be drawn is not among the likely
            columns[row] = Logprobs([values[place]], [ranks[place]], [top_ids[place][:width]], [likely[:width]])

    def _policy_logprobs(
        self, columns: Columns, logits: Tensor, tokens: Tensor, slots: Integers, rows: Integers
    ) -> None:
        """Adds to `columns` at `rows` what follows from the model's logits [len(rows), V] and the temperature alone."""
        if not len(rows):
            return
        factors = torch.from_numpy(self._factor[slots[rows]]).to(logits.device)
        ids = tokens[torch.from_numpy(rows)].clamp_(min=0)
        values: list[float] = token_logprobs(logits, ids, 0, factors).values.tolist()
        for row, value in zip(rows.tolist(), values, strict=True):
            column = columns[row]
            assert column is not None
            column.policy.append(value)


_EMPTY: Integers = np.zeros(0, np.int64)
