"""SGLang's POST /generate: one prompt or a batch, as text or token ids, with a `sampling_params` each.

Beside SGLang's fields `model` picks one of several hosted models; `lora_path` names an adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, TypeVar, cast

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BeforeValidator, Field

from ..api import body as bodies
from ..api import fields
from ..api.errors import invalid
from ..api.fields import honoured, ignored, refused
from ..api.generation import Generation, Part, part_of
from ..api.protocol import Common, GenerationBody, Prompt, StructuredOutputs, Tokens, prompts_of
from ..api.sampling import Length, requests_of
from ..api.service import Service, encode
from ..api.streaming import JsonAnswer, stream, whole
from ..api.structured import grammar_of
from ..engine.request import ModelCard
from ..text.text import Text
from .sglang_answers import Answers, Asked
from .sglang_scoring import is_single, rids, texts_or_ids

router = APIRouter()

DEFAULT_TOKENS = 128
NO_EXPERTS = refused("there are no experts", False)
GENERATE: dict[str, fields.Field] = {
    **honoured("model", "text", "input_ids", "sampling_params", "return_logprob", "logprob_start_len", "stream", "rid"),
    **honoured("top_logprobs_num", "return_text_in_logprobs", "lora_path", "extra_key", "priority", "cache_salt"),
    **honoured("timeout", "add_special_tokens"),
    "log_metrics": ignored("every request is counted"),
    "routing_key": ignored("there is one engine"),
    "session_id": ignored("every prompt prefix is cached"),
    "conversation_id": ignored("every prompt prefix is cached"),
    "routed_dp_rank": ignored("there is one engine"),
    "data_parallel_rank": ignored("there is one engine"),
    "token_ids_logprob": refused("log-probabilities are of the drawn and the likeliest tokens", [], -1),
    "return_sampling_mask": refused("which tokens could be drawn is not told", False),
    "sampling_logprobs_mode": refused("it belongs to return_sampling_mask"),
    "return_hidden_states": refused("hidden states are not told", False),
    "return_routed_experts": NO_EXPERTS,
    "routed_experts_start_len": refused("there are no experts", 0),
    "return_indexer_topk": NO_EXPERTS,
    "return_prompt_token_ids": refused("send input_ids, or ask POST /tokenize", False),
    "return_flat_raw_top_logprobs": refused("log-probabilities are nested", False),
    "return_flat_raw_output_top_logprobs": refused("log-probabilities are nested", False),
    "return_flat_raw_top_logprobs_b64": refused("log-probabilities are nested", False),
    "custom_logit_processor": refused("code from a request is never run"),
    "input_embeds": fields.COMPLETIONS["prompt_embeds"],
    "session_params": refused("send the whole prompt; every prefix of it is cached", {}),
    "background": refused("answers are not kept", False),
    "require_reasoning": refused("thinking is not forced", False),
    "use_audio_in_video": refused("the models read text only", False),
    "watermark": refused("nothing is marked"),
    **dict.fromkeys(("image_data", "video_data", "audio_data", "modalities", "video_config"), fields.NO_IMAGES),
    **dict.fromkeys(("mm_hashes", "mm_content_hashes"), fields.NO_IMAGES),
    **dict.fromkeys(
        ("bootstrap_host", "bootstrap_port", "bootstrap_room", "bootstrap_pair_key", "decode_tp_size"),
        refused("one engine computes prompt and answer"),
    ),
}
SAMPLING: dict[str, fields.Field] = {
    **honoured("max_new_tokens", "min_new_tokens", "stop", "stop_token_ids", "temperature", "top_p", "top_k", "min_p"),
    **honoured("frequency_penalty", "presence_penalty", "repetition_penalty", "n", "json_schema", "regex", "ebnf"),
    **honoured("ignore_eos", "skip_special_tokens", "no_stop_trim", "logit_bias", "sampling_seed"),
    "spaces_between_special_tokens": ignored("special tokens are decoded as the tokenizer has them"),
    "stream_interval": ignored("an event holds what has come"),
    "stop_regex": refused("send stop, strings that end the answer", []),
    "structural_tag": refused("use json_schema, regex or ebnf", ""),
    "beam_width": refused("there is no beam search", 1),
    "custom_params": refused("there are none", {}),
    "watermark": refused("nothing is marked"),
}

Item = TypeVar("Item")
Params = dict[str, Any]


class SamplingParams(GenerationBody):
    max_tokens: Annotated[Tokens | None, Field(alias="max_new_tokens")] = None
    min_tokens: Annotated[Tokens, Field(alias="min_new_tokens")] = 0
    seed: Annotated[int | None, Field(alias="sampling_seed", ge=-(2**63), lt=2**63)] = None
    include_stop_str_in_output: Annotated[bool, Field(alias="no_stop_trim")] = False
    json_schema: str = ""
    regex: str = ""
    ebnf: str = ""


class GenerateBody(Common):
    """Fields that may be lists have an entry for each prompt then."""

    text: Annotated[list[Prompt], BeforeValidator(prompts_of)] | None = None
    input_ids: Annotated[list[Prompt], BeforeValidator(prompts_of)] | None = None
    sampling_params: Params | list[Params] = Field(default_factory=Params)
    return_logprob: bool | list[bool] = False
    logprob_start_len: int | list[int] = -1
    top_logprobs_num: Tokens | list[Tokens] = 0
    return_text_in_logprobs: bool = False
    lora_path: str | list[str | None] | None = None
    extra_key: str | list[str | None] | None = None
    rid: str | list[str] | None = None
    stream: bool = False


@dataclass(frozen=True, slots=True)
class Entry:
    """One prompt and what is asked of it."""

    params: SamplingParams
    card: ModelCard
    text: Text
    ids: list[int]
    asked: Asked


@router.post("/generate")
async def create(request: Request) -> Response:
    service = Service.of(request)
    received = await bodies.receive(request, service.options)
    single = is_single(received.value)
    body, headers = bodies.checked(received, GenerateBody, GENERATE, service.options)
    entries = await entries_of(service, body)
    if len({entry.params.n for entry in entries}) > 1:
        raise invalid("n differs between the sampling_params; all prompts of a request have as many answers", "n")
    parts = [await _part(service, body, entry, index) for index, entry in enumerate(entries)]
    generation = Generation(service.client, parts, request.state.request_id)
    listed = not single or len(generation.choices) > 1
    asked = {part.request.id: entry.asked for part, entry in zip(parts, entries, strict=True)}
    shape = Answers(generation, asked, listed)
    if body.stream:
        return await stream(request, generation, shape, service.options, headers)
    await whole(request, generation)
    return JsonAnswer(shape.answer(), headers)


async def entries_of(service: Service, body: GenerateBody) -> list[Entry]:
    """Raises ApiError."""
    param, prompts = texts_or_ids(body.text, body.input_ids)
    count = len(prompts)
    names = rids(body.rid, count)
    entries: list[Entry] = []
    for index, prompt in enumerate(prompts):
        card = service.card(at(body.lora_path, index, count, "lora_path") or body.model, gives="text")
        text = service.texts(card)
        (ids,) = await encode(text, [prompt], body.add_special_tokens is not False, card, param)
        given = at(body.sampling_params, index, count, "sampling_params")
        params = sampling_of(given, service, body, at(body.extra_key, index, count, "extra_key"))
        start = at(body.logprob_start_len, index, count, "logprob_start_len")
        if start > len(ids):
            raise invalid(f"logprob_start_len is {start}; the prompt has {len(ids)} tokens", "logprob_start_len")
        limit = DEFAULT_TOKENS if "max_new_tokens" not in given else params.max_tokens
        wanted = at(body.return_logprob, index, count, "return_logprob")
        top = at(body.top_logprobs_num, index, count, "top_logprobs_num")
        asked = Asked(
            names[index], card, text, limit, wanted, start if start >= 0 else None, top, body.return_text_in_logprobs
        )
        entries.append(Entry(params, card, text, ids, asked))
    return entries


def sampling_of(given: Params, service: Service, body: GenerateBody, extra_key: str | None) -> SamplingParams:
    """Raises ApiError."""
    with bodies.within("sampling_params"):
        params, _ = bodies.checked(bodies.Received(dict(given), []), SamplingParams, SAMPLING, service.options)
        forms = {"json": params.json_schema, "regex": params.regex, "grammar": params.ebnf}
        forms = {name: form for name, form in forms.items() if form}
        if len(forms) > 1:
            raise invalid("json_schema, regex and ebnf each say what the answer must be; send one of them")
        structured = bodies.validated(StructuredOutputs, forms) if forms else None
    update: Mapping[str, Any] = {
        "priority": body.priority,
        "timeout": body.timeout,
        "cache_salt": body.cache_salt + (extra_key or ""),
        "stream": body.stream,
        "structured_outputs": structured,
    }
    return params.model_copy(update=update)


def at(value: Item | list[Item], index: int, count: int, field: str) -> Item:
    """What a field says of one prompt. Raises ApiError."""
    if not isinstance(value, list):
        return value
    each = cast("list[Item]", value)
    if len(each) != count:
        raise invalid(f"{field} has {len(each)} entries; there must be {count}, as many as prompts", field)
    return each[index]


async def _part(service: Service, body: GenerateBody, entry: Entry, index: int) -> Part:
    params, asked = entry.params, entry.asked
    (request,) = requests_of(
        service,
        params,
        entry.card,
        entry.text,
        [entry.ids],
        "input_ids" if body.text is None else "text",
        Length("max_new_tokens", params.max_tokens, asked.max_new_tokens, may_be_none=True),
        asked.top if asked.logprobs else None,
        prompt_logprobs=asked.top if asked.logprobs and asked.start is not None else None,
        grammar=await grammar_of(service, params),
    )
    if request.prompt_logprobs is not None:
        request = replace(request, first_needed_row=max((asked.start or 0) - 1, 0))
    return part_of(params, entry.text, request, index * params.n)
