"""LLaMA-Factory's POST /v1/score/evaluation: whole texts to scores.

Its PPO trainer calls every model "model": a name that means no model, unless one is called so.
"""

from __future__ import annotations

import uuid
from typing import Annotated

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BeforeValidator, Field

from ..api import body as bodies
from ..api import fields
from ..api.fields import honoured
from ..api.protocol import INT64, Common, Prompt, prompts_of
from ..api.scoring import score
from ..api.service import Service, encode
from ..api.streaming import JsonAnswer
from .urls import model_of, rewards_of

router = APIRouter()

ANY_MODEL = "model"
EVALUATION: dict[str, fields.Field] = {
    **honoured("model", "messages", "max_length", "priority", "cache_salt", "timeout", "add_special_tokens"),
}


class Evaluation(Common):
    messages: Annotated[list[Prompt], BeforeValidator(prompts_of)]
    max_length: Annotated[int, Field(ge=1, lt=INT64)] | None = None  # tokens, of which the first are kept


@router.post("/v1/score/evaluation")
async def evaluate(request: Request) -> Response:
    service = Service.of(request)
    body, headers = await bodies.read(request, Evaluation, EVALUATION, service.options)
    named = body.model if body.model != ANY_MODEL or service.catalog().find(ANY_MODEL) else None
    card = model_of(request, named)
    prompts = await encode(service.texts(card), body.messages, body.add_special_tokens is not False, card, "messages")
    scored = await score(request, card, [ids[: body.max_length] for ids in prompts], body, "messages")
    answer = {"id": f"scoreval-{uuid.uuid4().hex}", "object": "score.evaluation", "model": body.model or card.name}
    return JsonAnswer(answer | {"scores": rewards_of(request, card, scored.scores)}, headers)
