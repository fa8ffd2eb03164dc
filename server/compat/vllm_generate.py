"""vLLM's POST /inference/v1/generate: token ids in, token ids out."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Field

from ..api import body as bodies
from ..api import fields, logprobs
from ..api.choices import Choice, Delta
from ..api.fields import honoured, ignored, refused
from ..api.generation import Generation, generate
from ..api.logprobs import Wording, finite
from ..api.protocol import Common, GenerationBody, Ids, StreamOptions, Tokens
from ..api.sampling import Length, requests_of
from ..api.service import Service, check_ids
from ..api.streaming import JsonAnswer, stream, to_json, whole
from ..api.structured import grammar_of
from ..engine.request import Logprobs, ModelCard
from ..text.text import Text
from .versions import version_name

router = APIRouter()

GENERATE: dict[str, fields.Field] = {
    **honoured("model", "token_ids", "sampling_params", "request_id", "stream", "stream_options", "return_token_ids"),
    **honoured("output_mode", "priority", "cache_salt", "timeout"),
    "token_offsets": ignored("where a prompt's tokens lie in its text changes no answer"),
    "reasoning_ended": ignored("a grammar holds from the first token on"),
    "reasoning_parser_kwargs": ignored("token ids are not read"),
    "features": fields.NO_IMAGES,
    "content_parts": fields.NO_IMAGES,
    "kv_transfer_params": fields.VLLM["kv_transfer_params"],
    "ec_transfer_params": fields.VLLM["ec_transfer_params"],
}
SAMPLING: dict[str, fields.Field] = {  # vLLM's SamplingParams
    **honoured("n", "presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "top_p", "top_k"),
    **honoured("min_p", "seed", "stop", "stop_token_ids", "ignore_eos", "max_tokens", "min_tokens", "logprobs"),
    **honoured("prompt_logprobs", "skip_special_tokens", "include_stop_str_in_output", "structured_outputs"),
    **honoured("logit_bias", "allowed_token_ids", "bad_words", "logprobs_mode"),
    "detokenize": ignored("output_mode says whether there is a text"),
    "output_kind": ignored("`stream` says it"),
    "flat_logprobs": ignored("a matter of vLLM's memory"),
    "skip_clone": ignored("a matter of vLLM's memory"),
    "output_text_buffer_length": ignored("a matter of vLLM's memory"),
    "skip_reading_prefix_cache": ignored("no answer depends on the cache"),
    "spaces_between_special_tokens": ignored("special tokens are decoded as the tokenizer has them"),
    "prompt_logprob_start": refused("prompt_logprobs begin with the prompt", 0),
    "extra_args": refused("there are none", {}),
    "trace_decode_token_ids": refused("tokens are drawn", []),
    **{name: fields.VLLM[name] for name in ("stream_interval", "logprob_token_ids", "thinking_token_budget")},
    **{name: fields.VLLM[name] for name in ("repetition_detection", "routed_experts_prompt_start", "watermarking")},
    "return_sampling_mask": refused("which tokens could be drawn is not told", False),
}


class SamplingParams(GenerationBody):
    logprobs: Tokens | None = None


class GenerateBody(Common):
    token_ids: Annotated[Ids, Field(min_length=1)]
    sampling_params: dict[str, Any]
    request_id: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False  # the prompt's
    output_mode: Literal["tokens", "text"] = "tokens"

    def generation(self, service: Service) -> SamplingParams:
        """Raises ApiError."""
        received = bodies.Received(dict(self.sampling_params), [])
        with bodies.within("sampling_params"):
            params, _ = bodies.checked(received, SamplingParams, SAMPLING, service.options)
        own = ("priority", "cache_salt", "timeout", "stream", "stream_options")
        return params.model_copy(update={name: getattr(self, name) for name in own})


@router.post("/inference/v1/generate")
async def create(request: Request) -> Response:
    service = Service.of(request)
    body, headers = await bodies.read(request, GenerateBody, GENERATE, service.options)
    card = service.card(body.model, gives="text")
    text = service.texts(card)
    params = body.generation(service)
    check_ids(body.token_ids, card, "token_ids")
    requests = requests_of(
        service,
        params,
        card,
        text,
        [body.token_ids],
        "token_ids",
        Length("max_tokens", params.max_tokens),
        params.logprobs,
        grammar=await grammar_of(service, params),
    )
    generation = generate(service.client, params, text, requests, request.state.request_id)
    shape = TokensAnswer(body, params, card, text, generation)
    if body.stream:
        return await stream(request, generation, shape, service.options, headers)
    await whole(request, generation)
    return JsonAnswer(shape.answer(), headers)


class TokensAnswer:
    """The wording of the answer, whole or as chunks."""

    def __init__(
        self, body: GenerateBody, params: SamplingParams, card: ModelCard, text: Text, generation: Generation
    ) -> None:
        self._body, self._params, self._generation = body, params, generation
        self._wording = Wording(text, as_ids=False)
        self._id = body.request_id or uuid.uuid4().hex
        self._card = card
        self._first = True

    def answer(self) -> dict[str, Any]:
        generation, params = self._generation, self._params
        (part,) = generation.parts
        found = part.prompt_logprobs
        return {
            "request_id": self._id,
            "created": int(time.time()),
            "model": self._card.name,
            "output_mode": self._body.output_mode,
            "choices": [self._choice(choice) for choice in generation.choices],
            "usage": generation.usage(),
            "prompt_logprobs": None
            if found is None or params.prompt_logprobs is None
            else logprobs.prompt(self._wording, part.request.token_ids, found, params.prompt_logprobs),
            "prompt_token_ids": part.request.token_ids if self._body.return_token_ids else None,
            "weight_version": generation.weight_version,
        }

    def opening(self) -> str:
        return ""

    def changes(self, choices: Iterable[Choice]) -> str:
        chunk: dict[str, Any] = {"request_id": self._id, "choices": [self._choice(choice) for choice in choices]}
        if self._first and self._body.return_token_ids:
            chunk["prompt_token_ids"] = self._generation.parts[0].request.token_ids
        self._first = False
        options = self._body.stream_options
        if options is not None and options.continuous_usage_stats:
            chunk["usage"] = self._generation.usage()
        return f"data: {to_json(chunk)}\n\n"

    def closing(self) -> str:
        if self._body.stream_options is None or not self._body.stream_options.include_usage:
            return ""
        last: dict[str, Any] = {"request_id": self._id, "choices": [], "usage": self._generation.usage()}
        return f"data: {to_json(last)}\n\n"

    def _choice(self, choice: Choice) -> dict[str, Any]:
        delta = choice.take()
        said: dict[str, Any] = {
            "index": choice.index,
            "logprobs": self._logprobs(delta),
            "finish_reason": "abort" if choice.aborted else choice.finish_reason,
            "stop_reason": None if choice.aborted else choice.stop_reason,
            "token_ids": delta.token_ids,
            "weight_versions": None if choice.finish_reason is None else self._versions(choice),
        }
        return said | {"text": delta.text} if self._body.output_mode == "text" else said

    def _versions(self, choice: Choice) -> list[dict[str, Any]]:
        """Which of its tokens were drawn by which weights."""
        return [span | {"version": version_name(self._card, span["version"])} for span in choice.weight_spans()]

    def _logprobs(self, delta: Delta) -> dict[str, Any] | None:
        if delta.logprobs is None:
            return None
        if self._body.output_mode == "text":
            return {"content": logprobs.chat(self._wording, delta.token_ids, delta.logprobs)["content"]}
        k = self._params.logprobs or 0
        return {"content": [token(delta.logprobs, index, drawn, k) for index, drawn in enumerate(delta.token_ids)]}


def token(columns: Logprobs, index: int, drawn: int, k: int) -> dict[str, Any]:
    """The token at `index`; among `top_logprobs`, which are `k` but at least one, it is the first."""
    own = {"token_id": drawn, "logprob": finite(columns.values[index]), "rank": columns.ranks[index]}
    top = [own]
    if columns.top_ids:
        likely = zip(columns.top_ids[index], columns.top_values[index], strict=True)
        top += [
            {"token_id": token_id, "logprob": finite(value), "rank": rank}
            for rank, (token_id, value) in enumerate(likely, 1)
            if token_id != drawn
        ]
    return {**own, "top_logprobs": top[: max(k, 1)]}
