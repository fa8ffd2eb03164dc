"""What `trl vllm-serve` answered up to TRL 1.10: routes that end with a slash, which others of the same name do not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BeforeValidator, Field

from ..api import body as bodies
from ..api import fields, state
from ..api.choices import Choice
from ..api.errors import invalid
from ..api.fields import honoured
from ..api.generation import generate
from ..api.logprobs import finite
from ..api.protocol import (
    Common,
    Message,
    Prompt,
    conversations_of,
    prompts_of,
)
from ..api.sampling import Length, requests_of
from ..api.service import Service, check_ids, encode, in_thread_if
from ..api.streaming import JsonAnswer, whole
from ..api.structured import grammar_of
from ..engine.commands import ResetPrefixCache
from ..engine.request import ModelCard
from ..text.text import Text
from .orders import carried_out
from .vllm_control import WORLD_SIZE
from .vllm_generate import SAMPLING, SamplingParams

router = APIRouter()
admin = APIRouter()

MAX_TOKENS = 16
PARAMS = ("n", "repetition_penalty", "temperature", "top_p", "top_k", "min_p", "max_tokens", "logprobs")
SHARED: dict[str, fields.Field] = {
    **honoured("model", *PARAMS, "structured_outputs_regex", "guided_decoding_regex", "generation_kwargs"),
    **honoured("priority", "cache_salt", "timeout"),
    "images": fields.NO_IMAGES,
}
GENERATE: dict[str, fields.Field] = {**SHARED, **honoured("prompts", "add_special_tokens")}
CHAT: dict[str, fields.Field] = {**SHARED, **honoured("messages", "chat_template_kwargs", "tools")}


class SharedBody(Common):
    n: int = 1
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    max_tokens: int = MAX_TOKENS
    logprobs: int | None = 0
    structured_outputs_regex: str | None = None
    guided_decoding_regex: str | None = None  # what TRL 0.24 called it
    generation_kwargs: dict[str, Any] = Field(default_factory=dict[str, Any])

    def generation(self, service: Service, told: bool) -> SamplingParams:
        """`generation_kwargs` go before the others, except before the regular expression. `told`: log-probabilities
        were not turned off. Raises ApiError."""
        given = {name: getattr(self, name) for name in PARAMS} | self.generation_kwargs
        if not told:
            given["logprobs"] = None
        regex = self.structured_outputs_regex or self.guided_decoding_regex
        if regex is not None:
            given["structured_outputs"] = {"regex": regex}
        params, _ = bodies.checked(bodies.Received(given, []), SamplingParams, SAMPLING, service.options)
        return params.model_copy(update={name: getattr(self, name) for name in ("priority", "cache_salt", "timeout")})


class GenerateBody(SharedBody):
    prompts: Annotated[list[Prompt], BeforeValidator(prompts_of)]


class ChatBody(SharedBody):
    messages: Annotated[list[list[Message]], BeforeValidator(conversations_of)]
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict[str, Any])
    tools: list[dict[str, Any]] = Field(default_factory=list[dict[str, Any]])


@router.get("/health/")
async def health(request: Request) -> JSONResponse:
    return await state.health(request)


@router.get("/get_world_size/")
async def world_size() -> JSONResponse:
    return JSONResponse({"world_size": WORLD_SIZE})


@router.post("/generate/")
async def create(request: Request) -> Response:
    service = Service.of(request)
    received = await bodies.receive(request, service.options)
    told = received.value.get("logprobs", 0) is not None
    body, headers = bodies.checked(received, GenerateBody, GENERATE, service.options)
    card = service.card(body.model, gives="text")
    text = service.texts(card)
    prompts = await encode(text, body.prompts, body.add_special_tokens is not False, card, "prompts")
    return JsonAnswer(await generated(request, body.generation(service, told), card, text, prompts, "prompts"), headers)


@router.post("/chat/")
async def chat(request: Request) -> Response:
    service = Service.of(request)
    received = await bodies.receive(request, service.options)
    told = received.value.get("logprobs", 0) is not None
    body, headers = bodies.checked(received, ChatBody, CHAT, service.options)
    card = service.card(body.model, gives="text")
    text = service.texts(card)
    prompts = await in_thread_if(
        True,
        lambda: [text.render(messages, body.tools, kwargs=body.chat_template_kwargs) for messages in body.messages],
    )
    for ids in prompts:
        check_ids(ids, card, "messages")
    return JsonAnswer(
        await generated(request, body.generation(service, told), card, text, prompts, "messages"), headers
    )


@admin.post("/reset_prefix_cache/")
async def reset_prefix_cache(request: Request) -> JSONResponse:
    await carried_out(request, ResetPrefixCache(request.query_params.get("model")))
    return JSONResponse({"message": "Request received, resetting prefix cache status: True"})


@admin.post("/init_communicator/")
@admin.post("/update_named_param/")
@admin.post("/close_communicator/")
async def communicate(request: Request) -> JSONResponse:
    """Its protocol pickles what it exchanges, and nothing from the network is unpickled here."""
    raise invalid(
        "TRL's communicator of versions up to 1.10 is not supported: take TRL 1.11 or later, whose weights come "
        "through /init_weight_transfer_engine, or POST /v1/rlhf/weights",
        code="unsupported",
    )


async def generated(
    request: Request, params: SamplingParams, card: ModelCard, text: Text, prompts: Sequence[list[int]], param: str
) -> dict[str, Any]:
    service = Service.of(request)
    length = Length("max_tokens", params.max_tokens)
    grammar = await grammar_of(service, params)
    requests = requests_of(service, params, card, text, prompts, param, length, params.logprobs, grammar=grammar)
    generation = generate(service.client, params, text, requests, request.state.request_id)
    await whole(request, generation)
    answers = [answer_of(choice) for choice in generation.choices]
    told = params.logprobs is not None
    return {
        "prompt_ids": [part.request.token_ids for part in generation.parts],
        "completion_ids": [ids for ids, _, _ in answers],
        "logprobs": [values for _, values, _ in answers] if told else None,
        "logprob_token_ids": [candidates for _, _, candidates in answers] if told else None,
    }


def answer_of(choice: Choice) -> tuple[list[int], list[list[float]], list[list[int]]]:
    """The answer's ids, and for each the log-probabilities and ids of it and the likeliest, in falling order."""
    delta = choice.take()
    columns = delta.logprobs
    values: list[list[float]] = []
    candidates: list[list[int]] = []
    for index, drawn in enumerate(delta.token_ids if columns else ()):
        assert columns is not None
        found = {drawn: columns.values[index]}
        if columns.top_ids:
            found |= dict(zip(columns.top_ids[index], columns.top_values[index], strict=True))
        ranked = sorted(found.items(), key=lambda item: -item[1])
        values.append([finite(value) for _, value in ranked])
        candidates.append([token_id for token_id, _ in ranked])
    return delta.token_ids, values, candidates
