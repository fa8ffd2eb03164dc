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
DRAW, PENALTY, BIAS, ALLOWED, BANS, FLOOR, LOGPROBS = (1 << bit for bit in range(7))
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
        self._temperature, _, _, *penalties, self._factor = self._floats
        self._repetition, self._presence, self._frequency = penalties
        self._integers = np.zeros((6, slots), np.int64)
        self._seed, self._choice, self._top_k, self._prompt, self._min_tokens, self._top_logprobs = self._integers
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
        integers = choice, sampling.top_k, prompt, sampling.min_tokens, sampling.logprobs or 0
        self._integers[1:, slot] = integers
        self._seed.view(np.uint64)[slot] = sampling.seed
        self._processed[slot] = sampling.logprobs_mode == "processed"
        self._policy[slot] = sampling.policy_logprobs
        ends = (*self._end_ids, *sampling.stop_ids) if sampling.min_tokens > 0 else ()
        self._uses[slot] = (
            DRAW * (sampling.temperature >= ops.GREEDY_BELOW)
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
        """Draws one token per row: logits [R, V] in any float dtype, which stay as they are; slots and history lengths
        [R] -> tokens [R].

        `masks`: by row, what its grammar allows; a row whose slot has a grammar has one.
        The log-probabilities are None where no row wants any. A token is -1 where the row has no finite maximum: the
        model gave NaN or infinity, or the parameters leave no token.
        """
        uses = self._uses[slots]
        any_use = int(np.bitwise_or.reduce(uses)) if len(uses) else 0
        edited = logits
        if any_use & EDITS:
            edited = logits.to(torch.float32, copy=True)
            self._edit(edited, slots, lengths, uses, any_use, masks or {})
        if not any_use & DRAW:
            tokens, lowest = ops.greedy(edited), None
        else:
            tokens, lowest = ops.draw(edited, self._how(slots, lengths, edited.device))
        if not any_use & LOGPROBS:
            return tokens, None
        columns: Columns = [None for _ in range(len(slots))]
        wanted, processed = (uses & LOGPROBS) != 0, self._processed[slots]
        self._logprobs(columns, logits, tokens, slots, np.flatnonzero(wanted & ~processed))
        if (shown := np.flatnonzero(wanted & processed)).size:
            if lowest is not None:
                temperature = torch.from_numpy(self._temperature[slots]).to(edited.device)
                edited = ops.distribution(edited, temperature, lowest)
            self._logprobs(columns, edited, tokens, slots, shown)
        asked = wanted & self._policy[slots]
        same = asked & ~processed & (self._factor[slots] == 1)  # at temperature 1 it is what was told already
        for row in np.flatnonzero(same).tolist():
            column = columns[row]
            assert column is not None
            column.policy.append(column.values[0])
        self._policy_logprobs(columns, logits, tokens, slots, np.flatnonzero(asked & ~same))
        return tokens, columns

    def _how(self, slots: Integers, lengths: Integers, device: torch.device) -> ops.Draws:
        temperature, top_p, min_p = torch.from_numpy(self._floats[:3, slots]).to(device)
        seeds, choices, top_k, prompts = torch.from_numpy(self._integers[:4, slots]).to(device)
        positions = torch.from_numpy(lengths).to(device) - prompts
        return ops.Draws(temperature, seeds, choices, positions, top_k, top_p, min_p)

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
        """Fills `columns` at `rows` from all logits [R, V] and tokens [R]."""
        if not len(rows):
            return
        k = self._top_logprobs[slots[rows]].tolist()
        found = token_logprobs(*_at(logits, tokens, rows), max(k))
        values, ranks, top_values, top_ids = (column.tolist() for column in found)
        for place, row in enumerate(rows.tolist()):
            likely: Any = top_values[place][: k[place]]
            width = len(likely) - likely.count(-torch.inf)  # a token that cannot be drawn is not among the likely
            columns[row] = Logprobs([values[place]], [ranks[place]], [top_ids[place][:width]], [likely[:width]])

    def _policy_logprobs(
        self, columns: Columns, logits: Tensor, tokens: Tensor, slots: Integers, rows: Integers
    ) -> None:
        """Adds to `columns` at `rows` what follows from the model's logits [R, V] and the temperature alone."""
        if not len(rows):
            return
        factors = torch.from_numpy(self._factor[slots[rows]]).to(logits.device)
        values: list[float] = token_logprobs(*_at(logits, tokens, rows), 0, factors).values.tolist()
        for row, value in zip(rows.tolist(), values, strict=True):
            column = columns[row]
            assert column is not None
            column.policy.append(value)


def _at(logits: Tensor, tokens: Tensor, rows: Integers) -> tuple[Tensor, Tensor]:
    """The logits and tokens of these rows, in order; a token that could not be drawn is 0."""
    tokens = tokens.clamp(min=0)
    if len(rows) == len(tokens):
        return logits, tokens
    index = torch.from_numpy(rows).to(logits.device)
    return logits[index], tokens[index]
