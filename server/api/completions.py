"""POST /v1/completions, and the route that old SDKs use for it."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ..engine.request import ModelCard
from ..text.text import Text
from . import body as bodies
from . import fields, logprobs
from .choices import Choice, Delta
from .generation import Generation, generate
from .logprobs import Wording
from .protocol import CompletionBody
from .sampling import COMPLETION_TOKENS, Length, requests_of
from .service import Service, encode
from .streaming import JsonAnswer, Tails, quoted, stream, to_json, whole

router = APIRouter()


@router.post("/v1/completions")
async def create(request: Request) -> Response:
    service = Service.of(request)
    body, headers = await bodies.read(request, CompletionBody, fields.COMPLETIONS, service.options)
    return await complete(request, service, body, body.model, headers)


@router.post("/v1/engines/{engine:path}/completions")
async def create_on_engine(request: Request, engine: str) -> Response:
    service = Service.of(request)
    body, headers = await bodies.read(request, CompletionBody, fields.COMPLETIONS, service.options)
    return await complete(request, service, body, engine, headers)


async def complete(
    request: Request, service: Service, body: CompletionBody, model: str | None, headers: dict[str, str]
) -> Response:
    card = service.card(model, generates=True)
    text = service.texts(card)
    special = body.add_special_tokens is not False
    prompts = await encode(text, body.prompt, special, card, "prompt")
    length = Length("max_tokens", body.max_tokens, COMPLETION_TOKENS)
    requests = requests_of(service, body, card, text, prompts, "prompt", length, body.logprobs)
    offsets = body.logprobs is not None
    generation = generate(service.client, body, text, requests, request.state.request_id, offsets)
    shape = Completion(body, card, text, generation)
    if body.stream:
        return await stream(request, generation, shape, service.options, headers)
    await whole(request, generation)
    return JsonAnswer(shape.answer(), headers)


class Completion:
    """The wording of the answer, whole or as chunks."""

    def __init__(self, body: CompletionBody, card: ModelCard, text: Text, generation: Generation) -> None:
        self._generation = generation
        self._wording = Wording(text, body.return_tokens_as_token_ids)
        self._tails = Tails(generation, body.stream_options)
        self._n = body.n
        self._ids = body.return_token_ids
        self._started: set[int] = set()  # choices whose prompt ids have been sent
        self._about: dict[str, Any] = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": card.name,
        }
        self._head = f'data: {to_json(self._about)[:-1]},"choices":['

    def answer(self) -> dict[str, Any]:
        return {
            **self._about,
            "choices": [self._choice(choice) for choice in self._generation.choices],
            "usage": self._generation.usage(),
            "weight_version": self._generation.weight_version,
        }

    def _choice(self, choice: Choice) -> dict[str, Any]:
        delta = choice.take()
        part = self._generation.parts[choice.index // self._n]
        extras: dict[str, Any] = {}
        if part.prompt_logprobs is not None:
            extras["prompt_logprobs"] = logprobs.prompt(self._wording, part.request.token_ids, part.prompt_logprobs)
        return {
            "index": choice.index,
            "text": delta.text,
            "logprobs": self._columns(delta),
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
            **self._token_ids(choice, delta),
            **extras,
        }

    def _columns(self, delta: Delta) -> dict[str, Any] | None:
        if delta.logprobs is None:
            return None
        return logprobs.completion(self._wording, delta.token_ids, delta.logprobs, delta.offsets)

    def _token_ids(self, choice: Choice, delta: Delta) -> dict[str, Any]:
        """The prompt's stand in a choice's first chunk only."""
        if not self._ids:
            return {}
        found: dict[str, Any] = {"token_ids": delta.token_ids}
        if choice.index not in self._started:
            self._started.add(choice.index)
            found["prompt_token_ids"] = self._generation.parts[choice.index // self._n].request.token_ids
        return found

    def opening(self) -> str:
        return ""

    def changes(self, choices: Iterable[Choice]) -> str:
        events: list[str] = []
        tail = self._tails.next()
        for choice in choices:
            delta = choice.take()
            finished = choice.finish_reason is not None
            columns, finish, extra = "null", "null", ""
            if delta.logprobs:
                columns = to_json(self._columns(delta))
            if self._ids:
                extra = "," + to_json(self._token_ids(choice, delta))[1:-1]
            if finished:
                finish = to_json(choice.finish_reason)
                extra += f',"stop_reason":{to_json(choice.stop_reason)}'
            elif not (delta.text or delta.logprobs or (self._ids and delta.token_ids)):
                continue
            events.append(
                f'{self._head}{{"index":{choice.index},"text":{quoted(delta.text)},"logprobs":{columns},'
                f'"finish_reason":{finish}{extra}}}{tail}'
            )
        return "".join(events)

    def closing(self) -> str:
        tail = self._tails.last()
        return "" if tail is None else self._head + tail
