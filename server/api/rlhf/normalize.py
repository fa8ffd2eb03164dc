"""POST /v1/rlhf/normalize: what a reward model's scores are shifted, and scaled, by, so that demonstrations score 0 on
average. The model keeps it; requests that say `normalize: true` get such scores. GET shows it."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from ...engine.commands import Normalize
from ...engine.request import ModelCard
from .. import body as bodies
from ..errors import invalid
from ..service import Service, in_thread_if
from ..streaming import JsonAnswer, unless_gone
from . import fields
from .bodies import Demonstration, NormalizeBody
from .evaluation import normalisation
from .groups import PromptGroup, Terms, check_length, together
from .prompts import Reader, Source, answer_of
from .roles import reward_model

router, admin = APIRouter(), APIRouter()


@admin.post("/v1/rlhf/normalize")
async def create(request: Request) -> Response:
    service, request_id = Service.of(request), request.state.request_id
    body, headers = await bodies.read(request, NormalizeBody, fields.NORMALIZE, service.options)
    card = reward_model(service, body.model, "model")
    if body.mode == "none":
        if body.demonstrations:
            raise invalid("mode is 'none', which takes no demonstrations", "demonstrations")
        mean, std = 0.0, 1.0
    else:
        scores = await unless_gone(request, scores_of(service, body, card, request_id))
        mean, std = normalisation(scores, body.mode)
        if std == 0:
            raise invalid(f"all {len(scores)} demonstrations score {mean:g}: nothing to scale by", "demonstrations")
    if body.persist:
        await service.command(Normalize(card.name, mean, std, body.mode), request_id)
    answer = {"model": card.name, "mode": body.mode, "bias": 0.0 - mean, "mean": mean, "std": std}
    return JsonAnswer({**answer, "n": len(body.demonstrations), "persisted": body.persist}, headers)


@router.get("/v1/rlhf/normalize")
async def current(request: Request) -> Response:
    service = Service.of(request)
    return JSONResponse(shown(reward_model(service, request.query_params.get("model"), "model")))


def shown(card: ModelCard) -> dict[str, Any]:
    """`mode`: bias, mean_std, checkpoint or none."""
    about = {"model": card.name, "mode": card.reward_normalization}
    return {**about, "bias": 0.0 - card.reward_mean, "mean": card.reward_mean, "std": card.reward_std}


async def scores_of(service: Service, body: NormalizeBody, card: ModelCard, request_id: str) -> list[float]:
    """Raw. Raises ApiError."""
    if not body.demonstrations:
        raise invalid("demonstrations is empty: there is nothing to normalise by", "demonstrations")
    reader = Reader(card, service.texts(card), body.add_special_tokens, body.chat_template_kwargs)
    wholes = await in_thread_if(
        True, lambda: [whole_of(reader, one, index) for index, one in enumerate(body.demonstrations)]
    )
    for index, whole in enumerate(wholes):
        check_length(card, 0, len(whole), f"demonstrations[{index}]")
    terms = Terms(service.client, request_id, service.deadline(body), body.priority, body.cache_salt)
    service.traffic.scored(card, len(wholes))
    alone = PromptGroup(terms, card, [], 0)
    found = await together(alone.run(whole, "score") for whole in wholes)
    return [one.score for one in found if one.score is not None]


def whole_of(reader: Reader, demonstration: Demonstration, index: int) -> list[int]:
    where = f"demonstrations[{index}]"
    source = Source.of(demonstration, where)
    completion = demonstration.completion
    return reader.whole(source, None if completion is None else answer_of(completion, f"{where}.completion"))
