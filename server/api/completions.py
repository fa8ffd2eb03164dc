"""POST /v1/completions, and the route that old SDKs use for it."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ..engine.request import ModelCard
from ..text.text import Text
from . import body as bodies
from . import fields, logprobs, ranking
from .choices import Choice, Delta, best
from .echo import Echo, echo_of
from .generation import Generation, Part, generate
from .logprobs import Wording
from .protocol import CompletionBody
from .ranking import Judge
from .rlhf.prompts import source_of
from .sampling import COMPLETION_TOKENS, Length, requests_of
from .service import LONG_TEXT, Service, encode, in_thread_if
from .streaming import JsonAnswer, Tails, quoted, stream, to_json, unless_gone, whole
from .structured import grammar_of

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
    card = service.card(model, gives="text")
    text = service.texts(card)
    ranking.check(body, body.max_tokens)
    judge = Judge.of(service, body, card)
    special = body.add_special_tokens is not False
    grammar = await grammar_of(service, body)
    prompts = await encode(text, body.prompt, special, card, "prompt")
    requests = requests_of(
        service,
        body,
        card,
        text,
        prompts,
        "prompt",
        Length("max_tokens", body.max_tokens, COMPLETION_TOKENS, may_be_none=body.echo),
        body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
        grammar=grammar,
    )
    echoes: list[Echo] = []
    if body.echo:
        kept = [(sent, one.token_ids, len(one.token_ids) == len(ids)) for sent, one, ids in zip(
            body.prompt, requests, prompts, strict=True)]  # fmt: skip
        echoes = await in_thread_if(
            sum(map(len, body.prompt)) > LONG_TEXT,
            lambda: [echo_of(text, sent, ids, whole, body.skip_special_tokens) for sent, ids, whole in kept],
        )
    offsets = body.logprobs is not None
    generation = generate(service.client, body, text, requests, request.state.request_id, offsets)
    shape = Completion(body, card, text, generation, echoes)
    if body.stream:
        return await stream(request, generation, shape, service.options, headers)
    await whole(request, generation)
    if judge is not None:
        sources = [source_of(prompt, f"prompt[{index}]") for index, prompt in enumerate(body.prompt)]
        await unless_gone(request, judge.reward(service, body, request.state.request_id, generation, sources))
    return JsonAnswer(shape.answer(), headers)


class Completion:
    """The wording of the answer, whole or as chunks. `echoes`: one per prompt, or none."""

    def __init__(
        self, body: CompletionBody, card: ModelCard, text: Text, generation: Generation, echoes: Sequence[Echo]
    ) -> None:
        self._generation = generation
        self._wording = Wording(text, body.return_tokens_as_token_ids)
        self._tails = Tails(generation, body.stream_options)
        self._body, self._echoes = body, echoes
        self._started: set[int] = set()  # choices of which something has been said
        self._about: dict[str, Any] = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": card.name,
        }
        self._head = f'data: {to_json(self._about)[:-1]},"choices":['

    def answer(self) -> dict[str, Any]:
        shown = [choice for part in self._generation.parts for choice in best(part.choices, self._body.n)]
        return {
            **self._about,
            "choices": [self._choice(index, choice) for index, choice in enumerate(shown)],
            "usage": self._generation.usage(),
            "weight_version": self._generation.weight_version,
        }

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        delta = choice.take()
        place, part = self._prompt_of(choice)
        extras: dict[str, Any] = {}
        if self._body.prompt_logprobs is not None and part.prompt_logprobs is not None:
            extras["prompt_logprobs"] = logprobs.prompt(
                self._wording, part.request.token_ids, part.prompt_logprobs, self._body.prompt_logprobs
            )
        return {
            "index": index,
            "text": self._echoes[place].text + delta.text if self._echoes else delta.text,
            "logprobs": self._columns(choice, delta, first=True),
            "finish_reason": self._finish_reason(choice),
            "stop_reason": choice.stop_reason,
            **({} if choice.reward is None else {"reward": choice.reward}),
            **choice.shown_spans(self._body.return_weight_spans),
            **self._token_ids(choice, delta, first=True),
            **extras,
        }

    def _prompt_of(self, choice: Choice) -> tuple[int, Part]:
        place = choice.index // self._generation.parts[0].request.n
        return place, self._generation.parts[place]

    def _finish_reason(self, choice: Choice) -> str | None:
        """Who asks for ids knows vLLM, and by `abort` that the answer can be gone on with: AReaL sends it again."""
        if choice.aborted and (self._body.return_tokens_as_token_ids or self._body.return_token_ids):
            return "abort"
        return choice.finish_reason

    def _columns(self, choice: Choice, delta: Delta, first: bool) -> dict[str, Any] | None:
        """`first`: with the prompt's, where it is echoed."""
        k = self._body.logprobs
        if k is None:
            return None
        place, part = self._prompt_of(choice)
        echo = self._echoes[place] if self._echoes else None
        columns: dict[str, Any] | None = None
        if delta.logprobs is not None:
            offsets = [offset + len(echo.text) for offset in delta.offsets] if echo else delta.offsets
            columns = logprobs.completion(self._wording, delta.token_ids, delta.logprobs, offsets)
        if not first or echo is None or part.prompt_logprobs is None:
            return columns
        before = logprobs.echoed(self._wording, part.request.token_ids, part.prompt_logprobs, echo.offsets, k)
        return logprobs.joined(before, columns) if columns else before

    def _token_ids(self, choice: Choice, delta: Delta, first: bool) -> dict[str, Any]:
        if not self._body.return_token_ids:
            return {}
        found: dict[str, Any] = {"token_ids": delta.token_ids}
        if first:
            found["prompt_token_ids"] = self._prompt_of(choice)[1].request.token_ids
        return found

    def opening(self) -> str:
        return ""

    def changes(self, choices: Sequence[Choice]) -> str:
        """The prompt, echoed or as ids, stands in a choice's first chunk."""
        events: list[str] = []
        tail = self._tails.next()
        for choice in choices:
            delta = choice.take()
            finished = choice.finish_reason is not None
            first = False
            if self._echoes or self._body.return_token_ids:
                first = choice.index not in self._started
                self._started.add(choice.index)
            echoes = first and bool(self._echoes)
            columns, finish, extra = "null", "null", ""
            if delta.logprobs or echoes:
                columns = to_json(self._columns(choice, delta, first))
            if self._body.return_token_ids:
                extra = "," + to_json(self._token_ids(choice, delta, first))[1:-1]
            if finished:
                finish = to_json(self._finish_reason(choice))
                extra += (
                    ","
                    + to_json(
                        {"stop_reason": choice.stop_reason, **choice.shown_spans(self._body.return_weight_spans)}
                    )[1:-1]
                )
            elif not (delta.text or delta.logprobs or echoes or (extra and delta.token_ids)):
                continue
            text = self._echoes[self._prompt_of(choice)[0]].text + delta.text if echoes else delta.text
            events.append(
                f'{self._head}{{"index":{choice.index},"text":{quoted(text)},"logprobs":{columns},'
                f'"finish_reason":{finish}{extra}}}{tail}'
            )
        return "".join(events)

    def closing(self) -> str:
        tail = self._tails.last()
        return "" if tail is None else self._head + tail
