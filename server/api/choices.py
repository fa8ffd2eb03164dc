"""One choice of an answer: the engine's outputs become text, cut where the answer ends, and what the text says."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ..engine.request import Finish, Logprobs, Output
from ..text.events import Arguments, CallBegins, CallEnds, Content, Event, NoCall, Reasoning
from ..text.reader import Reader
from ..text.text import Detokenizer

FINISH_REASONS: dict[Finish, str] = {"stop": "stop", "length": "length", "abort": "length", "error": "length"}


@dataclass(slots=True)
class CallDelta:
    """More of one call. Its first has the id and the name."""

    index: int  # among the choice's calls
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(slots=True)
class Delta:
    """What came since the last one."""

    text: str = ""  # prose alone, where thinking and calls are read
    token_ids: list[int] = field(default_factory=list[int])
    offsets: list[int] = field(default_factory=list[int])  # where in the text each token starts, if asked for
    logprobs: Logprobs | None = None
    reasoning: str = ""
    calls: list[CallDelta] = field(default_factory=list[CallDelta])


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
    reader: Reader | None = None  # None: all text is prose
    calls: int = 0  # begun so far
    reward: float | None = None  # a reward model's, where choices are ranked by it
    versions: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])  # of weights, by first token

    def weight_spans(self) -> list[dict[str, int]]:
        """Which of its tokens, from `start` to before `end`, were drawn by which version of the weights."""
        firsts = [first for _, first in self.versions] + [self.tokens]
        ends = [min(first, self.tokens) for first in firsts[1:]]
        return [
            {"version": version, "start": first, "end": end}
            for (version, first), end in zip(self.versions, ends, strict=True)
            if first < end
        ]

    def shown_spans(self, asked: bool) -> dict[str, object]:
        """For an answer: nothing where nobody asked and one version drew all of it."""
        spans = self.weight_spans()
        return {"weight_spans": spans} if asked or len(spans) > 1 else {}

    @property
    def aborted(self) -> bool:
        """OpenAI's clients know no such reason; the others are told."""
        return self.finish_reason == "length" and self.stop_reason == "abort"

    def push(self, output: Output) -> bool:
        """True when it ended here, by a stop string or its only call, which the engine does not know."""
        if self.reader is not None and self.reader.one_call and len(output.token_ids) > 1:
            # Cut at the very token that completes the call, however many have come at once.
            any(self._push(single) for single in _one_by_one(output))
            return self.finish_reason is not None and output.finish is None
        return self._push(output)

    def _push(self, output: Output) -> bool:
        piece = self.detokenizer.push(output.token_ids, output.finish is not None, output.stop_id)
        count = len(output.token_ids)
        waiting = self.waiting
        if output.earlier_versions or not self.versions or self.versions[-1][0] != output.weight_version:
            self._note_versions(output)
        if piece.stop is None and output.finish is None and output.logprobs is None and not piece.offsets:
            self.tokens += count
            waiting.token_ids += output.token_ids
            if self.reader is None:
                waiting.text += piece.text
                return False
            return self._read(self.reader, piece.text)
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
        waiting.token_ids += output.token_ids[:count]
        waiting.offsets += piece.offsets[:count]
        if output.logprobs is not None:
            waiting.logprobs = extended(waiting.logprobs, output.logprobs, count)
        ended = piece.stop is not None and output.finish is None
        if self.reader is None:
            waiting.text += piece.text
            return ended
        return self._read(self.reader, piece.text) or ended

    def _note_versions(self, output: Output) -> None:
        first = self.tokens
        for version, count in output.runs():
            if count and (not self.versions or self.versions[-1][0] != version):
                self.versions.append((version, first))
            first += count

    def _read(self, reader: Reader, text: str) -> bool:
        """True when it has its only call."""
        for event in reader.push(text):
            self._say(event)
        if self.finish_reason is None:
            if reader.over:
                self.finish_reason = "tool_calls"
            return reader.over
        for event in reader.finish("cut" if self.finish_reason == "length" else "ended"):
            self._say(event)
        if reader.over or (reader.calls and self.finish_reason == "stop"):
            self.finish_reason = "tool_calls"
        return False

    def _say(self, event: Event) -> None:
        waiting = self.waiting
        match event:
            case Content(text):
                waiting.text += text
            case Reasoning(text):
                waiting.reasoning += text
            case CallBegins(name):
                assert self.reader is not None
                waiting.calls.append(CallDelta(self.calls, self.reader.new_id(), name))
                self.calls += 1
            case Arguments(text):
                if not waiting.calls:
                    waiting.calls.append(CallDelta(self.calls - 1))
                waiting.calls[-1].arguments += text
            case NoCall(text):  # nothing of it is told, or all of it where a stream has told its beginning
                if waiting.calls and waiting.calls[-1].id is not None:
                    waiting.calls.pop()
                    self.calls -= 1
                waiting.text += text
            case CallEnds():
                pass

    def take(self) -> Delta:
        delta, self.waiting = self.waiting, Delta("", [], [])
        return delta


def best(choices: Sequence[Choice], count: int) -> Sequence[Choice]:
    """The `count` best, the best first: by reward where they have one, else of more than `count` those whose tokens
    have the highest mean log-probability.

    They are finished, nothing of them has been taken, and all have a reward, or log-probabilities where there are more.
    """

    def mean(choice: Choice) -> float:
        values = choice.waiting.logprobs.values if choice.waiting.logprobs else []
        return sum(values) / len(values) if values else -math.inf

    rewards = [choice.reward for choice in choices if choice.reward is not None]
    if rewards:
        ranked = sorted(zip(rewards, choices, strict=True), key=lambda pair: -pair[0])
        return [choice for _, choice in ranked[:count]]
    return choices if len(choices) <= count else sorted(choices, key=mean, reverse=True)[:count]


def extended(first: Logprobs | None, more: Logprobs, count: int) -> Logprobs:
    first = Logprobs() if first is None else first
    first.values += more.values[:count]
    first.ranks += more.ranks[:count]
    first.top_ids += more.top_ids[:count]
    first.top_values += more.top_values[:count]
    first.policy += more.policy[:count]
    return first


def _one_by_one(output: Output) -> Iterator[Output]:
    """An output per token that together say what `output` says."""
    last, logprobs = len(output.token_ids) - 1, output.logprobs
    versions = [version for version, count in output.runs() for _ in range(count)]
    for i, (token, version) in enumerate(zip(output.token_ids, versions, strict=True)):
        single = Output(output.request_id, output.choice, [token], weight_version=version)
        if logprobs is not None:
            here = slice(i, i + 1)
            single.logprobs = Logprobs(
                logprobs.values[here],
                logprobs.ranks[here],
                logprobs.top_ids[here],
                logprobs.top_values[here],
                logprobs.policy[here],
            )
        if i == last:
            single.finish, single.stop_id = output.finish, output.stop_id
        yield single
