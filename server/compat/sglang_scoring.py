"""SGLang's /classify: raw scores under the name of an embedding, one answer for one text and a list for several."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from typing import Annotated, Any, cast

from fastapi import Request
from fastapi.responses import Response
from pydantic import BeforeValidator

from ..api import body as bodies
from ..api import fields
from ..api.errors import invalid
from ..api.fields import honoured, ignored, refused
from ..api.protocol import Common, Prompt, prompts_of
from ..api.scoring import score
from ..api.service import Service, encode
from ..api.streaming import JsonAnswer
from .versions import version_name

CLASSIFY: dict[str, fields.Field] = {
    **honoured("model", "text", "input_ids", "rid", "priority", "cache_salt", "timeout", "add_special_tokens"),
    "sampling_params": ignored("nothing is sampled"),
    "log_metrics": ignored("every request is counted"),
    "return_prompt_token_ids": refused("the prompt's ids are not shown", False),
    "dimensions": refused("scores are not cut"),
    "lora_path": refused("an adapter is no reward model"),
    "image_data": fields.NO_IMAGES,
    "video_data": fields.NO_IMAGES,
    "audio_data": fields.NO_IMAGES,
    "input_embeds": fields.COMPLETIONS["prompt_embeds"],
}


class ClassifyBody(Common):
    text: Annotated[list[Prompt], BeforeValidator(prompts_of)] | None = None
    input_ids: Annotated[list[Prompt], BeforeValidator(prompts_of)] | None = None
    rid: str | list[str] | None = None


def is_meant_by(value: Mapping[str, Any]) -> bool:
    """Whether a body of /classify is SGLang's, not vLLM's."""
    return bool({"text", "input_ids"} & value.keys()) and not {"input", "messages"} & value.keys()


async def classify(request: Request, received: bodies.Received) -> Response:
    service = Service.of(request)
    single = is_single(received.value)
    body, headers = bodies.checked(received, ClassifyBody, CLASSIFY, service.options)
    card = service.card(body.model, gives="scores")
    param, given = texts_or_ids(body.text, body.input_ids)
    prompts = await encode(service.texts(card), given, body.add_special_tokens is not False, card, param)
    began = time.monotonic()
    scored = await score(request, card, prompts, body, param)
    version = version_name(card, scored.weight_version)
    answers = [
        {
            "embedding": scores,
            "meta_info": {
                "id": rid,
                "finish_reason": {"type": "length", "length": 0},
                "prompt_tokens": len(ids),
                "weight_version": version,
                "e2e_latency": time.monotonic() - began,
            },
        }
        for scores, ids, rid in zip(scored.scores, prompts, rids(body.rid, len(prompts)), strict=True)
    ]
    return JsonAnswer(answers[0] if single else answers, headers)


def is_single(value: Mapping[str, Any]) -> bool:
    """Whether a body holds one text, or the ids of one, and not a list of them: so its answer is no list either."""
    if isinstance(value.get("text"), str):
        return True
    ids: Any = value.get("input_ids")
    return isinstance(ids, list) and not any(isinstance(one, list) for one in cast("list[Any]", ids)[:1])


def texts_or_ids(text: list[Prompt] | None, ids: list[Prompt] | None) -> tuple[str, list[Prompt]]:
    """The field that was sent, and what is in it. Raises ApiError."""
    if text is not None and all(isinstance(one, str) for one in text) and ids is None:
        return "text", text
    if ids is not None and all(isinstance(one, list) for one in ids) and text is None:
        return "input_ids", ids
    raise invalid("send either text, a string or strings, or input_ids, token ids or lists of them", "text")


def rids(given: str | list[str] | None, count: int) -> list[str]:
    """The names of a request's parts: the client's own, or new ones. Raises ApiError."""
    if given is None:
        return [uuid.uuid4().hex for _ in range(count)]
    if isinstance(given, list):
        if len(given) != count:
            raise invalid(f"rid has {len(given)} names; there must be {count}", "rid")
        return given
    return [given] if count == 1 else [f"{given}_{index}" for index in range(count)]
