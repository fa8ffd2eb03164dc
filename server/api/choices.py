"""One choice of an answer: the engine's outputs become text, cut where the answer ends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..engine.request import Finish, Logprobs, Output
from ..text.text import Detokenizer

FINISH_REASONS: dict[Finish, str] = {"stop": "stop", "length": "length", "abort": "length", "error": "length"}


@dataclass(slots=True)
class Delta:
    """What came since the last one."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list[int])
    offsets: list[int] = field(default_factory=list[int])  # where in the text each token starts, if asked for
    logprobs: Logprobs | None = None


@dataclass(slots=True)
class Choice:
    index: int  # in the whole answer
    number: int  # in its engine request
    detokenizer: Detokenizer
    stop_ids: tuple[int, ...]  # the request's own
    tokens: int = 0  # of the answer so far
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    waiting: Delta = field(default_factory=Delta)

    def push(self, output: Output) -> bool:
        """True when a stop string ended it here, which the engine does not know."""
        piece = self.detokenizer.push(output.token_ids, output.finish is not None, output.stop_id)
        count = len(output.token_ids)
        waiting = self.waiting
        if piece.stop is None and output.finish is None and output.logprobs is None and not piece.offsets:
            self.tokens += count
            waiting.text += piece.text
            waiting.token_ids += output.token_ids
            return False
        if piece.stop is not None:
            count = piece.tokens - self.tokens
            self.finish_reason, self.stop_reason = "stop", piece.stop
        elif output.finish is not None:
            self.finish_reason = FINISH_REASONS[output.finish]
            if output.finish == "abort":
                self.stop_reason = "abort"
            elif output.stop_id in self.stop_ids:
                self.stop_reason = output.stop_id
        self.tokens += count
        waiting.text += piece.text
        waiting.token_ids += output.token_ids[:count]
        waiting.offsets += piece.offsets[:count]
        if output.logprobs is not None:
            waiting.logprobs = _extended(waiting.logprobs, output.logprobs, count)
        return piece.stop is not None and output.finish is None

    def take(self) -> Delta:
        delta, self.waiting = self.waiting, Delta("", [], [])
        return delta


def best(choices: Sequence[Choice], count: int) -> Sequence[Choice]:
    """Of more choices than that the `count` whose tokens have the highest mean log-probability, the best first.

    They are finished, nothing of them has been taken, and all have log-probabilities.
    """
    if len(choices) <= count:
        return choices

    def mean(choice: Choice) -> float:
        values = choice.waiting.logprobs.values if choice.waiting.logprobs else []
        return sum(values) / len(values) if values else -math.inf

    return sorted(choices, key=mean, reverse=True)[:count]


def _extended(first: Logprobs | None, more: Logprobs, count: int) -> Logprobs:
    first = Logprobs() if first is None else first
    first.values += more.values[:count]
    first.ranks += more.ranks[:count]
    first.top_ids += more.top_ids[:count]
    first.top_values += more.top_values[:count]
    return first
