"""Of which rows of a step hidden states are asked for, and what groups have pinned of earlier ones."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# torch types some of the functions used here only in part.

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...kernels.sampling import factor
from ...model.model import Model
from .plan import Plan, PromptRows
from .request import Request

Integers = NDArray[np.int64]


class Read(NamedTuple):
    """The rows of a step that anything is made of; see `Batch.read`. `numbers` [R], ascending; None: all T."""

    numbers: Integers | None
    places: Integers  # [T]: where each of them is among those that are read

    @staticmethod
    def of(plan: Plan, ends: Integers, adapted: bool) -> Read:
        """`ends`: where in the step each row of the plan has its last token. `adapted`: a row has an adapter. All where
        that is no more than twice as many: others would be copied to save little."""
        everything = Read(None, np.zeros(0, np.int64))
        if plan.pooled or adapted:
            return everything
        wanted = np.zeros(plan.tokens, np.bool_)
        rows = [row for pairs in (plan.samples, plan.scores, plan.pins) for row, _ in pairs]
        wanted[ends[np.array(rows, np.int64)]] = True
        for some in (*plan.values, *plan.prompt_logprobs):
            zero = ends[some.row] - (plan.starts[some.row] + plan.counts[some.row] - 1)
            wanted[zero + some.first + (some.pin is not None) : zero + some.end] = True
        wanted[0] = True  # kernels are not launched for nothing
        if 2 * np.count_nonzero(wanted) > plan.tokens:
            return everything
        return Read(np.flatnonzero(wanted), np.cumsum(wanted) - 1)

    def at(self, rows: Integers) -> Integers:
        """Where the hidden states of these rows of the step are."""
        return rows if self.numbers is None else self.places[rows]


class Rows(NamedTuple):
    """Hidden states that are asked for: number i is row `numbers[i]` of those read, but at `places` are pinned ones."""

    numbers: Integers  # [R]
    places: Integers  # [pinned ones]
    pins: Integers  # as many

    @staticmethod
    def of(plan: Plan, wanted: Sequence[PromptRows], ends: Integers, read: Read) -> Rows:
        """Those of `wanted`, one after another; `ends`: where in the step each row of the plan has its last token."""
        parts, places, pins, begin = [np.zeros(0, np.int64)], list[int](), list[int](), 0
        for rows in wanted:
            zero = ends[rows.row] - (plan.starts[rows.row] + plan.counts[rows.row] - 1)
            parts.append(np.arange(zero + rows.first, zero + rows.end))
            if rows.pin is not None:
                parts[-1][0] = 0  # which lies in the step, too
                places.append(begin)
                pins.append(rows.pin)
            begin += rows.end - rows.first
        return Rows(read.at(np.concatenate(parts)), np.array(places, np.int64), np.array(pins, np.int64))


def factors_of(requests: Sequence[Request], wanted: Sequence[PromptRows]) -> NDArray[np.float32] | None:
    """What the logits of each row are multiplied by, where entry i of `wanted` is of request i; None: all by 1."""
    factors = np.array([factor(request.temperature) for request in requests], np.float32)
    return np.repeat(factors, sizes_of(wanted)) if (factors != 1).any() else None


def targets_of(plan: Plan, wanted: Sequence[PromptRows], width: int) -> Integers:
    """Where the tokens behind these positions stand in the history [slots, width], row after row."""
    parts = [plan.slots[rows.row] * width + np.arange(rows.first + 1, rows.end + 1) for rows in wanted]
    return np.concatenate([np.zeros(0, np.int64), *parts])


def sizes_of(wanted: Sequence[PromptRows]) -> list[int]:
    return [rows.end - rows.first for rows in wanted]


class Pinned:
    """A hidden state per pin: [pins, D] in the model's dtype."""

    def __init__(self, pins: int, model: Model, device: torch.device) -> None:
        self._kept = torch.zeros(pins, model.config.output_size, dtype=model.dtype, device=device)

    def keep(self, pins: Tensor, hidden: Tensor) -> None:
        """hidden [R, D] under `pins` [R]."""
        self._kept[pins] = hidden

    def gather(self, hidden: Tensor, numbers: Tensor, places: Tensor, pins: Tensor) -> Tensor:
        """The hidden states that `Rows` names; hidden [R, D] are those of the step that are read."""
        found = hidden[numbers]
        if len(places):
            found[places] = self._kept[pins]
        return found
