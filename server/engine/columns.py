"""What a step needs of all sequences that decode, column by column.

Made when they change and kept until they change again: while nobody joins, ends or is preempted, a step of hundreds of
sequences is a few passes over lists, and most of what it has to say is one list of tokens (`request.Tokens`).
"""

from __future__ import annotations

from .plan import Plan
from .request import Outputs, Tokens
from .sequence import UNKNOWN, Sequence


class Columns:
    """The rows of a pure decode, one entry each. Lists are shared with plans and outputs: nobody changes them."""

    def __init__(self, rows: list[Sequence], page_size: int) -> None:
        self.rows = rows
        self._page_size = page_size
        self._slots = [sequence.slot for sequence in rows]
        self._samples = list(enumerate(self._slots))
        self._histories = [sequence.token_ids for sequence in rows]
        self._starts = [len(token_ids) - 1 for token_ids in self._histories]
        self._ids = [sequence.id for sequence in rows]
        self._choices = [sequence.choice for sequence in rows]
        self._stops = frozenset[int]().union(*{sequence.stops for sequence in rows})
        # Steps until the first of them has all its tokens.
        self._left = min([one.limit - start for one, start in zip(rows, self._starts, strict=True)], default=1) - 1
        self._age = 0  # in steps
        self._due: list[list[Sequence]] | None = None  # by age, as far as a page goes: who begins one

    def plan(self, prefixes: list[tuple[int, int]] | None, steady: bool = False) -> Plan:
        rows = len(self.rows)
        lists = self._slots, self._starts, [1] * rows, rows, rows, self._samples
        return Plan(*lists, prefixes=prefixes, steady=steady)

    def further(self) -> list[Sequence]:
        """The next step. Gives those that begin a page with it, by rank."""
        self._age += 1
        self._starts = [start + 1 for start in self._starts]
        if self._due is None:
            self._due = [[] for _ in range(self._page_size)]
            for sequence, start in zip(self.rows, self._starts, strict=True):
                self._due[(self._age - start) % self._page_size].append(sequence)
        return self._due[self._age % self._page_size]

    def advance(self) -> list[Sequence]:
        """A token more for each, which is not known yet. Those that are at their limit with it."""
        for token_ids in self._histories:
            token_ids.append(UNKNOWN)
        self._left -= 1
        return [one for one in self.rows if len(one.token_ids) >= one.limit] if self._left <= 0 else []

    def tell(self, tokens: list[int], moved: bool, version: int, outputs: Outputs) -> list[int]:
        """Brings in their tokens, the first of `tokens`, and says so at once of all that simply go on.

        Gives the other rows: at a stop token, at their limit, gone. `moved`: since `advance` somebody may have left.
        """
        for token_ids, token in zip(self._histories, tokens, strict=False):
            token_ids[-1] = token
        apart: list[int] = []
        if moved:
            apart = [row for row, one in enumerate(self.rows) if one.gone or one.landed]
        ids, choices, told = self._ids, self._choices, tokens[: len(self.rows)]
        if not self._stops.isdisjoint(told):
            stopping = [row for row, token in enumerate(told) if token in self._stops]
            apart = sorted({*apart, *stopping})
        if apart:
            ids, choices = [*ids], [*choices]
            for row in reversed(apart):
                del ids[row], choices[row], told[row]
        if told:
            outputs.tokens.append(Tokens(ids, choices, told, version))
        return apart
