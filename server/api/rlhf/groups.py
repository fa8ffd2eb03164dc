"""A prompt in one model, and what that model says of sequences that go on from it."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from ...engine.link import EngineClient, EngineUnavailable
from ...engine.request import EngineError, Group, ModelCard, Output
from ...engine.request import Request as EngineRequest
from ...engine.stream import Stream, merge
from ..errors import bug, invalid, of_engine, unavailable
from ..generation import GRACE_SECONDS

Wanted = Literal["prompt_logprobs", "values", "score"]
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Terms:
    """What the engine's requests behind one HTTP request have in common."""

    client: EngineClient
    request_id: str  # of the HTTP request
    deadline: float  # time.monotonic()
    priority: int = 0
    cache_salt: str = ""
    goes_on: bool = False  # behind requests that the engine has answered: a server that drains takes them


@dataclass(frozen=True, slots=True)
class Found:
    """What a model says of one member; what was not wanted is None. Every number is finite."""

    weight_version: int
    logprobs: list[float] | None = None  # one per token of the member
    values: list[float] | None = None  # one before each of its tokens, and one behind the last
    score: float | None = None
    pooled_index: int | None = None  # where the score was read, counted from the prompt's start; None: all were pooled


class PromptGroup:
    """A prompt in one model; `run` says what the model makes of one member.

    The engine's group is open while any member runs, and closed by the last one, however it ends. Members that come
    later find the prompt as cached as any other. There is none where a prompt cannot be shared: it is empty, or all of
    a sequence's rows make its score; then every member is a whole sequence, which can be scored.
    """

    def __init__(self, terms: Terms, card: ModelCard, prompt: list[int], longest: int) -> None:
        """`longest`: the most tokens that a member may have."""
        self.card, self.prompt = card, prompt
        self.shares = bool(prompt) and card.pooling != "mean"
        self._terms, self._longest = terms, longest
        self._id = self._running = 0

    async def run(self, token_ids: list[int], want: Wanted, temperature: float = 1.0) -> Found:
        """Raises ApiError: what cannot be found is an error, never a number."""
        terms, client = self._terms, self._terms.client
        try:
            group = self._enter()
            try:
                stream = client.submit(
                    EngineRequest(
                        id=client.next_id(),
                        model=self.card.name,
                        token_ids=token_ids if self.shares else [*self.prompt, *token_ids],
                        want=frozenset({want}),
                        prompt_logprobs=0 if want == "prompt_logprobs" else None,
                        priority=terms.priority,
                        deadline=terms.deadline,
                        cache_salt=terms.cache_salt,
                        temperature=temperature,
                        group=group,
                    ),
                    terms.goes_on,
                )
                return self._found(token_ids, want, await _answer(stream, terms))
            finally:
                self._leave()
        except EngineUnavailable as error:
            raise unavailable(str(error)) from None

    def _enter(self) -> int:
        """The open group's id; 0: there is none."""
        terms, client = self._terms, self._terms.client
        if not self.shares:
            return 0
        if not self._running:
            group = Group(
                id=client.next_id(),
                model=self.card.name,
                token_ids=self.prompt,
                longest=self._longest,
                priority=terms.priority,
                deadline=terms.deadline,
                cache_salt=terms.cache_salt,
            )
            client.open_group(group, terms.goes_on)
            self._id = group.id
        self._running += 1
        return self._id

    def _leave(self) -> None:
        if self._running:
            self._running -= 1
            if not self._running:
                self._terms.client.close_group(self._id)

    def _found(self, token_ids: list[int], want: Wanted, answer: Output) -> Found:
        count, version = len(token_ids), answer.weight_version
        if want == "score":
            scores = answer.scores or []
            self._check(scores, 1, "score")
            return Found(version, score=scores[0], pooled_index=answer.pooled_index)
        if want == "values":
            self._check(answer.values or [], count + 1, "value")
            return Found(version, values=answer.values)
        logprobs = answer.prompt_logprobs.values if answer.prompt_logprobs else []
        self._check(logprobs, count, "log-probability")
        return Found(version, logprobs=logprobs)

    def _check(self, numbers: list[float], count: int, what: str) -> None:
        if len(numbers) != count or not all(map(math.isfinite, numbers)):
            message = f"{self.card.name!r} gave {len(numbers)} numbers where {count} finite ones are due: {what}"
            raise bug(self._terms.request_id, message)


async def _answer(stream: Stream, terms: Terms) -> Output:
    """All that the engine says to a request of one choice. Raises ApiError."""
    answer: Output | None = None
    try:
        async with asyncio.timeout(max(0.0, terms.deadline - time.monotonic()) + GRACE_SECONDS):
            async for outputs in stream:
                for output in outputs:
                    if output.error is not None:
                        raise of_engine(output.error, terms.request_id)
                    if answer is None:
                        answer = output
                    else:
                        merge(answer, output)
    except TimeoutError:
        error = EngineError("deadline", "the engine did not answer by the deadline")
        raise of_engine(error, terms.request_id) from None
    finally:
        stream.close()
    if answer is None or answer.finish == "abort":
        raise unavailable("the request was aborted")
    return answer


def limit_of(card: ModelCard) -> int:
    """The longest sequence that the model can take."""
    return min(card.context, card.max_request_tokens or card.context)


def check_length(card: ModelCard, prompt: int, tokens: int, where: str) -> None:
    """`where`: the field that holds the `tokens` behind the prompt."""
    limit = limit_of(card)
    if prompt + tokens > limit:
        raise invalid(
            f"{where} has {tokens} tokens and its prompt {prompt}; {card.name!r} takes {limit} together",
            where,
            "context_length_exceeded",
        )


async def together(works: Iterable[Coroutine[Any, Any, Result]]) -> list[Result]:
    """All results in order. The first failure ends the others, and is raised once they have ended."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
