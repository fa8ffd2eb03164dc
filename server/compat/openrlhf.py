"""OpenRLHF's POST /get_reward: whole texts, prompt and response together, to rewards."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BeforeValidator

from ..api import body as bodies
from ..api import fields
from ..api.fields import honoured, ignored
from ..api.protocol import Common, Prompt, prompts_of
from ..api.scoring import score
from ..api.service import Service, encode
from ..api.streaming import JsonAnswer
from .urls import model_of, rewards_of

router = APIRouter()

GET_REWARD: dict[str, fields.Field] = {
    **honoured("model", "query", "priority", "cache_salt", "timeout", "add_special_tokens"),
    "prompts": ignored("query holds the prompt, too"),
    "labels": ignored("a reward model knows no right answer"),
}


class RewardQuery(Common):
    query: Annotated[list[Prompt], BeforeValidator(prompts_of)]


@router.post("/get_reward")
async def get_reward(request: Request) -> Response:
    """`scores` is what OpenRLHF filters prompts by; like its own server, this one gives the rewards again."""
    service = Service.of(request)
    body, headers = await bodies.read(request, RewardQuery, GET_REWARD, service.options)
    card = model_of(request, body.model)
    prompts = await encode(service.texts(card), body.query, body.add_special_tokens is not False, card, "query")
    scored = await score(request, card, prompts, body, "query")
    rewards, raw = rewards_of(request, card, scored.scores), [score for (score,) in scored.scores]
    return JsonAnswer({"rewards": rewards, "scores": rewards, "extra_logs": {"raw_reward": raw}}, headers)
