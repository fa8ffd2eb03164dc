"""The engine requests behind one HTTP request, from submission to the last token."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..engine.link import EngineClient, EngineUnavailable
from ..engine.request import EngineError, Logprobs, Output, Request
from ..engine.stream import Stream
from ..text.reader import Reader
from ..text.text import Text
from . import errors
from .choices import Choice
from .protocol import GenerationBody

GRACE_SECONDS = 5.0  # past its deadline a request is the engine's to end; after that the engine hangs


@dataclass(slots=True)
class Part:
    """One prompt and its choices; none where only a score or an embedding is wanted."""

    request: Request
    choices: list[Choice]
    stream: Stream | None = None
    cached_tokens: int = 0
    prompt_logprobs: Logprobs | None = None
    scores: list[float] | None = None
    pooled_index: int | None = None
    embedding: list[float] | None = None


class Generation:
    """Submits on construction; `step` until it gives nothing, and `close` in a `finally`.

    Whatever arrives while nobody waits in `step` is merged per choice: a slow reader gets fewer, longer deltas.
    """

    def __init__(self, client: EngineClient, parts: Sequence[Part], request_id: str) -> None:
        """Raises ApiError 503 when the engine takes nothing."""
        self.parts = parts
        self.choices = [choice for part in parts for choice in part.choices]
        card = client.catalog and client.catalog.find(parts[0].request.model)
        self.weight_version = card.weight_version if card else 0  # until an output says what it was computed with
        self._client = client
        self._request_id = request_id
        self._parts = {part.request.id: part for part in parts}
        self._unfinished = sum(len(part.choices) or 1 for part in parts)
        self._pumps: list[asyncio.Task[None]] = []
        self._queue: asyncio.Queue[list[Output]] = asyncio.Queue()
        self._late = False
        deadline = min(part.request.deadline or float("inf") for part in parts)
        seconds = deadline - time.monotonic() + GRACE_SECONDS
        self._timer = asyncio.get_running_loop().call_later(seconds, self._give_up)
        try:
            for part in parts:
                part.stream = client.submit(part.request)
        except EngineUnavailable as error:
            self.close()
            raise errors.unavailable(str(error)) from None
        self._stream = parts[0].stream if len(parts) == 1 else None
        if len(parts) > 1:
            self._pumps = [asyncio.create_task(self._pump(part)) for part in parts]

    async def step(self) -> list[Choice]:
        """The choices that changed since the last call; none once all are finished. Raises ApiError."""
        while self._unfinished:
            stream = self._stream
            if stream is None:
                outputs = await self._queued()
            else:  # the hot path: no coroutine between the engine's message and this one
                while not (outputs := stream.take()) and not stream.ended:
                    await stream.wait()
            if self._late:
                error = EngineError("deadline", "the engine did not answer by the deadline")
                raise errors.of_engine(error, self._request_id)
            if not outputs:
                raise RuntimeError("the engine's answer ended before its last choice")
            if len(outputs) == 1:
                choice = self._take(outputs[0])
                if choice is None:
                    continue
                return [choice]
            changed: dict[int, Choice] = {}
            for output in outputs:
                choice = self._take(output)
                if choice is not None:
                    changed[choice.index] = choice
            if changed:
                return list(changed.values())
        return []

    async def finish(self) -> None:
        try:
            while await self.step():
                pass
        finally:
            self.close()

    def close(self) -> None:
        """Abort what is not finished. May be called again."""
        self._timer.cancel()
        for pump in self._pumps:
            pump.cancel()
        for part in self.parts:
            if part.stream is not None:
                part.stream.close()

    def usage(self) -> dict[str, Any]:
        prompt = sum(len(part.request.token_ids) for part in self.parts)
        completion = sum(choice.tokens for choice in self.choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(part.cached_tokens for part in self.parts)},
        }

    def _take(self, output: Output) -> Choice | None:
        """The choice, if that changed it."""
        if output.error is not None:
            raise errors.of_engine(output.error, self._request_id)
        part = self._parts[output.request_id]
        self.weight_version = output.weight_version
        if output.cached_tokens is not None:
            part.cached_tokens = output.cached_tokens
        if output.prompt_logprobs is not None:
            part.prompt_logprobs = output.prompt_logprobs
        if output.scores is not None:
            part.scores, part.pooled_index = output.scores, output.pooled_index
        if output.embedding is not None:
            part.embedding = output.embedding
        if not part.choices:
            self._unfinished -= output.finish is not None
            return None
        choice = part.choices[output.choice]
        if choice.finish_reason is not None or not (output.token_ids or output.finish):
            return None
        if choice.push(output):
            self._client.abort(part.request.id, choice.number, "stop")
        if choice.finish_reason is not None:
            self._unfinished -= 1
        return choice

    async def _queued(self) -> list[Output]:
        """What came for any of the parts."""
        outputs = [*await self._queue.get()]
        while not self._queue.empty():
            outputs += self._queue.get_nowait()
        return outputs

    def _give_up(self) -> None:
        """Wakes whoever waits in `step`."""
        self._late = True
        self.close()
        self._queue.put_nowait([])

    async def _pump(self, part: Part) -> None:
        assert part.stream is not None
        async for outputs in part.stream:
            self._queue.put_nowait(outputs)


def generate(
    client: EngineClient,
    body: GenerationBody,
    text: Text,
    requests: Sequence[Request],
    request_id: str,
    offsets: bool = False,
    reader: Callable[[], Reader | None] = lambda: None,
) -> Generation:
    """Submit the requests of a chat or completion. Choices are numbered through, prompt after prompt.

    `reader` makes what reads the text of a choice, where that is more than prose.
    """
    parts = [part_of(body, text, request, index * request.n, offsets, reader) for index, request in enumerate(requests)]
    return Generation(client, parts, request_id)


def part_of(
    body: GenerationBody,
    text: Text,
    request: Request,
    first: int,
    offsets: bool = False,
    reader: Callable[[], Reader | None] = lambda: None,
) -> Part:
    """Its choices are numbered from `first` on."""
    choices: list[Choice] = []
    for number in range(request.n):
        reads = reader()
        detokenizer = text.detokenizer(
            request.token_ids,
            stop=body.stop,
            include_stop=body.include_stop_str_in_output,
            skip_special_tokens=body.skip_special_tokens,
            min_tokens=body.min_tokens,
            offsets=offsets,
            shows_markers=reads is not None,
        )
        choices.append(Choice(first + number, number, detokenizer, tuple(body.stop_token_ids), reader=reads))
    return Part(request, choices)
