"""POST /v1/chat/completions"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any, cast

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ..engine.request import ModelCard
from ..text.text import Text
from . import body as bodies
from . import fields, logprobs, ranking
from .choices import CallDelta, Choice, Delta, best
from .errors import invalid
from .generation import Generation, generate
from .logprobs import Wording
from .protocol import ChatBody
from .ranking import Judge
from .rlhf.prompts import Source
from .sampling import Length, requests_of
from .service import Service, check_ids, in_thread_if
from .streaming import JsonAnswer, Tails, quoted, stream, to_json, unless_gone, whole
from .structured import grammar_of
from .tools import Calling, calling_of, shape_of

router = APIRouter()


@router.post("/v1/chat/completions")
async def create(request: Request) -> Response:
    service = Service.of(request)
    body, headers = await bodies.read(request, ChatBody, fields.CHAT, service.options)
    card = service.card(body.model, gives="text")
    text = service.texts(card)
    check(body)
    judge = Judge.of(service, body, card)
    calling = calling_of(body, text)
    answer = await grammar_of(service, body)
    ids = await render(body, card, text, calling)
    stage = text.stage(ids, continued_text(body))
    requests = requests_of(
        service,
        body,
        card,
        text,
        [ids],
        "messages",
        Length("max_tokens", body.max_tokens)
        if body.max_completion_tokens is None
        else Length("max_completion_tokens", body.max_completion_tokens),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        grammar=await shape_of(service, body, calling, text, stage, answer),
    )
    generation = generate(
        service.client,
        body,
        text,
        requests,
        request.state.request_id,
        reader=lambda: text.reader(calling.reads, stage, calling.one_call),
    )
    shape = Chat(body, card, text, generation)
    if body.stream:
        return await stream(request, generation, shape, service.options, headers)
    await whole(request, generation)
    if judge is not None:
        source = Source("", messages=body.messages, tools=calling.tools)
        await unless_gone(request, judge.reward(service, body, request.state.request_id, generation, [source]))
    return JsonAnswer(shape.answer(), headers)


def check(body: ChatBody) -> None:
    if body.top_logprobs and not body.logprobs:
        raise invalid("top_logprobs is for logprobs: true", "top_logprobs")
    ranking.check(body, body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens)


def continued_text(body: ChatBody) -> str | None:
    """The text that the answer goes on with."""
    if not body.continue_final_message:
        return None
    content = body.messages[-1].get("content")
    if isinstance(content, list):
        return "".join(str(part.get("text")) for part in cast("list[dict[str, Any]]", content))
    return str(content)


async def render(body: ChatBody, card: ModelCard, text: Text, calling: Calling) -> list[int]:
    opens = not body.continue_final_message if body.add_generation_prompt is None else body.add_generation_prompt
    ids = await in_thread_if(
        True,  # how long a template takes is the checkpoint's doing, not to be told from the messages
        lambda: text.render(
            body.messages,
            calling.tools,
            add_generation_prompt=opens,
            continue_final_message=body.continue_final_message,
            kwargs=body.chat_template_kwargs,
            add_special_tokens=bool(body.add_special_tokens),
        ),
    )
    if not ids:
        raise invalid("the chat template makes nothing of these messages", "messages")
    check_ids(ids, card, "messages")
    return ids


def message(delta: Delta) -> dict[str, Any]:
    """What a whole answer says. No content is null beside calls or thinking, and an empty text elsewhere."""
    said: dict[str, Any] = {"content": delta.text or (None if delta.calls or delta.reasoning else "")}
    if delta.reasoning:
        said["reasoning_content"] = delta.reasoning
    if delta.calls:
        said["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in delta.calls
        ]
    return said


def more_of(delta: Delta) -> dict[str, Any]:
    """What a chunk of a stream adds."""
    said: dict[str, Any] = {"content": delta.text} if delta.text else {}
    if delta.reasoning:
        said["reasoning_content"] = delta.reasoning
    if delta.calls:
        said["tool_calls"] = [more_of_call(call) for call in delta.calls]
    return said


def more_of_call(call: CallDelta) -> dict[str, Any]:
    if call.id is None:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    function = {"name": call.name, "arguments": call.arguments}
    return {"index": call.index, "id": call.id, "type": "function", "function": function}


class Chat:
    """The wording of the answer, whole or as chunks."""

    def __init__(self, body: ChatBody, card: ModelCard, text: Text, generation: Generation) -> None:
        self._generation = generation
        self._wording = Wording(text, body.return_tokens_as_token_ids)
        self._tails = Tails(generation, body.stream_options)
        self._ids, self._logprobs, self._n = body.return_token_ids, body.logprobs, body.n
        self._spans = body.return_weight_spans
        self._about: dict[str, Any] = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion.chunk" if body.stream else "chat.completion",
            "created": int(time.time()),
            "model": card.name,
        }
        self._head = f'data: {to_json(self._about)[:-1]},"choices":['

    def answer(self) -> dict[str, Any]:
        generation, part = self._generation, self._generation.parts[0]
        prompt_ids = part.request.token_ids
        extras: dict[str, Any] = {"prompt_token_ids": prompt_ids} if self._ids else {}
        if part.prompt_logprobs is not None:
            extras["prompt_logprobs"] = logprobs.prompt(
                self._wording, prompt_ids, part.prompt_logprobs, part.request.prompt_logprobs or 0
            )
        return {
            **self._about,
            "choices": [self._choice(index, choice) for index, choice in enumerate(best(part.choices, self._n))],
            "usage": generation.usage(),
            "weight_version": generation.weight_version,
            **extras,
        }

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        delta = choice.take()
        columns = delta.logprobs if self._logprobs else None
        return {
            "index": index,
            "message": {"role": "assistant", **message(delta), "refusal": None},
            "logprobs": logprobs.chat(self._wording, delta.token_ids, columns) if columns else None,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
            **({} if choice.reward is None else {"reward": choice.reward}),
            **choice.shown_spans(self._spans),
            **({"token_ids": delta.token_ids} if self._ids else {}),
        }

    def opening(self) -> str:
        delta = '{"role":"assistant","content":"","refusal":null}'
        tail = self._tails.next()
        if self._ids:
            ids = to_json(self._generation.parts[0].request.token_ids)
            tail = f'],"prompt_token_ids":{ids}{tail[1:]}'
        return "".join(self._event(choice, delta, None, "", tail) for choice in self._generation.choices)

    def changes(self, choices: Sequence[Choice]) -> str:
        events: list[str] = []
        tail = self._tails.next()
        for choice in choices:
            delta = choice.take()
            columns = logprobs.chat(self._wording, delta.token_ids, delta.logprobs) if delta.logprobs else None
            extra = f',"token_ids":{to_json(delta.token_ids)}' if self._ids and delta.token_ids else ""
            if delta.calls or delta.reasoning:
                events.append(self._event(choice, to_json(more_of(delta)), columns, extra, tail))
            elif delta.text or columns or extra:
                events.append(self._event(choice, f'{{"content":{quoted(delta.text)}}}', columns, extra, tail))
            if choice.finish_reason is not None:
                extra = "," + to_json({"stop_reason": choice.stop_reason, **choice.shown_spans(self._spans)})[1:-1]
                events.append(self._event(choice, "{}", None, extra, tail, to_json(choice.finish_reason)))
        return "".join(events)

    def closing(self) -> str:
        tail = self._tails.last()
        return "" if tail is None else self._head + tail

    def _event(self, choice: Choice, delta: str, columns: object, extra: str, tail: str, finish: str = "null") -> str:
        shown = to_json(columns) if columns else "null"
        return (
            f'{self._head}{{"index":{choice.index},"delta":{delta},"logprobs":{shown},'
            f'"finish_reason":{finish}{extra}}}{tail}'
        )
